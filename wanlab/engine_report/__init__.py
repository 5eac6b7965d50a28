"""An engine's layers as one table, whatever they were read from: judged by rules, and compared."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
