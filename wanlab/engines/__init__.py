"""Engines: what runs one component of a model, named tensors in, named tensors out.

>>> from wanlab import engines
>>> engines.parity(model, "expert_high", "onnx/wan-nano/expert_high.onnx")
>>> fast = engines.use(model, engines.load_engines("onnx/wan-nano"))
>>> fast.generate(image, prompt)

`registry.ENGINES` is the table of all kinds of engines; a new one is a row there, or a file of yours that calls `register`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
