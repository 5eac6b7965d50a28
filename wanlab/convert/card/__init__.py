"""The report card of an engine: its layers as one table whatever the source, read, judged and compared."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
