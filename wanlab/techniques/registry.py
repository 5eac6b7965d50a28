"""Table of all techniques.

A technique of your own is one Python file that ends in `register(YourTechnique)`. If the environment variable
`WANLAB_TECHNIQUES` names the file (several are separated by commas), every command, notebook and child process knows it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.plugins import run_files
from wanlab.engines.registry import kind_of_label
from wanlab.techniques.attention_kernel import AttentionKernel
from wanlab.techniques.batched_guidance import BatchedGuidance
from wanlab.techniques.db_cache import DBCache
from wanlab.techniques.easy_cache import EasyCache
from wanlab.techniques.fp8_attention import Fp8Attention
from wanlab.techniques.fused_qkv import FusedQkv
from wanlab.techniques.guidance_gate import GuidanceGate
from wanlab.techniques.guidance_interval import GuidanceInterval
from wanlab.techniques.half_size_start import HalfSizeStart
from wanlab.techniques.mag_cache import MagCache
from wanlab.techniques.solver import Solver
from wanlab.techniques.sparse_attention import SparseAttention
from wanlab.techniques.technique import Technique
from wanlab.techniques.text_keys import TextKeys
from wanlab.techniques.two_timesteps import TwoTimesteps
from wanlab.techniques.vae_channels_last import VaeChannelsLast

VARIABLE = "WANLAB_TECHNIQUES"

TECHNIQUES: dict[str, type[Technique]] = {}


def register(technique: type[Technique]) -> None:
    """Add a technique to the table.

    Raises:
        WanlabError: its name is taken.
    """
    if technique.name in TECHNIQUES:
        raise WanlabError(f"there is a technique {technique.name!r} already; give yours another name")
    TECHNIQUES[technique.name] = technique


for _technique in (
    TextKeys,
    FusedQkv,
    AttentionKernel,
    Fp8Attention,
    SparseAttention,
    TwoTimesteps,
    VaeChannelsLast,
    Solver,
    DBCache,
    BatchedGuidance,
    EasyCache,
    MagCache,
    GuidanceGate,
    GuidanceInterval,
    HalfSizeStart,
):
    register(_technique)


def technique_of(name: str) -> type[Technique]:
    """A technique by its name.

    Raises:
        WanlabError: there is none of this name.
    """
    if name not in TECHNIQUES:
        raise WanlabError(
            f"no technique {name!r}{did_you_mean(name, TECHNIQUES)}; there are {', '.join(TECHNIQUES)}"
        )
    return TECHNIQUES[name]


def settings_of(name: str, given: Mapping[str, Any] | None) -> msgspec.Struct:
    """The settings of a technique, those that are not given with their defaults.

    Raises:
        WanlabError: an unknown technique or setting, or a value of another type or out of its range.
    """
    kind = technique_of(name).Settings
    known = kind.__struct_fields__
    for setting in given or {}:
        if setting not in known:
            choices = f"it has {', '.join(known)}" if known else "it has none"
            raise WanlabError(f"{name} has no setting {setting!r}{did_you_mean(setting, known)}; {choices}")
    try:
        return msgspec.convert(dict(given or {}), kind)
    except msgspec.ValidationError as error:
        raise WanlabError(f"{name}: {error}") from None


def made(chosen: Mapping[str, Mapping[str, Any] | None]) -> list[Technique]:
    """Techniques with their settings, in the order in which they are applied.

    Raises:
        WanlabError: as `settings_of`, or two that cannot go together.
    """
    techniques = [technique_of(name)(settings_of(name, given)) for name, given in chosen.items()]
    for name, other, reason in conflicts(chosen):
        raise WanlabError(f"{name} and {other} cannot go together: {reason}; leave one out")
    return sorted(techniques, key=lambda technique: technique.order)


def barred(technique: type[Technique] | Technique, engines: Mapping[str, str]) -> tuple[str, str, str] | None:
    """The first component whose engine a technique does not work on, that engine, and why; None where it works on all.

    Args:
        engines: component -> name of its engine, or its label in tables.
    """
    for component, label in engines.items():
        kind = kind_of_label(label)
        if component in technique.touches and kind is not None and kind.name in technique.not_on:
            return component, kind.name, technique.not_on[kind.name]
    return None


def conflicts(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """Pairs among some techniques that cannot go together, each once, with the reason."""
    names = list(names)
    return [
        (name, other, technique_of(name).not_with.get(other) or technique_of(other).not_with[name])
        for index, name in enumerate(names)
        for other in names[index + 1 :]
        if other in technique_of(name).not_with or name in technique_of(other).not_with
    ]


run_files(os.environ.get(VARIABLE, ""), VARIABLE, "wanlab_technique")
