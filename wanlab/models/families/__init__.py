"""Families of models, one file each: what differs between Wan, LTX-Video, CogVideoX, HunyuanVideo, Mochi and others.

A new family is one file here with a subclass of `base.Family`; every subclass in this folder is found.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import cache

from wanlab.models.families.base import Family


@cache
def families() -> tuple[Family, ...]:
    """One of each family, in the order of their files' names."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found, waiting = [], [Family]
    while waiting:
        kinds = waiting.pop().__subclasses__()
        found += kinds
        waiting += kinds
    return tuple(kind() for kind in sorted(found, key=lambda kind: (kind.__module__, kind.__name__)))


def family_of(pipeline_class: str) -> Family:
    """The family of a pipeline class of diffusers; one that answers by what can be seen where none is known."""
    return _matching("pipelines", pipeline_class)


def family_of_network(network_class: str) -> Family:
    """The family of a denoiser's class of diffusers; as `family_of` where none is known."""
    return _matching("denoisers", network_class)


def _matching(attribute: str, class_name: str) -> Family:
    for family in families():
        if any(re.fullmatch(pattern, class_name) for pattern in getattr(family, attribute)):
            return family
    return Family()
