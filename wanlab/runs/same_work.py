"""What may be compared: the only rule of which rows did the same work on the same machine with the same software."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.measure.load import worst
from wanlab.runs.result import SIZE, Machine, Result, Work

OF_VIDEO = ("steps", "guided", "seed")
OF_WORK = ("model", "weights", "lora", "component", *SIZE, "batch", *OF_VIDEO)
OF_GPU = ("gpu", "sm_clock_max_mhz", "power_limit_w")
OF_CPU = ("cpu", "threads", "cores")
OF_MACHINE = (*OF_GPU, *OF_CPU, "memory_gib")
SETUP = ("weights_files", "torch", "engine_version", "driver", "wanlab", "cases")
"""What a row depends on beside its work and machine: files of the model, versions, wanlab's code, and the cases."""

FACTS = (*OF_WORK, "dtype", *OF_MACHINE)
"""Fields of work and machine that must be equal for two rows to be compared."""

UNKNOWN_ALLOWED = ("weights", "dtype", "cores", "memory_gib", *SETUP)
"""Fields that are no difference where one row does not have them, such as rows of an older wanlab."""

MEMORY_TOLERANCE = 0.005
"""The memory of one machine differs by less between its starts."""

ALIASES = {
    "lora": ("lora", "weights_files"),
    "clocks": ("sm_clock_max_mhz", "power_limit_w"),
    "machine": (*OF_MACHINE, "driver"),
    "software": ("torch", "engine_version", "driver", "wanlab"),
    "guidance_scale": ("guided",),
    "size": ("height", "width"),
    "resolution": ("height", "width"),
}
"""Other words that `allow` takes, with the fields that each allows."""


class Comparable(Protocol):
    """What `differences` compares: a `Result`, a run, or all repeats of one configuration."""

    @property
    def work(self) -> Work: ...

    @property
    def machine(self) -> Machine | None: ...

    @property
    def dtype(self) -> str | None: ...

    @property
    def setup(self) -> Mapping[str, Any]: ...


def differences(one: Comparable, other: Comparable, allow: Iterable[str] = ()) -> list[tuple[str, Any, Any]]:
    """Fields in which two rows differ so that they must not be compared: field, value of `one`, value of `other`.

    This is the only rule of what may be compared. The fields are model, weights and the contents of their files, LoRAs,
    component, size, frames, batch, steps, guidance, seed, dtype of the model, the held-out cases; the machine with its
    clocks or threads, cores and memory; PyTorch, the driver, the version of an engine that both use, and wanlab's code.

    Args:
        allow: fields that may differ.

    Raises:
        WanlabError: an unknown field in `allow`.
    """
    ignored = fields(allow)
    if one.work.component != other.work.component and None in (one.work.component, other.work.component):
        ignored |= set(OF_VIDEO)  # one call has none of them
    values, others = _facts(one), _facts(other)
    if values["gpu"] != others["gpu"]:  # then clocks and threads add nothing
        ignored |= {*OF_MACHINE[1:], "driver"}
    if _package(values) != _package(others):  # two engines: each has its own version
        ignored |= {"engine_version"}
    ignored |= {name for name in UNKNOWN_ALLOWED if None in (values[name], others[name])}
    names = [
        name
        for name in (*FACTS, *SETUP)
        if name not in ignored and not _equal(name, values[name], others[name])
    ]
    return [(name, values[name], others[name]) for name in names]


def same_work(one: Comparable, other: Comparable, allow: Iterable[str] = ()) -> bool:
    """Whether two rows may be compared; see `differences`."""
    return not differences(one, other, allow)


def fields(allow: Iterable[str]) -> set[str]:
    """Fields that the words of `allow` name.

    Raises:
        WanlabError: an unknown word.
    """
    names: set[str] = set()
    known = dict.fromkeys((*FACTS, *SETUP, *ALIASES))
    for word in [allow] if isinstance(allow, str) else allow:
        if word not in known:
            raise WanlabError(
                f"nothing is refused for {word!r}{did_you_mean(word, known)}; allow takes {', '.join(known)}"
            )
        names |= set(ALIASES.get(word, (word,)))
    return names


def load_text(results: Iterable[Result | None]) -> str:
    """The worst load under which rows were measured, where it matters for a time; else ""."""
    return worst(result.load for result in results if result).text


def _equal(name: str, value: Any, other: Any) -> bool:
    if name == "memory_gib" and None not in (value, other):
        return math.isclose(value, other, rel_tol=MEMORY_TOLERANCE)
    return value == other


def _package(values: Mapping[str, Any]) -> str:
    return str(values["engine_version"] or "").partition(" ")[0]


def _facts(row: Comparable) -> dict[str, Any]:
    machine = row.machine or Machine()
    values = {name: getattr(row.work, name) for name in OF_WORK} | {"dtype": row.dtype}
    values |= {name: getattr(machine, name) for name in OF_MACHINE}
    values |= {name: row.setup.get(name) for name in SETUP}
    return values | ({name: None for name in OF_CPU} if machine.gpu else {"driver": None})
