"""Timing of calls on a device: samples, A/A control, and comparison with confidence intervals."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from wanlab.core.answer import Tile, speed_text
from wanlab.core.errors import WanlabError
from wanlab.core.stats import LEAST, bootstrap_median_ratio, interval_text, percentile
from wanlab.measure.load import Load, LoadMeter, worst
from wanlab.models.device import synchronise

NOT_DISTINGUISHABLE = "not distinguishable"
CV_LIMIT_PERCENT = 2.5  # the limit at which trtexec advises to lock the clocks


@dataclass(frozen=True)
class Samples:
    """All samples of one timing, in milliseconds, in the order in which they were taken.

    Percentiles interpolate linearly (numpy's default); those of one or two samples are unknown (NaN).
    `cv_percent` is the population standard deviation over the mean, as trtexec reports it.

    Attributes:
        label: name of the timed work.
        values_ms: every sample; finite and not negative.
        device: device of the timing, e.g. `"cpu"` or `"cuda:0 NVIDIA H200"`; empty when not known.
        clock: `"CUDA events"` or `"monotonic clock"`.
        load: load of the machine by others meanwhile; None where not known.
    """

    label: str
    values_ms: tuple[float, ...]
    device: str = ""
    clock: str = "monotonic clock"
    load: Load | None = None

    def __post_init__(self) -> None:
        values = tuple(map(_float, self.values_ms))
        if not values:
            raise WanlabError(f"timing {self.label!r} has no samples; time at least one iteration")
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise WanlabError(f"timing {self.label!r} has a sample that is negative or not finite")
        object.__setattr__(self, "values_ms", values)

    @cached_property
    def _array(self) -> np.ndarray:
        return np.asarray(self.values_ms, dtype=np.float64)

    @property
    def n(self) -> int:
        return len(self.values_ms)

    @property
    def median(self) -> float:
        return float(np.median(self._array))

    @property
    def mean(self) -> float:
        return float(np.mean(self._array))

    @property
    def min(self) -> float:
        return float(np.min(self._array))

    @property
    def max(self) -> float:
        return float(np.max(self._array))

    @property
    def p90(self) -> float:
        return percentile(self._array, 90)

    @property
    def p95(self) -> float:
        return percentile(self._array, 95)

    @property
    def p99(self) -> float:
        return percentile(self._array, 99)

    @property
    def cv_percent(self) -> float:
        mean = self.mean
        return float(np.std(self._array) / mean * 100) if mean > 0 else 0.0

    @property
    def warning(self) -> str | None:
        """Why these samples should be read with care, or None."""
        if self.load and self.load.text:
            return f"{self.load.text}: stop other work and measure again"
        if self.n < LEAST:
            samples = "one sample" if self.n == 1 else f"{self.n} samples"
            return f"{samples}: spread, percentiles and interval are unknown; take at least {LEAST}"
        if self.cv_percent > CV_LIMIT_PERCENT:
            return (
                f"CV {self.cv_percent:.1f} % is over {CV_LIMIT_PERCENT} %: "
                "lock the clocks, stop other work, or take more iterations"
            )
        return None

    def row(self) -> dict:
        """One row of a table: label, n, statistics in milliseconds (None: unknown), CV in percent, the warning or None."""
        return {
            "label": self.label,
            "n": self.n,
            "median_ms": self.median,
            "mean_ms": self.mean,
            "min_ms": self.min,
            "max_ms": self.max,
            "p90_ms": None if self.n < LEAST else self.p90,
            "p95_ms": None if self.n < LEAST else self.p95,
            "p99_ms": None if self.n < LEAST else self.p99,
            "cv_percent": self.cv_percent,
            "device": self.device,
            "clock": self.clock,
            "warning": self.warning,
        }

    def to_dict(self) -> dict:
        """The row and all samples as data for JSON; `from_dict` reads it back."""
        load = {} if self.load is None else {"load": msgspec.to_builtins(self.load)}
        return self.row() | load | {"values_ms": list(self.values_ms)}

    @classmethod
    def from_dict(cls, data: dict) -> Samples:
        load = msgspec.convert(data["load"], Load) if data.get("load") else None
        facts = (data.get("device", ""), data.get("clock", ""), load)
        return cls(data["label"], tuple(data["values_ms"]), *facts)


def _float(value: float) -> float:
    """A number of a file as a float; infinite where it is beyond any."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


STATISTICS = ("n", "median_ms", "mean_ms", "min_ms", "max_ms", "p90_ms", "p95_ms", "p99_ms", "cv_percent")


def check_statistics(data: Any, where: str) -> None:
    """Check that the statistics of a stored timing are those of its samples; anything else than a timing passes.

    Args:
        data: as `Samples.to_dict` wrote it.
        where: name of the file and line, for the message.

    Raises:
        WanlabError: a statistic is another, or a sample is negative or not finite.
    """
    if not (isinstance(data, Mapping) and isinstance(data.get("values_ms"), list) and data["values_ms"]):
        return
    values = data["values_ms"]
    if not all(isinstance(value, int | float) for value in values):
        raise WanlabError(f"{where}: values_ms holds a value that is no number")
    row = Samples(str(data.get("label", where)), tuple(values)).row()
    for name in STATISTICS:
        stored, own = data.get(name), row[name]
        if (
            isinstance(stored, int | float)
            and own is not None
            and not math.isclose(_float(stored), own, rel_tol=1e-6)
        ):
            raise WanlabError(
                f"{where}: {name} is {_float(stored):g}, that of its {row['n']} samples is {own:g}; one was edited"
            )


@dataclass(frozen=True)
class AAControl:
    """The same work measured twice, interleaved: shows how different two equal measurements can look.

    Attributes:
        ratio: median of the first over median of the second; 1 without disturbance.
        noise_percent: largest distance of the ratio's 95 % bootstrap interval from 1, in percent.
            Of fewer than 3 samples a side, which have no interval: that of the ratio of any two samples. A smaller effect
            cannot be distinguished from noise.
    """

    first: Samples
    second: Samples
    ratio: float
    noise_percent: float

    def row(self) -> dict:
        return {
            "label": self.first.label,
            "first_ms": self.first.median,
            "second_ms": self.second.median,
            "ratio": self.ratio,
            "noise_percent": self.noise_percent,
        }

    def frame(self) -> pd.DataFrame:
        """Both sides with all their statistics, one row each; columns as in `Samples.row`."""
        return pd.DataFrame([self.first.row(), self.second.row()])


@dataclass(frozen=True)
class Comparison:
    """Speed-up of a candidate over its baseline.

    Attributes:
        speedup: baseline median over candidate median; 2 means half the time.
        low, high: 95 % bootstrap interval of the speed-up; NaN when a side has fewer than 3 samples. Of calls that were
            timed until it could be told, the interval of `wanlab.measure.in_turn`.
        verdict: `"faster"`, `"slower"` or `"not distinguishable"`.
        noise_percent: noise floor that the effect was compared with.
        sampling: how many samples there are and what ended the sampling, in words; empty where their number was given.
        busy: what other work took of the machine meanwhile, in words, where it matters for a time.
    """

    baseline: str
    candidate: str
    speedup: float
    low: float
    high: float
    verdict: str
    noise_percent: float = 0.0
    baseline_ms: float = field(default=math.nan)
    candidate_ms: float = field(default=math.nan)
    sampling: str = ""
    busy: str = ""

    def row(self) -> dict:
        return {
            "baseline": self.baseline,
            "candidate": self.candidate,
            "baseline_ms": self.baseline_ms,
            "candidate_ms": self.candidate_ms,
            "speedup": self.speedup,
            "low": self.low,
            "high": self.high,
            "noise_percent": self.noise_percent,
            "verdict": self.verdict,
        } | ({"sampling": self.sampling} if self.sampling else {})

    @property
    def direction_only(self) -> bool:
        """Whether a difference was told beside so much other work that its size is that of the load, and not of the two."""
        return bool(self.busy and self.sampling) and self.verdict != NOT_DISTINGUISHABLE

    def clause(self, candidate: str, baseline: str) -> str:
        """The comparison in a clause of an answer, with these names of the two for readers; see `speed_text`."""
        return speed_text(
            self.speedup,
            self.low,
            self.high,
            candidate=candidate,
            baseline=baseline,
            same=self.verdict == NOT_DISTINGUISHABLE,
            noise_percent=self.noise_percent,
            busy=self.busy if self.direction_only else "",
        )

    def tile(self) -> Tile:
        """The key figure of an answer: the speed-up with its interval and noise, or only its direction."""
        if self.direction_only:
            return Tile("speed-up", self.verdict, f"about {self.speedup:.1f}× beside other work; not exact")
        known = f"{interval_text(self.low, self.high)}; noise {self.noise_percent:.0f} %"
        return Tile("speed-up", f"{self.speedup:.2f}×", known)

    def __str__(self) -> str:
        return verdict_sentence(
            self.verdict,
            self.speedup,
            self.low,
            self.high,
            self.noise_percent,
            candidate=self.candidate,
            baseline=self.baseline,
            sampling=self.sampling,
            busy=self.busy,
        )


def verdict_of(
    ratio: float,
    low: float = math.nan,
    high: float = math.nan,
    noise_percent: float = 0.0,
    words: tuple[str, str] = ("faster", "slower"),
) -> str:
    """Verdict on a ratio: one of two words, or `"not distinguishable"`.

    It is not distinguishable when its interval includes 1, or when the effect, max(ratio, 1 / ratio) - 1, is not above
    the noise.

    Args:
        ratio: above 1 is better. low, high: its 95 % interval; NaN where it is not known.
    """
    effect_percent = 100 * (max(ratio, 1 / ratio) - 1)
    if low <= 1 <= high or effect_percent <= noise_percent:
        return NOT_DISTINGUISHABLE
    return words[bool(ratio < 1)]


def verdict_sentence(
    verdict: str,
    ratio: float,
    low: float = math.nan,
    high: float = math.nan,
    noise_percent: float = math.nan,
    *,
    candidate: str = "",
    baseline: str = "",
    here: bool = True,
    how: str = "as fast",
    sampling: str = "",
    busy: str = "",
) -> str:
    """A verdict as a sentence: the conclusion first, then the figure, its interval and the noise.

    Args:
        verdict: from `verdict_of`. ratio, low, high, noise_percent: NaN where not known.
        candidate, baseline: names of the two sides.
        here: whether it was measured on this machine now. how: words after "2.00 times", such as "as fast".
        sampling, busy: as in `Comparison`. Where sampling went on until the ratio could be told, and other work took much of
            the machine meanwhile, only the direction is claimed.

    Returns:
        `"b is 2.00 times as fast as a (95 % interval 1.98 to 2.02, noise 3.0 %)"`, or
        `"b: no difference from a can be told from noise on this machine now (ratio 1.01, 95 % interval ...)"`.
    """
    known = [interval_text(low, high)]
    known += [f"noise {noise_percent:.1f} %"] if noise_percent == noise_percent else ["noise not known"]
    known += [sampling] if sampling else []
    if verdict == NOT_DISTINGUISHABLE:
        above = max(ratio, 1 / max(ratio, 1e-9)) - 1 > noise_percent / 100  # so noise is not the reason
        source = "so few times" if above and math.isnan(low) else "noise"
        holds = f"no difference{f' from {baseline}' if baseline else ''} can be told from {source}"
        place = (" on this machine now" if here else "") + (f", while {busy}" if busy else "")
        return (
            f"{f'{candidate}: ' if candidate else ''}{holds}{place} (ratio {ratio:.2f}, {', '.join(known)})"
        )
    if busy and sampling:  # the side that waits more for others loses more: the size is that of this load
        against = f" than {baseline}" if baseline else ""
        return (
            f"{f'{candidate} is ' if candidate else ''}{verdict}{against}; by how much cannot be told, while {busy}"
            f" (ratio {ratio:.2f}, {', '.join(known)})"
        )
    slower = "slower: " if ratio < 1 else ""
    against = f" as {baseline}" if baseline else ""
    subject = f"{candidate} is " if candidate else ""
    return f"{subject}{slower}{ratio:.2f} times {how}{against} ({', '.join(known)})"


def compare(
    baseline: Samples,
    candidate: Samples,
    noise_percent: float = 0.0,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    allow_different_devices: bool = False,
) -> Comparison:
    """Speed-up of a candidate with a 95 % interval, and whether it can be distinguished from noise.

    The interval is a percentile bootstrap (Efron and Tibshirani, 1993) of the ratio of medians.
    The verdict is `"not distinguishable"` when the interval includes 1 or when the effect,
    max(speedup, 1 / speedup) - 1, is not above `noise_percent`; also when the interval is unknown.

    Args:
        noise_percent: `AAControl.noise_percent` of the baseline.
        resamples, seed: number of bootstrap samples and seed; the same seed gives the same interval.
        allow_different_devices: allow a comparison of timings from different devices.

    Raises:
        WanlabError: timings from different devices, a negative noise, or a timing of 0 ms.
    """
    if noise_percent < 0:
        raise WanlabError(f"noise_percent is {noise_percent}; give the A/A noise, 0 or more")
    if (
        not allow_different_devices
        and baseline.device
        and candidate.device
        and baseline.device != candidate.device
    ):
        raise WanlabError(
            f"{baseline.label!r} was timed on {baseline.device} and {candidate.label!r} on "
            f"{candidate.device}; time both on one device or pass allow_different_devices=True"
        )
    speedup, low, high = ratio_of_medians(baseline, candidate, resamples=resamples, seed=seed)
    verdict = NOT_DISTINGUISHABLE if math.isnan(low) else verdict_of(speedup, low, high, noise_percent)
    return Comparison(
        baseline.label,
        candidate.label,
        speedup,
        low,
        high,
        verdict,
        noise_percent,
        baseline.median,
        candidate.median,
        busy=worst((baseline.load, candidate.load)).text,
    )


def ratio_of_medians(
    top: Samples, bottom: Samples, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of medians and its 95 % bootstrap interval, which always contains the ratio; NaN where it is unknown."""
    if top.median <= 0 or bottom.median <= 0:
        raise WanlabError(
            f"{(top if top.median <= 0 else bottom).label!r} took 0 ms, below the clock's "
            "resolution; time more work per call"
        )
    ratio = top.median / bottom.median
    interval = bootstrap_median_ratio(top.values_ms, bottom.values_ms, seed, resamples)
    return ratio, *(interval or (math.nan, math.nan))


def time_ms(
    fn: Callable[[], object],
    *,
    warmup: int = 1,
    iterations: int = 5,
    device=None,
    progress: bool = True,
    label: str = "",
) -> Samples:
    """Time a call; every sample is kept, warm-up calls are not.

    On a CUDA device each call lies between two CUDA events. Elsewhere a monotonic clock is used;
    when this process already uses CUDA, the device is synchronised around each call.

    Args:
        fn: called without arguments; its result is dropped.
        warmup: calls before the first sample.
        iterations: number of samples, at least 1.
        device: `torch.device`, `"cuda"`, `"cpu"`, or None for the clock with synchronisation.
        progress: show a progress bar (between the samples, never inside one).
        label: name in tables; the function's own name when empty.

    Raises:
        WanlabError: no iterations, negative warm-up, or a CUDA device that this machine lacks.
    """
    check_counts(warmup, iterations)
    label = label or getattr(fn, "__name__", type(fn).__name__)
    clock = Clock(device)
    values = [clock.sample(fn) for _ in bar(range(-warmup, iterations), label=label, progress=progress)]
    return Samples(label, tuple(values[warmup:]), *clock.facts())


def aa_control(
    fn: Callable[[], object],
    *,
    warmup: int = 1,
    iterations: int = 5,
    device=None,
    progress: bool = True,
    label: str = "",
) -> AAControl:
    """Measure the same work as two series, to get the noise floor of comparisons.

    Samples alternate as A A' A' A A A' A' A ..., so that a slow drift affects both series equally.
    Arguments and errors as in `time_ms`; `iterations` is per side.
    """
    check_counts(warmup, iterations)
    label = label or getattr(fn, "__name__", type(fn).__name__)
    clock = Clock(device)
    for _ in range(warmup):
        clock.sample(fn)
    sides: tuple[list[float], list[float]] = ([], [])
    for pair in bar(range(iterations), label=f"{label} A/A", progress=progress):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            sides[side].append(clock.sample(fn))
    facts = clock.facts()
    first, second = (
        Samples(name, tuple(values), *facts)
        for name, values in zip((label, f"{label} (again)"), sides, strict=True)
    )
    return control_of(first, second)


def control_of(first: Samples, second: Samples) -> AAControl:
    """An A/A control from two series of the same work."""
    ratio, low, high = ratio_of_medians(first, second)
    if math.isnan(low):  # no interval: what was observed is how far any two samples lie from each other
        low, high = first.min / second.max, first.max / max(second.min, sys.float_info.min)
    return AAControl(first, second, ratio, 100 * max(abs(ratio - 1), abs(low - 1), abs(high - 1)))


def check_counts(warmup: int, iterations: int) -> None:
    if iterations < 1:
        raise WanlabError(f"iterations is {iterations}; take at least 1 sample")
    if warmup < 0:
        raise WanlabError(f"warmup is {warmup}; give 0 or more")


def bar(items: Iterable, *, label: str, progress: bool) -> Iterable:
    if not progress:
        return items
    return tqdm(items, desc=label or "timing", leave=False, unit="call")


class Clock:
    """Clock for single calls on one device; from its creation on it also measures the load of the machine."""

    def __init__(self, device) -> None:
        self.torch = sys.modules.get("torch")
        self.device = None
        self.device_name, self.name = "cpu", "monotonic clock"
        if device is not None:
            import torch  # imported late: tables and comparisons of samples do not need it

            self.torch, self.device = torch, torch.device(device)
            self.device_name = self.device.type
            if self.device.type == "cuda":
                if not torch.cuda.is_available():
                    raise WanlabError("device is cuda but PyTorch sees no GPU; pass device='cpu'")
                index = torch.cuda.current_device() if self.device.index is None else self.device.index
                self.device = torch.device("cuda", index)
                self.device_name = f"cuda:{index} {torch.cuda.get_device_name(index)}"
                self.name = "CUDA events"
        elif self.torch is not None and self.torch.cuda.is_initialized():
            index = self.torch.cuda.current_device()
            self.device_name = f"cuda:{index} {self.torch.cuda.get_device_name(index)}"
        self._meter = LoadMeter(gpu=self.device_name.startswith("cuda"))

    def facts(self) -> tuple[str, str, Load]:
        """Device, clock and load, as `Samples` takes them; called when the last sample was taken."""
        return self.device_name, self.name, self._meter.load()

    def sample(self, fn: Callable[[], object]) -> float:
        if self.name == "CUDA events":
            with self.torch.cuda.device(self.device):
                start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.torch.cuda.synchronize()
                start.record()
                fn()
                end.record()
                end.synchronize()
                return start.elapsed_time(end)
        synchronise(self.device)
        begin = time.perf_counter_ns()
        fn()
        synchronise(self.device)
        return (time.perf_counter_ns() - begin) / 1e6
