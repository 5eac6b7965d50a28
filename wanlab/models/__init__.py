"""Models: their facts, how they are loaded, and how they generate videos.

>>> spec = models.get("wan-nano")
>>> models.latent_shape(spec, 128, 192, 17)
>>> model = models.load(spec)
>>> model.generate("photo.png", "the camera pans left").video   # [T, H, W, 3]
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
