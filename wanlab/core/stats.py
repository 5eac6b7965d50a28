"""Bootstrap intervals of a mean and of the ratio of two means."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000


def bootstrap_mean(values: ArrayLike, seed: int) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of a mean; contains the mean. None with fewer than two values or a NaN."""
    values = np.asarray(values, dtype=np.float64)
    if values.size < 2 or not np.isfinite(values).all():
        return None
    return _interval(_resampled(values, seed=seed)[0], values.mean())


def bootstrap_ratio(numerator: ArrayLike, denominator: ArrayLike, seed: int) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of mean(numerator) / mean(denominator) over the same cases.

    Cases are resampled in pairs. None with fewer than two cases, a value that is not finite, or a denominator of 0.
    """
    pair = [np.asarray(side, dtype=np.float64) for side in (numerator, denominator)]
    if pair[0].size < 2 or not all(np.isfinite(side).all() for side in pair):
        return None
    above, below = _resampled(*pair, seed=seed)
    if not pair[1].mean() or not below.all():
        return None
    return _interval(above / below, pair[0].mean() / pair[1].mean())


def _resampled(*columns: np.ndarray, seed: int) -> list[np.ndarray]:
    """Means of resampled cases, the same cases for every column: `[RESAMPLES]` each."""
    generator, count = np.random.default_rng(seed), columns[0].size
    chunk = max(1, 4_000_000 // count)
    means: list[list] = [[] for _ in columns]
    for start in range(0, RESAMPLES, chunk):
        drawn = generator.integers(0, count, (min(chunk, RESAMPLES - start), count))
        for column, parts in zip(columns, means, strict=True):
            parts.append(column[drawn].mean(axis=1))
    return [np.concatenate(parts) for parts in means]


def _interval(resampled: np.ndarray, value: float) -> tuple[float, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(min(low, value)), float(max(high, value))
