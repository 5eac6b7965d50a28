"""Calls timed in turn: for a number of rounds, or until the ratio of their times can be told.

To look at a ratio again and again, and to stop when it looks good, calls equal work different far more often than the
interval says. Here sampling stops at the width of the interval alone, never at its place, and is looked at only after 6, 12,
24, ... pairs. The interval of each look leaves the truth out with its own share of the 5 %, and the shares add up to 5 %: so
the interval at which sampling stopped holds the truth in 95 % of all cases, whatever made it stop, also the time limit.
Sources: group-sequential looks with a spent error, Lan and DeMets, Biometrika 70, 1983; intervals that hold at every look,
Jennison and Turnbull, JRSS B 51, 1989. The shares simply add up (Bonferroni), so that nothing is assumed of how the looks
depend on one another.

A pair is one call of each, directly after one another: a drift of the machine and other work meet both. The interval is that
of the median of the pairs' ratios (`core.stats.median_interval`), which holds for any distribution, so also for times that a
busy machine now and then doubles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from tqdm.auto import tqdm

from wanlab.core.errors import WanlabError
from wanlab.core.stats import median_interval
from wanlab.measure.timing import (
    NOT_DISTINGUISHABLE,
    AAControl,
    Clock,
    Comparison,
    Samples,
    check_counts,
    compare,
    control_of,
    verdict_of,
)

ERROR = Fraction(1, 20)
"""Share of cases in which an interval may leave the truth out, over all looks together."""

FIRST_PAIRS = 6
"""Pairs of the first look; fewer have no interval of 95 %."""

FIRST_SHARE = Fraction(5, 8)
"""Part of `ERROR` that the first look has: what the interval from the smallest to the largest of 6 ratios needs."""

LIMIT_S = 60.0
"""Time limit of a sampling that is given none."""


def share(look: int) -> Fraction:
    """Part of `ERROR` of a look, from 1: the first has 5/8, each later one half of what is left: they add up to it."""
    if look == 1:
        return ERROR * FIRST_SHARE
    return ERROR * (1 - FIRST_SHARE) / 2 ** (look - 1)


@dataclass(frozen=True)
class Ended:
    """How a sampling ended.

    Attributes:
        by: `"precision"`, `"time limit"`, or `"rounds"` where their number was given.
        pairs: samples of each call. seconds: time that all took. look: number of the last look, from 1.
        precision: width that was asked for, in percent; None with a number of rounds.
        limit_s: time limit.
    """

    by: str
    pairs: int
    seconds: float
    look: int = 1
    precision: float | None = None
    limit_s: float = LIMIT_S

    def text(self, known_percent: float) -> str:
        """`"12 pairs in 30 s, until known to 5 %"`, for a ratio that is known to `known_percent`; empty by rounds."""
        if self.by == "rounds":
            return ""
        if self.by == "precision":
            return f"{self.pairs} pairs in {self.seconds:.0f} s, until known to {self.precision:g} %"
        known = f"known to {known_percent:.0f} %" if math.isfinite(known_percent) else "too few to know it"
        return (
            f"{self.pairs} pairs in {self.seconds:.0f} s, ended by the limit of {self.limit_s:g} s: {known},"
            f" asked {self.precision:g} %"
        )


@dataclass(frozen=True, eq=False)
class InTurn:
    """Several calls, timed in turn.

    Attributes:
        samples: label -> all its samples; those of one place are a pair with those of the others at that place.
        controls: label -> A/A control: its samples of the two directions of each round.
        ended: what ended the sampling.
        comparisons: later label -> its speed-up over the first.
    """

    samples: dict[str, Samples]
    controls: dict[str, AAControl]
    ended: Ended
    comparisons: dict[str, Comparison]

    @property
    def text(self) -> str:
        """How often they were timed and what ended that, in a sentence; of several ratios the one known least."""
        return timed_text(self.comparisons.values())


def timed_text(comparisons: Iterable[Comparison]) -> str:
    """`"Timed in turn: 12 pairs in 30 s, until known to 5 %."`, of the comparison known least; "" of a number of rounds."""
    told = [each for each in comparisons if each.sampling]
    least = max(told, key=lambda each: known_percent(each.speedup, each.low, each.high), default=None)
    return f"Timed in turn: {least.sampling}." if least else ""


def pair_interval(top: tuple[float, ...], bottom: tuple[float, ...], look: int = 1) -> tuple[float, float]:
    """Interval of the ratio of two calls at a look, from the ratios of their pairs; it holds the ratio of their medians.

    NaN where it is unknown: fewer than 6 pairs, or a time of 0.
    """
    above, below = np.asarray(top), np.asarray(bottom)
    interval = median_interval(above / below, share(look)) if below.all() and above.all() else None
    if interval is None:
        return math.nan, math.nan
    ratio = float(np.median(above) / np.median(below))
    return min(interval[0], ratio), max(interval[1], ratio)


def known_percent(ratio: float, low: float, high: float) -> float:
    """How far the ends of an interval lie from its ratio, the larger of the two, in percent; infinite where unknown."""
    return math.inf if math.isnan(low) or low <= 0 else 100 * (max(high / ratio, ratio / low) - 1)


def take_in_turn(
    labels: list[str],
    sample: Callable[[str], float],
    *,
    rounds: int,
    precision: float | None = None,
    limit_s: float | None = None,
    progress: bool = True,
) -> tuple[dict[tuple[str, int], list[float]], Ended]:
    """Samples of several calls in rounds; a round takes each in the given order and then in its reverse.

    Args:
        labels: the calls; the first is the baseline of the ratios.
        sample: makes one call and returns its time in milliseconds.
        rounds: number of rounds; with `precision` the fewest.
        precision: sampling goes on until every ratio is known to so many percent; None takes the rounds only.
        limit_s: no round begins after `rounds` that would end later than this; 60 s if None.

    Returns:
        (label, half) -> samples, and how it ended. The halves are the two directions, exchanged every round.

    Raises:
        WanlabError: a precision or limit that is not above 0, or a limit without a precision.
    """
    for name, value in (("precision", precision), ("limit_s", limit_s)):
        if value is not None and not value > 0:
            raise WanlabError(f"{name} is {value}; give a number above 0")
    if limit_s is not None and precision is None:
        raise WanlabError("limit_s ends a sampling that has a precision; give precision, in percent, too")
    halves: dict[tuple[str, int], list[float]] = {(label, half): [] for label in labels for half in (0, 1)}
    limit = LIMIT_S if limit_s is None else limit_s
    look, next_pairs = 1, FIRST_PAIRS
    while next_pairs < 2 * rounds:
        next_pairs *= 2
    begun, done = time.monotonic(), 0
    with tqdm(desc="in turn", unit="round", leave=False, disable=not progress) as bar:
        bar.total = rounds if precision is None else None
        while True:
            for place, order in enumerate((labels, labels[::-1])):
                for label in order:
                    halves[label, (place + done) % 2].append(sample(label))
            done, seconds = done + 1, time.monotonic() - begun
            bar.update()
            if done < rounds:
                continue
            if precision is None:
                return halves, Ended("rounds", 2 * done, seconds)
            late = seconds * (done + 1) / done > limit
            if not late and 2 * done < next_pairs:
                continue
            # A look at the limit, between two looks, has the share of the later one.
            narrow = _widest(labels, halves, look) <= precision
            if narrow or late:
                by = "precision" if narrow else "time limit"
                return halves, Ended(by, 2 * done, seconds, look, precision, limit)
            look, next_pairs = look + 1, 2 * next_pairs


def _widest(labels: list[str], halves: Mapping[tuple[str, int], list[float]], look: int) -> float:
    """The largest `known_percent` of all calls against the first."""
    values = {label: (*halves[label, 0], *halves[label, 1]) for label in labels}
    base = values[labels[0]]
    widths = [
        known_percent(
            float(np.median(base) / np.median(values[label])), *pair_interval(base, values[label], look)
        )
        for label in labels[1:]
        if np.median(values[label]) > 0
    ]
    return max(widths, default=0.0)


def in_turn(samples: dict[str, Samples], controls: dict[str, AAControl], ended: Ended) -> InTurn:
    """The comparisons of samples that were taken in turn; those of a number of rounds are `timing.compare`."""
    base, *others = samples
    noise = controls[base].noise_percent
    comparisons = {label: compared(samples[base], samples[label], noise, ended) for label in others}
    return InTurn(samples, controls, ended, comparisons)


def compared(base: Samples, other: Samples, noise_percent: float, ended: Ended) -> Comparison:
    """The comparison of two calls that were timed in turn, with the interval that holds for how it ended."""
    found = compare(base, other, noise_percent, allow_different_devices=True)
    if ended.precision is None:
        return found
    low, high = pair_interval(base.values_ms, other.values_ms, ended.look)
    told = NOT_DISTINGUISHABLE if math.isnan(low) else verdict_of(found.speedup, low, high, noise_percent)
    words = ended.text(known_percent(found.speedup, low, high))
    return replace(found, low=low, high=high, verdict=told, sampling=words)


def until_told(
    calls: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 1,
    rounds: int = FIRST_PAIRS // 2,
    precision: float | None = 5.0,
    limit_s: float | None = None,
    device=None,
    progress: bool = True,
) -> InTurn:
    """Time several calls in turn until the ratio of each to the first is known to `precision` percent, or time is up.

    A round runs every call once in the given order and once in the reverse order, so that a drift of the machine affects all
    of them equally. How the interval stays true although its width ends the sampling: see this module.

    Args:
        calls: label -> call without arguments; the first is the baseline.
        warmup: warm-up calls of each, before the first round.
        rounds: fewest rounds, at least 1; each gives two samples per call. Exactly so many where `precision` is None.
        precision, limit_s: see `take_in_turn`.

    Raises:
        WanlabError: no calls, no rounds, or an error of `time_ms` or `take_in_turn`.
    """
    if not calls:
        raise WanlabError("nothing to time; give at least one call")
    check_counts(warmup, rounds)
    clock = Clock(device)
    for call in calls.values():
        for _ in range(warmup):
            clock.sample(call)
    halves, ended = take_in_turn(
        list(calls),
        lambda label: clock.sample(calls[label]),
        rounds=rounds,
        precision=precision,
        limit_s=limit_s,
        progress=progress,
    )
    facts = clock.facts()
    samples = {label: Samples(label, (*halves[label, 0], *halves[label, 1]), *facts) for label in calls}
    controls = {
        label: control_of(
            Samples(label, tuple(halves[label, 0]), *facts),
            Samples(f"{label} (again)", tuple(halves[label, 1]), *facts),
        )
        for label in calls
    }
    return in_turn(samples, controls, ended)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 1,
    rounds: int = 5,
    device=None,
    progress: bool = True,
) -> tuple[dict[str, Samples], AAControl]:
    """Time several calls in turn for a number of rounds; arguments and errors as in `until_told`.

    Returns:
        label -> samples, and the A/A control of the first call.
    """
    timed = until_told(calls, warmup=warmup, rounds=rounds, precision=None, device=device, progress=progress)
    return timed.samples, next(iter(timed.controls.values()))
