"""Held-out clips with a known true video: photographs that no model was trained on, moved by a known camera."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
