"""Diagnosis: profiles of a generation, read as tables that show where its time and memory went.

>>> from wanlab import diagnose
>>> trace = diagnose.read_trace(diagnose.capture(model, image, prompt, folder))
>>> flame = diagnose.cpu_flame(trace)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
