from . import configuration as configuration
from . import diagnose as diagnose
from . import engine_report as engine_report
from . import engines as engines
from . import evaluate as evaluate
from . import export as export
from . import heldout as heldout
from . import launch as launch
from . import measure as measure
from . import models as models
from . import pages as pages
from . import plots as plots
from . import precision as precision
from . import runs as runs
from . import techniques as techniques
from .core.errors import WanlabError as WanlabError
from .runs.results import load_runs as load_runs
from .runs.run import Run as Run
from .runs.run import start as start

__version__: str
