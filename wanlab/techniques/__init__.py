"""Techniques: switches that make a model faster or smaller, each with its price, its bound and its proof.

>>> switched = techniques.switch_on(model, {"easy_cache": {"threshold": 0.1}, "guidance_gate": {}})
>>> switched.model.generate(image, prompt)
>>> switched.proofs()

`registry.TECHNIQUES` is the table of all techniques; a new one is one file, which calls `register`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
