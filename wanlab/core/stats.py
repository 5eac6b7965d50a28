"""Bootstrap intervals: of a mean, of ratios of means and of medians, and of means over groups.

Every interval is the 95 % percentile interval of resampled statistics, widened to hold the statistic itself. Resamples
are drawn as `scipy.stats.bootstrap(..., method="percentile")` draws them, number by number (a test compares the
two); importing `scipy.stats` takes a second, which every command that measures would pay. Grouped samples, drawn by
their weights, have no counterpart in SciPy.

One or two values have no interval: all resamples of one value are that value, and those of two say nothing of what lies
beyond them. Nor have values that are not finite, or whose statistic is not. Such an interval is unknown: None, or NaN ends
in arrays and tables, and "interval unknown" in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

LEAST = 3
"""Fewest values that have an interval or a percentile."""

RESAMPLES = 10_000
GROUPED_RESAMPLES = 1000
_AT_ONCE = 4_000_000  # drawn values, whatever the number of samples


def bootstrap_mean(values: ArrayLike, seed: int) -> tuple[float, float] | None:
    """95 % interval of a mean; None when it is unknown."""
    values = np.asarray(values, dtype=np.float64)
    if values.size < LEAST or not np.isfinite(values).all():
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        (means,) = resampled([values], _mean, np.random.default_rng(seed))
        return _known(percentile_interval(means, values.mean()))


def bootstrap_ratio(numerator: ArrayLike, denominator: ArrayLike, seed: int) -> tuple[float, float] | None:
    """95 % interval of mean(numerator) / mean(denominator) over the same cases, which are drawn in pairs.

    None when it is unknown; also with a denominator of 0.
    """
    pair = [np.asarray(side, dtype=np.float64) for side in (numerator, denominator)]
    if pair[0].size < LEAST or not all(np.isfinite(side).all() for side in pair):
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        above, below = resampled(pair, _mean, np.random.default_rng(seed))
        if not pair[1].mean() or not below.all():
            return None
        return _known(percentile_interval(above / below, pair[0].mean() / pair[1].mean()))


def bootstrap_median_ratio(
    numerator: ArrayLike, denominator: ArrayLike, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """95 % interval of median(numerator) / median(denominator) of two independent sets of samples, none negative.

    None when it is unknown; also with a median of 0.
    """
    top, bottom = (np.asarray(side, dtype=np.float64) for side in (numerator, denominator))
    if min(top.size, bottom.size) < LEAST or not np.median(top) or not np.median(bottom):
        return None
    generator = np.random.default_rng(seed)
    # A resample of a timing may have a median of 0 although the timing's own median is positive.
    least = np.finfo(np.float64).tiny
    with np.errstate(over="ignore", invalid="ignore"):
        above, below = (
            np.maximum(resampled_medians(side, generator, resamples), least) for side in (top, bottom)
        )
        return _known(percentile_interval(above / below, np.median(top) / np.median(bottom)))


def median_interval(values: ArrayLike, outside: float | Fraction = 0.05) -> tuple[float, float] | None:
    """Interval of the median of what independent values were drawn from, whatever their distribution; None when unknown.

    Its ends are two of the values: the k-th smallest and the k-th largest, with the largest k of
    2 P(Binomial(n, 1/2) < k) <= `outside`, the probability that all n values but fewer than k lie on one side of the median
    (Le Boudec, Performance Evaluation of Computer and Communication Systems, 2010, theorem 2.1).

    Args:
        outside: probability that the interval leaves the median out, at most; 6 values are the fewest for 5 %.
    """
    values = np.sort(np.asarray(values, dtype=np.float64))
    if not np.isfinite(values).all():
        return None
    # Whole numbers, because floats end at 2**1023: `beyond` of the 2**n draws have fewer than `below` values on one side.
    count, below, beyond, ways = values.size, 0, 0, 1
    allowed = Fraction(outside) * 2**count
    while below < count / 2 and 2 * (beyond + ways) <= allowed:
        beyond, ways, below = beyond + ways, ways * (count - below) // (below + 1), below + 1
    return (float(values[below - 1]), float(values[count - below])) if below else None


def interval_text(low: float | None, high: float | None, form: str = ".2f") -> str:
    """An interval in words: `"95 % interval 1.98 to 2.02"`, or `"95 % interval unknown"`.

    Args:
        low, high: its ends; None or NaN where it is unknown.
    """
    return f"95 % interval {ends_text(low, high, form)}"


def ends_text(low: float | None, high: float | None, form: str = ".2f") -> str:
    """The ends of an interval in words: `"1.98 to 2.02"`, or `"unknown"`; arguments as in `interval_text`."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return "unknown"
    return f"{low:{form}} to {high:{form}}"


def percentile(values: ArrayLike, percent: float) -> float:
    """A percentile, interpolated linearly; NaN of fewer than `LEAST` values."""
    values = np.asarray(values, dtype=np.float64)
    return float(np.percentile(values, percent)) if values.size >= LEAST else math.nan


def _known(interval: tuple[float, float]) -> tuple[float, float] | None:
    return interval if np.isfinite(interval).all() else None


def resampled(
    columns: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], np.ndarray],
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
) -> list[np.ndarray]:
    """A statistic of resampled cases, the same cases for every column: `[resamples]` each.

    Args:
        columns: of one length.
        statistic: of `[draws, cases]` over the last axis.
    """
    count = columns[0].size
    chunk = max(1, _AT_ONCE // count)
    values: list[list[np.ndarray]] = [[] for _ in columns]
    for start in range(0, resamples, chunk):
        drawn = generator.integers(0, count, (min(chunk, resamples - start), count))
        for column, parts in zip(columns, values, strict=True):
            parts.append(statistic(column[drawn]))
    return [np.concatenate(parts) for parts in values]


def resampled_medians(
    values: np.ndarray, generator: np.random.Generator, resamples: int = RESAMPLES
) -> np.ndarray:
    """Medians of resampled values: `[resamples]`."""
    return resampled([values], _median, generator, resamples)[0]


def percentile_interval(resamples: np.ndarray, value: float) -> tuple[float, float]:
    """The middle 95 % of resampled values, widened to hold the value itself; NaN among them are left out.

    Both ends are NaN where the interval is unknown: the value is not finite, or no resample is a number.
    """
    resamples = resamples[~np.isnan(resamples)]
    if not resamples.size or not np.isfinite(value):
        return math.nan, math.nan
    low, high = np.percentile(resamples, [2.5, 97.5])
    return float(min(low, value)), float(max(high, value))


def draw_weights(count: int, seed: int = 0) -> np.ndarray:
    """Bootstrap weights `[GROUPED_RESAMPLES, count]`: how often each sample was drawn, over their number."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, [1 / count] * count, size=GROUPED_RESAMPLES) / count


def draw_group_weights(groups: np.ndarray, seed: int = 0) -> np.ndarray:
    """Bootstrap weights `[GROUPED_RESAMPLES, samples]`: groups are drawn, then samples within each.

    Args:
        groups: the group of each sample.
    """
    generator = np.random.default_rng(seed)
    names = np.unique(groups)
    drawn = generator.multinomial(len(names), [1 / len(names)] * len(names), size=GROUPED_RESAMPLES)
    weights = np.zeros((GROUPED_RESAMPLES, len(groups)))
    for column, name in enumerate(names):
        inside = np.flatnonzero(groups == name)
        share = generator.multinomial(len(inside), [1 / len(inside)] * len(inside), size=GROUPED_RESAMPLES)
        weights[:, inside] = drawn[:, column : column + 1] * share / (len(names) * len(inside))
    # By the number of samples, not of groups, as the mean is.
    sizes = np.array([np.sum(groups == name) for name in groups]) / len(groups) * len(names)
    weights = weights * sizes
    return weights / weights.sum(axis=1, keepdims=True)


def weighted_interval(
    samples: np.ndarray,
    weights: np.ndarray,
    then: Callable[[np.ndarray], np.ndarray] = lambda values: values,
) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a mean over the first axis, holding the mean itself; NaN where it is unknown.

    Args:
        samples: `[samples, ...]`.
        weights: `[resamples, samples]`, from `draw_weights` or `draw_group_weights`.
        then: of the means, e.g. a square root.
    """
    flat = samples.reshape(len(samples), -1)
    if len(samples) < LEAST:
        unknown = np.full(samples.shape[1:], np.nan)
        return unknown, unknown.copy()
    low, high = np.percentile(then(weights @ flat), [2.5, 97.5], axis=0)
    value = then(flat.mean(axis=0))
    shape = samples.shape[1:]
    return np.minimum(low, value).reshape(shape), np.maximum(high, value).reshape(shape)


def _mean(draws: np.ndarray) -> np.ndarray:
    return draws.mean(axis=1)


def _median(draws: np.ndarray) -> np.ndarray:
    return np.median(draws, axis=1)
