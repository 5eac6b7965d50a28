"""A video service: HTTP, a queue that tells the truth, and workers on Ray Serve that make several videos at a time."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
