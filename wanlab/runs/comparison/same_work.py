"""Whether two configurations did the same work on the same machine: what a latency can be held against."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from wanlab.errors import WanlabError, did_you_mean

WORK = ("model", "weights", "height", "width", "frames", "steps", "guided", "seed")
ON_GPU = ("gpu", "sm_clock_max_mhz", "power_limit_w")
ON_CPU = ("cpu", "threads")
MEANT = {
    "clocks": ("sm_clock_max_mhz", "power_limit_w"),
    "machine": ("gpu", "sm_clock_max_mhz", "power_limit_w", "cpu", "threads"),
    "guidance_scale": ("guided",),
    "size": ("height", "width"),
    "resolution": ("height", "width"),
}
"""Words for several fields, or for what a field comes from."""


def work_of(metrics: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What was done, resolved: the `work` record where there is one, else parameters and the model's defaults.

    Fields that neither knows are None.
    """
    recorded = metrics.get("work")
    recorded = recorded if isinstance(recorded, Mapping) else {}
    if all(name in recorded for name in WORK):
        return {name: recorded[name] for name in WORK}
    told = {name: value for name, value in parameters.items() if value is not None}
    known = _defaults(str(told["model"])) | told if "model" in told else told
    guidance = known.get("guidance_scale")
    known = {"guided": None if not isinstance(guidance, int | float) else guidance > 1} | known
    return {name: recorded[name] if name in recorded else known.get(name) for name in WORK}


def machine_of(environment: Mapping[str, Any], device: str = "") -> dict[str, Any]:
    """What it ran on: GPU with its clock and power limits, or processor and threads.

    Args:
        environment: of run.json. device: that the samples were taken on; a machine with a GPU may have used its CPU.
    """
    gpu = environment.get("gpu")
    if gpu and not str(device).startswith("cpu"):
        facts = gpu if isinstance(gpu, Mapping) else {"name": gpu}
        return {"gpu": facts.get("name")} | {name: facts.get(name) for name in ON_GPU[1:]}
    return {"gpu": None} | {name: environment.get(name) for name in ON_CPU}


def differences(
    work: Mapping[str, Any], baseline: Mapping[str, Any], allow: Iterable[str] = ()
) -> list[tuple[str, Any, Any]]:
    """Fields in which something differs from the baseline: field, its value, the baseline's.

    Args:
        work, baseline: of `work_of` and `machine_of` together.
        allow: fields that may differ.

    Raises:
        WanlabError: an unknown field in `allow`.
    """
    allowed = fields(allow)
    names = [name for name in (*WORK, *ON_GPU, *ON_CPU) if name in work or name in baseline]
    if work.get("gpu") != baseline.get("gpu"):  # clocks and threads of different machines say nothing more
        names = [name for name in names if name not in (*ON_GPU[1:], *ON_CPU)]
    found = [(name, work.get(name), baseline.get(name)) for name in names if name not in allowed]
    return [(name, mine, theirs) for name, mine, theirs in found if mine != theirs]


def fields(allow: Iterable[str]) -> set[str]:
    """Fields that words of `allow` mean.

    Raises:
        WanlabError: an unknown word.
    """
    known = (*WORK, *ON_GPU, *ON_CPU)
    found: set[str] = set()
    for word in [allow] if isinstance(allow, str) else allow:
        if word not in known and word not in MEANT:
            raise WanlabError(
                f"nothing is refused for {word!r}{did_you_mean(word, (*known, *MEANT))}; allow takes"
                f" {', '.join((*known, *MEANT))}"
            )
        found |= set(MEANT.get(word, (word,)))
    return found


@functools.cache
def _defaults(model: str) -> dict[str, Any]:
    from wanlab import models

    try:
        defaults = models.get(model).defaults if model in models.names() else None
    except WanlabError:
        return {}
    names = ("height", "width", "frames", "steps", "guidance_scale")
    return {name: getattr(defaults, name) for name in names} if defaults else {}
