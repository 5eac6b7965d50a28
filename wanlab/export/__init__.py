"""Export: components of a model as ONNX graphs, at any size, with their weights beside them.

>>> from wanlab import export
>>> reports = export.export_all(model, "onnx/wan-nano")
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
