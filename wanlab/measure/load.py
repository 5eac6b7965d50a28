"""Load of the machine while something is timed: what other processes and the host took of its processors."""

from __future__ import annotations

import os
import subprocess
import time
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
import psutil

OTHERS_PERCENT = 10.0
"""Share of the processors from which other processes are named. Services of an idle machine stay below 5 %; above 10 % the
slowest thread of a product waits for about as long, more than the 3 % from which a difference counts."""

STOLEN_PERCENT = 2.0
"""Share of the processors that the host of a virtual machine took, from which it is named. It goes into the time whole, so
it is to be below the 3 % from which a difference counts."""

GPU_AGAIN_S = 10.0
"""How long an answer of the driver's tool counts: the tool takes longer than many a timing."""

SHORTEST_S = 0.5
"""The kernel counts in steps of 10 ms: a shorter timing has the load of the half second before its end."""


class Load(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Load of the machine during a timing, without this process.

    Attributes:
        others_percent: share of the processors that this process may use, used by other processes; None where unknown.
        stolen_percent: share of them that the host gave to other virtual machines.
        gpu_processes: other processes with work on a GPU; None where the driver does not tell.
    """

    others_percent: float | None = None
    stolen_percent: float | None = None
    gpu_processes: int | None = None

    @property
    def text(self) -> str:
        """What matters for a time: `"other processes used 55 % of the processors"`; empty where nothing does."""
        parts = []
        if (self.others_percent or 0) >= OTHERS_PERCENT:
            parts += [f"other processes used {self.others_percent:.0f} % of the processors"]
        if (self.stolen_percent or 0) >= STOLEN_PERCENT:
            parts += [f"the host took {self.stolen_percent:.0f} % of the processors away"]
        if self.gpu_processes:
            parts += [f"{self.gpu_processes} other process{'es' * (self.gpu_processes > 1)} held the GPU"]
        return " and ".join(parts)


def worst(loads: Iterable[Load | None]) -> Load:
    """The largest of each part; parts that are not known count as none."""
    known = [load for load in loads if load]

    def largest(name: str):
        return max((value for load in known if (value := getattr(load, name)) is not None), default=None)

    return Load(**{name: largest(name) for name in Load.__struct_fields__})


class _Counts(NamedTuple):
    """Seconds since boot, summed over the processors: used by anyone, stolen, used by this process; and the clock."""

    used: float
    stolen: float
    own: float
    clock: float
    processors: int


class LoadMeter:
    """Measures the load from its creation to `load()`; both take less than a millisecond, but for `GPU_AGAIN_S`."""

    def __init__(self, gpu: bool = False):
        self._gpu = gpu
        self._begin = _count()

    def load(self) -> Load:
        """The load until now; it is also kept for `taken`."""
        end, begin = _count(), self._begin
        if end.clock - begin.clock < SHORTEST_S:
            older = (each for each in reversed(_kept) if end.clock - each.clock >= SHORTEST_S)
            begin = next(older, _kept[0])
        found = _between(begin, end) if end.clock > begin.clock else Load()
        if self._gpu:
            found = msgspec.structs.replace(found, gpu_processes=_asked_gpu_processes())
        _taken.append(found)
        return found


def taken() -> Load:
    """The worst load of all timings of this process since `forget`."""
    return worst(_taken)


def forget() -> None:
    """Begin anew, as at the start of a run."""
    _taken.clear()
    _asked.clear()


def _between(begin: _Counts, end: _Counts) -> Load:
    whole = (end.clock - begin.clock) * end.processors
    used, stolen, own = (getattr(end, name) - getattr(begin, name) for name in ("used", "stolen", "own"))
    others, stolen = (round(min(100.0, max(0.0, 100 * part / whole)), 1) for part in (used - own, stolen))
    return Load(others_percent=others, stolen_percent=stolen)


def _count() -> _Counts:
    times = psutil.cpu_times(percpu=True)
    affinity = getattr(os, "sched_getaffinity", None)
    mine = affinity(0) if affinity else range(len(times))
    each = [times[index] for index in mine if index < len(times)] or times
    names = ("user", "nice", "system", "irq", "softirq")
    used = sum(getattr(one, name, 0.0) for one in each for name in names)
    own = os.times()
    counts = _Counts(
        used,
        sum(getattr(one, "steal", 0.0) for one in each),
        own.user + own.system + own.children_user + own.children_system,
        time.monotonic(),
        len(each),
    )
    if not _kept or counts.clock - _kept[-1].clock > SHORTEST_S / 4:
        _kept.append(counts)
    return counts


def _asked_gpu_processes() -> int | None:
    if not _asked or time.monotonic() - _asked[0][0] > GPU_AGAIN_S:
        _asked[:] = [(time.monotonic(), _gpu_processes())]
    return _asked[0][1]


def _gpu_processes() -> int | None:
    """Other processes that compute on the GPUs, from the driver's tool; None where it does not list this one."""
    command = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = {line.strip() for line in answer.splitlines() if line.strip()}
    return len(found) - 1 if str(os.getpid()) in found else None  # a container sees the ids of its host


_taken: list[Load] = []
_asked: list[tuple[float, int | None]] = []  # when the driver's tool was asked last, and its answer
_kept: deque[_Counts] = deque(maxlen=64)
_count()
