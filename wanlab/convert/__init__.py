"""Conversion: networks as ONNX graphs, checked against PyTorch, and run by ONNX Runtime.

>>> from wanlab import convert
>>> reports = convert.export_all(model, "onnx/wan-nano")
>>> convert.parity(model, "expert_high", reports[2].path)
>>> fast = convert.use(model, convert.load_engines("onnx/wan-nano"))
>>> fast.generate(image, prompt)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
