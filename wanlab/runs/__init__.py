"""Runs: one executed notebook is one folder with its inputs, status, numbers, figures and report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
