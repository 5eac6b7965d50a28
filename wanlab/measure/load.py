"""Load of the machine while something is timed: what others took of its processors, and their clock."""

from __future__ import annotations

import os
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import msgspec
import psutil

OTHERS_PERCENT = 10.0
"""Share of the processors from which other processes are named. Services of an idle machine stay below 5 %; above 10 % the
slowest thread of a product waits for about as long, more than the 3 % from which a difference counts."""

STOLEN_PERCENT = 2.0
"""Share of the processors that the host of a virtual machine took, from which it is named. It goes into the time whole, so
it is to be below the 3 % from which a difference counts."""

SLOWED_PERCENT = 10.0
"""Difference of the processors' clock between two timings of a run from which it is named. Between equal loads it moves
by some percent of itself."""

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
        frequency_mhz: clock of the fastest processor at the end of the timing, when it still is at work; of several timings
            the lowest. None where the system does not tell.
        fastest_mhz: of several timings the highest clock.
    """

    others_percent: float | None = None
    stolen_percent: float | None = None
    gpu_processes: int | None = None
    frequency_mhz: float | None = None
    fastest_mhz: float | None = None

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
        if self.slowed_percent >= SLOWED_PERCENT:
            parts += [f"the processors ran at {self.frequency_mhz:.0f} to {self.fastest_mhz:.0f} MHz"]
        return " and ".join(parts)

    @property
    def slowed_percent(self) -> float:
        """How far the lowest clock of several timings lies below the highest, in percent; 0 where it is not known."""
        if not (self.frequency_mhz and self.fastest_mhz):
            return 0.0
        return 100 * (1 - self.frequency_mhz / self.fastest_mhz)


def worst(loads: Iterable[Load | None]) -> Load:
    """The largest of each part, and the lowest clock; parts that are not known count as none."""
    known = [load for load in loads if load]

    def each(*names: str):
        return [value for load in known for name in names if (value := getattr(load, name)) is not None]

    parts = {
        name: max(each(name), default=None) for name in ("others_percent", "stolen_percent", "gpu_processes")
    }
    clocks = each("frequency_mhz", "fastest_mhz")
    return Load(**parts, frequency_mhz=min(clocks, default=None), fastest_mhz=max(clocks, default=None))


class _Counts(NamedTuple):
    """Seconds since boot, summed over the processors: used by anyone, stolen, used by this process; and the clock."""

    used: float
    stolen: float
    own: float
    clock: float
    processors: int


class LoadMeter:
    """Measures the load from its creation to `load()`; both take about a millisecond, but for `GPU_AGAIN_S`."""

    def __init__(self, gpu: bool = False):
        self._gpu = gpu
        self._begin = _count()

    def load(self, timing: bool = True) -> Load:
        """The load until now.

        Args:
            timing: whether it was that of a timing, which is kept for `taken`.
        """
        end, begin = _count(), self._begin
        if end.clock - begin.clock < SHORTEST_S:
            older = (each for each in reversed(_kept) if end.clock - each.clock >= SHORTEST_S)
            begin = next(older, _kept[0])
        found = _between(begin, end) if end.clock > begin.clock else Load()
        found = msgspec.structs.replace(found, frequency_mhz=_frequency_mhz())
        if self._gpu:
            found = msgspec.structs.replace(found, gpu_processes=_asked_gpu_processes())
        if timing:
            _taken.append(found)
        return found


@contextmanager
def metered(device: object) -> Iterator[None]:
    """Keep the load of a stretch that is timed by other means than `time_ms`, such as recorded calls or a profile.

    Args:
        device: where the work runs; on a GPU other processes that hold it count too.
    """
    meter = LoadMeter(gpu=str(device).startswith("cuda"))
    yield
    meter.load()


def taken() -> Load:
    """The worst load of all timings of this process since `forget`."""
    return worst(_taken)


def withdraw(loads: Iterable[Load | None]) -> None:
    """Leave out the loads of timings that a later one has replaced: their times stand in no answer."""
    gone = {id(load) for load in loads}
    _taken[:] = [load for load in _taken if id(load) not in gone]


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


def _frequency_mhz() -> float | None:
    """Clock of the fastest processor now: the one that works, where others have slept. None where it is not known."""
    try:
        clocks = [each.current for each in psutil.cpu_freq(percpu=True) or ()]
    except (AttributeError, OSError, NotImplementedError, ValueError):
        return None
    return round(max(clocks), 1) if clocks and max(clocks) > 0 else None


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
