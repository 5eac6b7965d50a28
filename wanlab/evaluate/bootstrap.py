"""The interval of a mean over cases."""

from __future__ import annotations

RESAMPLES = 10_000


def bootstrap_mean(values, seed: int) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of a mean; contains it. None when it cannot be had."""
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    if values.size < 2 or not np.isfinite(values).all():
        return None
    generator = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // values.size)
    means = np.concatenate(
        [
            values[generator.integers(0, values.size, (min(chunk, RESAMPLES - start), values.size))].mean(
                axis=1
            )
            for start in range(0, RESAMPLES, chunk)
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    mean = values.mean()
    return float(min(low, mean)), float(max(high, mean))
