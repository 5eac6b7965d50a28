"""What the standard parameters of a notebook may be, checked before it starts: models, sizes, plans, counts.

The notebook itself refuses the same values, with the same words, when it comes to use them. Here nothing is loaded and no
network is asked, so a model that would have to be looked for on the hub passes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from wanlab import models
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.paths import locate
from wanlab.precision.plan import load_plan
from wanlab.runs.result import SIZE, UNCHANGED

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("pretrained", "random")
DEVICE = re.compile(r"auto|cpu|(cuda|mps)(:\d+)?")
LEAST = {"steps": 0, "iterations": 1, "rounds": 1, "warmup": 0, "cases": 0, "batch": 1}
"""Parameter -> its least value; some notebooks take 0 steps or cases as none."""
ABOVE_0 = ("precision", "limit_s")
ONE_OF = {"dtype": DTYPES, "weights": WEIGHTS}


def faults(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Parameters that a notebook would refuse: names of those that a fault is of, and the reason in words.

    Args:
        values: all parameters; those of a notebook without `model` and `device` are its own, and are not looked at.
    """
    if not (isinstance(values.get("model"), str) and "device" in values):
        return
    for name, options in ONE_OF.items():
        value = values.get(name)
        if isinstance(value, str) and value not in options:
            yield (name,), f"{name} is {', '.join(options)}, not {value!r}{did_you_mean(value, options)}"
    if isinstance(values["device"], str) and not DEVICE.fullmatch(values["device"]):
        yield ("device",), f'device is "auto", "cpu", "cuda" or "cuda:1", not {values["device"]!r}'
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and (name in LEAST and value < LEAST[name]):
            yield (name,), f"{name} is {value}; give {LEAST[name]} or more"
        if number and name in ABOVE_0 and not (value > 0 and math.isfinite(value)):
            yield (name,), f"{name} is {value}; give a number above 0"
    for name in ("plan", "plans"):
        for plan in values[name] if isinstance(values.get(name), list) else [values.get(name)]:
            if isinstance(plan, str) and plan not in UNCHANGED and (words := _refused_plan(plan)):
                yield (name,), words
    yield from _of_model(values["model"], *(values.get(name) for name in SIZE))


def _of_model(model: str, *size: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    found = _model(model)
    if isinstance(found, str):
        yield ("model",), found
    elif found is not None and all(value is None or isinstance(value, int) for value in size):
        defaults = found.defaults
        own = (defaults.height, defaults.width, defaults.frames)
        asked = [ours if value is None else value for value, ours in zip(size, own, strict=True)]
        try:
            models.latent_shape(found, *asked)
        except WanlabError as error:
            yield SIZE, str(error)


@functools.cache
def _refused_plan(plan: str) -> str:
    try:
        load_plan(plan)
    except WanlabError as error:
        return str(error)
    return ""


@functools.cache
def _model(text: str) -> Any:
    """Facts of a model; its refusal in words; None where only the hub knows it."""
    try:
        base, _ = models.split_model(text)
        if "/" in base and not locate(base).exists() and base not in models.names():
            return None
        return models.get(text)
    except WanlabError as error:
        return str(error)
