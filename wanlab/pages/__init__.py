"""Pages of runs: report.html of one, index.html of many, and both published for a static server."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
