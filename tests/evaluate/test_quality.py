from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanlab import evaluate
from wanlab.core.errors import WanlabError
from wanlab.core.stats import bootstrap_ratio

scores = st.floats(1e-3, 2.0)
cases = st.lists(st.tuples(scores, scores), min_size=1, max_size=50)
QUICK = settings(max_examples=40, deadline=None)


def clip(seed=0):
    coarse = np.random.default_rng(seed).random((2, 4, 4, 3))
    return np.kron(coarse, np.ones((1, 8, 8, 1))).astype(np.float32) * 0.8 + 0.1


def near(video, amount, seed=0):
    noise = np.random.default_rng(seed).normal(0, amount, video.shape)
    return np.clip(video + noise, 0, 1).astype(np.float32)


@QUICK
@given(cases)
def test_quality_loss_is_the_mean_of_relative_worsening(pairs):
    q, o = zip(*pairs, strict=True)
    loss = evaluate.quality_loss(q, o)
    assert loss.percent == pytest.approx(np.mean([100 * (a - b) / b for a, b in pairs]), rel=1e-9, abs=1e-9)
    assert loss.cases == len(pairs)
    if len(pairs) < 3:
        assert "95 % interval unknown" in str(loss)
        assert loss.low_percent is None
        assert loss.within() == "undecided"
    else:
        assert loss.low_percent <= loss.percent <= loss.high_percent
    assert evaluate.quality_loss(q, o) == loss  # seeded


@QUICK
@given(st.lists(scores, min_size=3, max_size=20), st.floats(-0.9, 3))
def test_uniform_worsening_has_no_uncertainty(original, factor):
    loss = evaluate.quality_loss([value * (1 + factor) for value in original], original)
    assert loss.percent == pytest.approx(100 * factor, abs=1e-6)
    assert loss.high_percent - loss.low_percent == pytest.approx(0, abs=1e-6)


def test_it_is_the_mean_of_ratios_not_the_ratio_of_means():
    assert evaluate.quality_loss([0.2, 1.0], [0.1, 1.0]).percent == pytest.approx(50)


def test_interval_narrows_and_covers():
    generator = np.random.default_rng(0)
    original = generator.uniform(0.1, 0.3, 400)
    optimized = original * (1.02 + generator.normal(0, 0.05, 400))
    few, many = (evaluate.quality_loss(optimized[:n], original[:n]) for n in (20, 400))
    assert many.high_percent - many.low_percent < few.high_percent - few.low_percent
    assert many.low_percent < 2 < many.high_percent
    assert many.within(3) == "yes"
    assert many.within(0.5) == "no"
    assert many.within(many.percent) == "undecided"


def test_without_ground_truth_it_is_unknown():
    for arguments in ((None, [0.1]), ([0.1], None), (None, None)):
        loss = evaluate.quality_loss(*arguments)
        assert loss == evaluate.QualityLoss.unknown()
    assert str(loss) == "unknown: no ground truth"
    assert loss.within() == "unknown"
    assert loss.row()["quality_loss_percent"] is None
    assert not loss.known


def test_it_says_how_sure_it_is_and_with_what():
    truth = clip()
    original = [evaluate.compare_videos(truth, near(truth, 0.05, i), progress=False) for i in range(2)]
    worse = [evaluate.compare_videos(truth, near(truth, 0.10, i), progress=False) for i in range(2)]
    loss = evaluate.quality_loss(worse, original)
    assert loss.percent > 10
    assert loss.backbone == "stlpips-alex"
    assert "2 cases, stlpips-alex" in str(loss)
    assert "95 % interval" in str(loss)
    assert "1 case)" in str(evaluate.quality_loss(0.2, 0.1))


@pytest.mark.parametrize(
    ("q", "o", "message"),
    [
        ([0.1], [0.1, 0.2], "1 optimised and 2 original"),
        ([], [], "no case"),
        ([0.1, 0.1], [0.2, 0.0], "case 1 is 0"),
        ([0.1, -0.1], [0.2, 0.2], "optimised LPIPS of case 1 is -0.1"),
        ([0.1, 0.1], [math.nan, 0.2], "original LPIPS of case 0 is nan"),
    ],
)
def test_scores_that_cannot_be_are_refused(q, o, message):
    with pytest.raises(WanlabError, match=message):
        evaluate.quality_loss(q, o)


def test_divergence_is_read_against_its_loosest_floor():
    original = clip()
    floors = {"run twice": (original, near(original, 0.01)), "other kernel": (original, near(original, 0.03))}
    small = evaluate.divergence(original, near(original, 0.02, 1), floors, progress=False)
    large = evaluate.divergence(original, near(original, 0.2, 1), floors, progress=False)
    assert list(small.frame["metric"]) == ["lpips", "psnr", "ssim"]
    assert set(small.frame["floor_name"]) == {"other kernel"}
    assert set(small.frame["verdict"]) == {"within floor"}
    assert set(large.frame["verdict"]) == {"above floor"}
    assert (large.frame["ratio_to_noise_floor"] > 2).all()
    expected = evaluate.compare_videos(*floors["other kernel"], progress=False)
    assert small.frame["floor"].tolist() == expected.summary["mean"].tolist()
    assert "more than the noise floor" in str(large)
    assert "other kernel" in str(large)
    assert "stlpips-alex" in str(large)


def test_divergence_over_cases_has_an_interval():
    originals = [clip(seed) for seed in range(3)]
    optimized = [near(video, 0.02 * (1 + i), i) for i, video in enumerate(originals)]
    result = evaluate.divergence(originals, optimized, metrics="lpips", progress=False)
    row = result.frame.iloc[0]
    means = [score.mean() for score in result.scores]
    assert row["cases"] == 3
    assert row["mean"] == pytest.approx(np.mean(means))
    assert row["worst"] == max(means)
    assert row["low"] < row["mean"] < row["high"]
    assert result.verdict() == "no floor"
    with pytest.raises(WanlabError, match="no 'psnr'"):
        result.verdict("psnr")


def test_an_interval_that_reaches_the_floor_is_within_it():
    original = clip()
    optimized = [near(original, sigma, 1) for sigma in (0.01, 0.05, 0.05)]
    floor = [(original, near(original, 0.02, 2))]
    result = evaluate.divergence([original] * 3, optimized, floor, metrics="psnr", progress=False)
    row = result.frame.iloc[0]
    assert row["ratio_to_noise_floor"] > 1
    assert row["low"] < row["floor"] < row["high"]
    assert row["verdict"] == "within floor"
    assert str(result).startswith("the outputs differ by no more than the noise floor")
    assert "times the floor" in str(result)


def test_the_bound_in_words():
    assert evaluate.QualityLoss.unknown().bound == "unknown"
    assert evaluate.quality_loss(0.11, 0.1).bound == "+10.00 %, from 1 case without an interval"
    assert evaluate.quality_loss([0.09, 0.08, 0.08], [0.1] * 3).bound == "below 0.01 %"
    assert evaluate.quality_loss([0.11] * 2, [0.1] * 2).bound == "+10.00 %, from 2 cases without an interval"
    assert evaluate.quality_loss([0.11] * 3, [0.1] * 3).bound == "at most 10.00 %"


def test_a_loss_that_rounds_to_nothing_has_no_minus():
    assert "-0.00" not in str(evaluate.quality_loss([0.1, 0.2], [0.1 + 1e-9, 0.2 + 1e-9]))


def test_divergence_of_equal_videos_from_a_floor_of_zero():
    video = clip()
    exact = evaluate.divergence(video, video.copy(), floor=(video, video), progress=False)
    assert set(exact.frame["verdict"]) == {"identical"}
    assert set(exact.frame["ratio_to_noise_floor"]) == {0}
    off = evaluate.divergence(video, near(video, 0.001), floor=[(video, video)], progress=False)
    assert set(off.frame["verdict"]) == {"above floor"}
    assert set(off.frame["ratio_to_noise_floor"]) == {math.inf}


def test_divergence_refuses_cases_that_do_not_pair():
    video = clip()
    for original, optimized, message in (
        ([video, video], [video], "2 original and 1 optimised"),
        ([video], video, "1 original and 1 optimised"),
        ([], [], "no video"),
    ):
        with pytest.raises(WanlabError, match=message):
            evaluate.divergence(original, optimized, progress=False)
    for floor in (video, []):
        with pytest.raises(WanlabError, match="floor"):
            evaluate.divergence(video, video, floor, progress=False)


def test_ratio_of_means_over_paired_cases():
    generator = np.random.default_rng(0)
    base = generator.uniform(0.1, 0.4, 60)
    low, high = bootstrap_ratio(1.1 * base, base, seed=0)
    assert low == pytest.approx(1.1)
    assert high == pytest.approx(1.1)
    noisy = base * generator.uniform(0.9, 1.3, 60)
    low, high = bootstrap_ratio(noisy, base, seed=0)
    assert low < noisy.mean() / base.mean() < high
    assert 1.03 < low < high < 1.2
    assert bootstrap_ratio([1.0], [1.0], seed=0) is None
    assert bootstrap_ratio([1.0, 2.0], [0.0, 0.0], seed=0) is None
