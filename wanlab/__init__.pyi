from . import convert as convert
from . import diagnose as diagnose
from . import doctor as doctor
from . import evaluate as evaluate
from . import measure as measure
from . import models as models
from . import nano as nano
from . import plots as plots
from . import precision as precision
from . import runs as runs
from .errors import WanlabError as WanlabError
from .runs.run import Run as Run
from .runs.run import start as start
from .runs.store import load_runs as load_runs

__version__: str
