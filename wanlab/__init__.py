"""Finds out why a Wan2.2 image-to-video model is slow, changes it, and proves what that bought and cost.

Importing it is cheap: torch, diffusers, onnx and plotly load when something first uses them.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
