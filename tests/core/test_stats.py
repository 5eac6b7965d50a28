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


@pytest.mark.parametrize("count", [3, 5, 72, 700])
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
    top, bottom = (1.0, 2.0, 4.0), (1.0, 1.25, 1.5)
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


FEW = [[], [8.22], [8.22, 8.22]]
ODD = [[1.0, 2.0, float("nan")], [1.0, 2.0, float("inf")], [1e308, 1e308, 1e308]]


@pytest.mark.parametrize("values", FEW + ODD)
def test_one_or_two_values_and_values_without_a_mean_have_no_interval(values):
    assert stats.bootstrap_mean(values, 0) is None
    assert stats.bootstrap_ratio(values, values, 0) is None
    if len(values) < 3:
        assert stats.bootstrap_median_ratio(values or [1.0], [1.0, 2.0, 3.0], 0) is None
        assert np.isnan(stats.percentile(values, 99))


def test_zeros_have_an_interval_of_their_mean_and_none_of_their_ratio():
    zeros = [0.0] * 5
    assert stats.bootstrap_mean(zeros, 0) == (0, 0)
    assert stats.bootstrap_ratio(zeros, zeros, 0) is None
    assert stats.bootstrap_median_ratio(zeros, zeros, 0) is None
    assert stats.bootstrap_median_ratio([1e308] * 5, [1e-308] * 5, 0) is None  # beyond the largest float


def test_grouped_samples_have_no_interval_when_they_are_one_or_two():
    for count in (1, 2):
        low, high = stats.weighted_interval(np.full((count, 2), 4.0), stats.draw_weights(count), np.sqrt)
        assert np.isnan([low, high]).all()
    unknown = stats.percentile_interval(np.full(5, np.nan), 1.0)
    assert np.isnan(unknown).all()


def test_an_unknown_interval_is_said_in_words():
    assert stats.interval_text(1.98, 2.0236) == "95 % interval 1.98 to 2.02"
    for low, high in ((None, None), (float("nan"), 2.0)):
        assert stats.interval_text(low, high) == "95 % interval unknown"
        assert stats.ends_text(low, high) == "unknown"
