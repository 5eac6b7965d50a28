"""The answer of a comparison of quality, in every tier."""

from __future__ import annotations

import numpy as np
import pytest
from support.answers import faults

from wanlab import evaluate


def pair(amount: float, cases: int = 3, floor: float | None = 0.002):
    """Divergence of noisy copies of random clips."""
    generator = np.random.default_rng(0)
    clips = [generator.random((2, 32, 32, 3)).astype(np.float32) for _ in range(cases)]
    near = [
        [np.clip(c + generator.normal(0, size, c.shape), 0, 1).astype(np.float32) for c in clips]
        for size in (amount, floor or 0.0)
    ]
    floors = {"other kernel": list(zip(clips, near[1], strict=True))} if floor else None
    changed = near[0] if amount else clips
    return evaluate.divergence(clips, changed, floors, progress=False)


@pytest.mark.parametrize(
    ("tier", "percent", "spread", "said"),
    [
        ("exact", 0.0, 0.0, "Rounding weights to FP8 gives the same files: quality loss below 0.01 %."),
        (
            "near-lossless",
            0.2,
            0.1,
            "the same videos to the eye: quality loss +0.20 % (95 % interval +0.10 to +0.30)",
        ),
        ("faithful", 1.0, 0.5, "keeps content and motion"),
        ("perceptual", 1.0, 0.5, "other videos, as good as the original's"),
        (
            "undecided",
            3.0,
            2.0,
            "Whether rounding weights to FP8 is good enough cannot be told yet: quality loss +3.00 %",
        ),
        ("degraded", 9.0, 1.0, "gives worse videos: quality loss +9.00 %"),
    ],
)
def test_every_tier_is_a_plain_sentence(tier, percent, spread, said):
    each = [1 + (percent + shift) / 100 for shift in (-spread, 0, spread)]
    loss = evaluate.quality_loss(each, [1.0] * 3)
    answer = evaluate.quality_answer("float8_e4m3fn", evaluate.Tier(tier, "", ""), loss, pair(0.1))
    assert faults(answer) == []
    assert said in answer.headline
    assert answer.tiles[0].title == "quality loss"
    assert answer.next is not None


def test_without_truths_the_loss_is_unknown_and_the_distance_is_told():
    for amount, tier, said in ((0.0, "exact", "every pixel"), (0.1, "degraded", "far from the original's")):
        found = pair(amount, floor=None)
        unknown = evaluate.QualityLoss.unknown()
        answer = evaluate.quality_answer("the given file", evaluate.Tier(tier, "", ""), unknown, found)
        assert faults(answer) == []
        assert said in answer.headline
        assert answer.tiles[0].value == "unknown"
        assert "pictures whose true videos are known" in answer.next.why


def test_two_cases_have_no_interval():
    loss = evaluate.quality_loss([1.02, 1.01], [1.0, 1.0])
    answer = evaluate.quality_answer("onnxruntime", evaluate.Tier("undecided", "", ""), loss, pair(0.1, 2))
    assert "from 2 cases, too few to say how sure that is" in answer.headline
    assert answer.next.parameters == {"cases": 8}
