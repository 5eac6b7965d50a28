from .execute import Outcome as Outcome
from .execute import execute as execute
from .grid import expand as expand
from .grid import load_grid as load_grid
from .guard import reap as reap
from .slots import LocalSlots as LocalSlots
from .sweep import SweepOutcome as SweepOutcome
from .sweep import sweep as sweep
