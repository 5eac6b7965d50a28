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
    for family in families():
        if any(re.fullmatch(pattern, pipeline_class) for pattern in family.pipelines):
            return family
    return Family()


def family_of_network(network_class: str) -> Family:
    """The family of a denoiser's class of diffusers; one that answers by what can be seen where none is known."""
    for family in families():
        if any(re.fullmatch(pattern, network_class) for pattern in family.denoisers):
            return family
    return Family()
