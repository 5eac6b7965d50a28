from .index import render_index as render_index
from .publish import publish as publish
from .report import render as render
