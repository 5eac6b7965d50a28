"""Configurations: which engine runs each component, by which precision plan, as data; and a model opened in one.

>>> import wanlab
>>> from wanlab import models
>>> model = models.load("wan-nano")
>>> fast = wanlab.configuration.configure(model, "onnxruntime-int8-weights", "outputs/configured", frames=5)
>>> print(fast.label, fast.effect)
>>> video = fast.model.generate("photograph.png", "the camera pans to the left", frames=5)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
