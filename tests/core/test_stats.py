"""Bootstrap intervals: drawn as SciPy draws them, and holding the value itself."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from wanlab.core import stats


def of_scipy(values, statistic, seed, resamples=stats.RESAMPLES):
    """SciPy's percentile interval, from the same number of values at a time."""
    result = bootstrap(
        (np.asarray(values),),
        statistic,
        n_resamples=resamples,
        batch=max(1, 4_000_000 // len(values)),
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return tuple(result.confidence_interval), result.bootstrap_distribution


@pytest.mark.parametrize("count", [2, 5, 72, 700])
def test_resamples_are_those_of_scipy_number_by_number(count):
    generator = np.random.default_rng(count)
    above, below = generator.random(count) + 1, generator.random(count) + 1
    assert stats.bootstrap_mean(above, 3) == pytest.approx(of_scipy(above, np.mean, 3)[0], rel=1e-14)

    def ratio(cases, axis):
        return above[cases].mean(axis=axis) / below[cases].mean(axis=axis)

    expected, _ = of_scipy(np.arange(count), ratio, 4)
    assert stats.bootstrap_ratio(above, below, 4) == pytest.approx(expected, rel=1e-14)
    generator = np.random.default_rng(5)
    first = stats.resampled_medians(above, generator, 2000)
    assert np.array_equal(first, of_scipy(above, np.median, 5, 2000)[1])


def test_the_ratio_of_medians_draws_one_side_after_the_other():
    top, bottom = (1.0, 2.0, 4.0), (1.0, 1.5)
    generator = np.random.default_rng(0)
    medians = [
        np.median(np.asarray(side)[generator.integers(0, len(side), (500, len(side)))], axis=1)
        for side in (top, bottom)
    ]
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    assert stats.bootstrap_median_ratio(top, bottom, 0, 500) == (min(low, 1.6), max(high, 1.6))


def test_weights_of_groups_are_those_of_samples_when_there_is_one_sample_each():
    samples = np.random.default_rng(0).random((6, 2))
    weights = stats.draw_group_weights(np.arange(6), seed=1)
    assert weights.shape == (stats.GROUPED_RESAMPLES, 6)
    assert np.allclose(weights.sum(axis=1), 1)
    assert np.allclose(weights, stats.draw_weights(6, seed=1))
    low, high = stats.weighted_interval(samples, weights)
    assert (low < samples.mean(axis=0)).all()
    assert (high > samples.mean(axis=0)).all()


def test_one_sample_is_its_own_interval():
    low, high = stats.weighted_interval(np.array([[4.0, 9.0]]), stats.draw_weights(1), np.sqrt)
    assert low.tolist() == high.tolist() == [2.0, 3.0]


@pytest.mark.parametrize("values", [[1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_a_mean_without_an_interval_has_none(values):
    assert stats.bootstrap_mean(values, 0) is None
    assert stats.bootstrap_ratio(values, values, 0) is None
