from .execute import Outcome as Outcome
from .execute import execute as execute
from .folder import RunFolder as RunFolder
from .parameters import read_schema as read_schema
from .report import render as render
from .run import Run as Run
from .run import start as start
from .store import load_runs as load_runs
