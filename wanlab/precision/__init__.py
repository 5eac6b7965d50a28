"""Precision: which layers run in which number format, with scales measured on real inputs.

>>> from wanlab import export, models, precision
>>> model = models.load("wan-nano")
>>> recording = precision.record_inputs(model, precision.nano_examples(4), "recording")
>>> calibration = precision.calibrate(model, "expert_high", recording, cache="expert_high.calibration.json")
>>> graph = export.export(model, "expert_high", "onnx/expert_high.onnx")
>>> precision.quantize(graph.path, "onnx-int8/expert_high.onnx", format="int8", calibration=calibration)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
