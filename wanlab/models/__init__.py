"""Models: their facts, their weights, and the videos they make.

spec = get("wan-nano")
latent_shape(spec, 128, 192, 17)
model = load(spec)
model.generate("photo.png", "the camera pans left").video   # [T, H, W, 3]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attention import other_attention
    from .flops import facts
    from .generate import Generation, Model
    from .loading import load, load_times
    from .registry import get, names
    from .report import LoadReport
    from .rounding import round_weights
    from .shapes import LatentShape, latent_shape, nearest_size
    from .spec import Defaults, ModelSpec, Part

__all__ = [
    "Defaults",
    "Generation",
    "LatentShape",
    "LoadReport",
    "Model",
    "ModelSpec",
    "Part",
    "facts",
    "get",
    "latent_shape",
    "load",
    "load_times",
    "names",
    "nearest_size",
    "other_attention",
    "round_weights",
]

_HOMES = {
    "Defaults": "spec",
    "Generation": "generate",
    "LatentShape": "shapes",
    "LoadReport": "report",
    "Model": "generate",
    "ModelSpec": "spec",
    "Part": "spec",
    "facts": "flops",
    "get": "registry",
    "latent_shape": "shapes",
    "load": "loading",
    "load_times": "loading",
    "names": "registry",
    "nearest_size": "shapes",
    "other_attention": "attention",
    "round_weights": "rounding",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
