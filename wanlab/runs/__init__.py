"""Runs: one executed notebook is one folder; what the runs of a folder measured, compared and chosen from."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
