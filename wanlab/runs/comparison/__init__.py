"""Runs side by side: configurations held against a baseline, refused where the work was another, and what each bought."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
