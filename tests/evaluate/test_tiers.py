from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanlab import evaluate
from wanlab.core.errors import WanlabError
from wanlab.evaluate import quality as tiers
from wanlab.evaluate.scores import Scores, long_table

NAMES = [rule.name for rule in evaluate.TIERS]


def video(seed=0):
    coarse = np.random.default_rng(seed).random((2, 4, 4, 3))
    return np.kron(coarse, np.ones((1, 8, 8, 1))).astype(np.float32) * 0.8 + 0.1


def near(original, amount, seed=0):
    noise = np.random.default_rng(seed).normal(0, amount, original.shape)
    return np.clip(original + noise, 0, 1).astype(np.float32)


def apart(amount, floor=0.002, cases=3):
    originals = [video(seed) for seed in range(cases)]
    changed = [near(each, amount, seed) if amount else each for seed, each in enumerate(originals)]
    floors = {"other kernel": [(each, near(each, floor, 9)) for each in originals]} if floor else None
    return evaluate.divergence(originals, changed, floors, progress=False)


def scored(lpips, psnr):
    table = long_table({("lpips", "stlpips-alex"): [lpips], ("psnr", "-"): [psnr]})
    return Scores(table, "original", "optimized", 1, 32, 32)


def with_scores(lpips, psnr, floor=None):
    """A divergence of two equal cases with given scores, so that its intervals have no width."""
    rows = [
        {
            "metric": metric, "backbone": backbone, "cases": 2, "mean": value, "low": value, "high": value,
            "worst": value, "floor": floor if metric == "lpips" and floor else math.nan,
            "ratio_to_noise_floor": math.nan, "verdict": "above floor",
        }
        for metric, backbone, value in (("lpips", "stlpips-alex", lpips), ("psnr", "-", psnr))
    ]  # fmt: skip
    floors = {"other kernel": (scored(floor, 60.0),) * 2} if floor else {}
    return evaluate.Divergence(pd.DataFrame(rows), (scored(lpips, psnr),) * 2, floors)


def loss(percent, spread=0.0):
    each = [1 + (percent + shift) / 100 for shift in (-spread, 0, spread)]
    return evaluate.quality_loss(each, [1.0] * 3)


def test_each_tier_on_videos():
    assert evaluate.tier(apart(0)).name == "exact"
    assert evaluate.tier(apart(0.001)).name == "numeric"
    over_40_db = evaluate.tier(apart(0.005))
    assert over_40_db.name == "numeric"
    assert "worst PSNR" in over_40_db.why
    rough = evaluate.tier(apart(0.2))
    assert rough.name == "degraded"
    assert "LPIPS" in rough.why
    assert rough.row() == {"tier": "degraded", "rule": rough.rule, "why": rough.why}
    assert str(rough).startswith("degraded (")


@pytest.mark.parametrize(
    ("lpips", "psnr", "percent", "spread", "expected"),
    [
        (0.04, 35, None, 0, "near-lossless"),
        (0.04, 35, 0.5, 0, "near-lossless"),
        (0.04, 35, 2.0, 0, "faithful"),  # LPIPS would do, the loss does not
        (0.04, 29, None, 0, "faithful"),
        (0.08, 20, 2.5, 0, "faithful"),
        (0.30, 15, 2.5, 0, "perceptual"),
        (0.04, 35, 2.0, 4, "undecided"),
        (0.30, 15, 5.0, 0, "degraded"),
        (0.04, 35, 5.0, 0, "degraded"),
        (0.30, 15, None, 0, "degraded"),
    ],
)
def test_each_rule_holds_its_limit(lpips, psnr, percent, spread, expected):
    found = evaluate.tier(with_scores(lpips, psnr), None if percent is None else loss(percent, spread))
    assert found.name == expected
    assert found.rule == evaluate.TIERS[NAMES.index(expected)].rule


def test_without_truth_another_video_is_held_against_its_floor():
    unknown = evaluate.QualityLoss.unknown()
    assert evaluate.tier(with_scores(0.3, 15, floor=0.2), unknown).name == "perceptual"
    assert evaluate.tier(with_scores(0.3, 15, floor=0.1), unknown).name == "degraded"


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-4, 1), st.floats(1e-4, 1), st.floats(10, 60), st.floats(-5, 10), st.booleans())
def test_a_smaller_difference_is_never_of_a_worse_tier(one, two, psnr, percent, truth):
    known = loss(percent) if truth else None
    better, worse = (NAMES.index(evaluate.tier(with_scores(x, psnr), known).name) for x in sorted((one, two)))
    assert better <= worse


def test_numeric_is_within_reach_of_the_floor_in_every_metric():
    inside = evaluate.tier(apart(0.02, floor=0.05))
    assert inside.name == "numeric"
    assert "no metric reaches further" in inside.why
    assert evaluate.tier(apart(0.02, floor=0.01)).name != "numeric"
    assert "no floor is given" in evaluate.tier(apart(0.02, floor=None)).why


def test_what_is_not_measured_decides_nothing():
    original = video()
    only = evaluate.divergence(original, near(original, 0.1), metrics="lpips", progress=False)
    with pytest.raises(WanlabError, match="needs psnr; measured: lpips"):
        evaluate.tier(only)


def test_rules_name_their_limits():
    for rule, limit in zip(evaluate.TIERS[1:4], ("40 dB", "0.05", "0.1"), strict=True):
        assert limit in rule.rule
    assert NAMES == ["exact", "numeric", "near-lossless", "faithful", "perceptual", "undecided", "degraded"]
    assert tiers.LIMIT_PERCENT == 3
