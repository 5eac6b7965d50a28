"""Measurements: times, memory, stages and environment, with all samples and the machine that they were taken on.

>>> from wanlab import measure
>>> samples = measure.time_ms(lambda: model(x), iterations=20)
>>> with measure.stages(model) as recorder:
...     generation = model.generate(image, prompt)
>>> recorder.breakdown(generation.wall_ms)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
