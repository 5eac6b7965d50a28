from .publish import publish as publish
from .report import render as render
from .sweep_page import render_index as render_index
