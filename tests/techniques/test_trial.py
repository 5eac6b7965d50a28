"""Techniques tried out on the same cases, and the answer that follows from it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wanlab import heldout, models, plots, techniques
from wanlab.core.errors import WanlabError
from wanlab.evaluate.loss import QualityLoss
from wanlab.techniques.answers import cache_answer, skipped_steps

SIZE = {"height": 64, "width": 64, "frames": 5, "steps": 10}
VARIANTS = {
    "threshold 0.5": {"easy_cache": {"threshold": 0.5}},
    "threshold 1e-09": {"easy_cache": {"threshold": 1e-9}},
    "gate and keys": {"guidance_gate": {}, "text_keys": {}},
}


@pytest.fixture(scope="module")
def trial():
    model = models.load("wan-nano", device="cpu")
    asked, truths = heldout.ask(model, heldout.load_cases("selection", 3), **SIZE)
    return techniques.try_out(model, VARIANTS, asked, truths, rounds=1, precision=None, progress=False)


def test_a_row_per_variant_says_what_it_did(trial):
    frame = trial.frame().set_index("variant")
    assert list(frame.index) == list(VARIANTS)
    assert list(frame["tier"]) == ["lossy"] * 3
    assert list(frame["did_what_it_says"]) == [True, False, True]
    assert frame.loc["threshold 0.5", "skipped_percent"] > 30
    assert frame.loc["threshold 1e-09", "skipped_percent"] == 0
    assert frame.loc["threshold 1e-09", "quality_loss_percent"] == 0
    assert frame.loc["gate and keys", "skipped_percent"] == pytest.approx(25)
    assert (frame["speedup"] > 0).all()


def test_the_bound_is_that_of_the_measured_shares(trial):
    shares = trial.shares
    assert shares.source == "a recorded video"
    assert 0 < shares.denoising < 1
    assert (shares.branches, shares.steps) == (2, 10)
    gate = next(tried for tried in trial.variants if tried.label == "gate and keys")
    alone = [1 - bound.saved for bound in gate.bounds]
    assert gate.times_faster_at_most == pytest.approx(1 / (alone[0] * alone[1]))


def test_calls_and_decisions_are_kept_of_every_case(trial):
    calls = trial.calls()
    assert calls.groupby("variant").size().tolist() == [3 * 20] * 3
    skipped = skipped_steps(calls).set_index(["variant", "step"])["skipped_percent"]
    assert skipped["gate and keys", 9] == 50
    assert skipped["threshold 0.5", 9] == 0  # the last step is always computed
    decisions = trial.decisions()
    assert set(decisions["variant"]) == {"threshold 0.5", "threshold 1e-09"}
    assert len(plots.change_curve(decisions).data) == 2
    assert len(plots.skip_map(skipped_steps(calls)).data) == 2
    assert plots.loss_of_variants(trial.frame(), 3.0).data
    assert len(plots.loss_against_skipped(trial.frame(), 3.0).data) == 3  # threshold, gate, the original


def with_losses(trial, *losses):
    pairs = zip(trial.variants, losses, strict=True)
    return replace(trial, variants=tuple(replace(tried, loss=loss) for tried, loss in pairs))


def loss(percent, low, high):
    return QualityLoss(percent, low, high, 3, "stlpips-alex")


def test_the_answer_is_the_variant_that_skips_most_within_the_limit(trial):
    found = cache_answer(with_losses(trial, loss(1, 0, 2), loss(0, 0, 0), loss(1, 0, 2.5)), 3.0, 3)
    assert found.headline.startswith("With threshold 0.5, ")
    assert found.details == (
        "Threshold 1e-09 skipped nothing in at least one of the videos: it is too low to do anything.",
    )
    assert len(found.headline) <= 240
    # One that skipped nothing is within every limit, and is no answer.
    found = cache_answer(with_losses(trial, loss(9, 5, 12), loss(0, 0, 0), loss(8, 2, 9)), 3.0, 3)
    assert found.headline.startswith("No setting of the cache is known to stay within 3 % quality loss.")
    assert "The mildest, gate and keys, skips 25 % of calls" in found.headline


@pytest.mark.parametrize(
    ("variants", "message"),
    [({}, "at least one variant"), ({"original": {"text_keys": {}}}, "a variant is called 'original'")],
)
def test_a_trial_without_sense_is_refused(variants, message):
    model = models.load("wan-nano", device="cpu")
    with pytest.raises(WanlabError, match=message):
        techniques.try_out(model, variants, [{}])


def test_variants_of_caches_are_those_that_can_run_here():
    chosen = {"easy_cache": [0.05, 0.2], "mag_cache": [0.06], "db_cache": []}
    variants, left_out = techniques.cache_variants(models.load("wan-nano", device="cpu"), chosen, [50])
    assert variants == {
        "EasyCache at 0.05": {"easy_cache": {"threshold": 0.05}},
        "EasyCache at 0.2": {"easy_cache": {"threshold": 0.2}},
        "MagCache at 0.06": {"mag_cache": {"threshold": 0.06}},
        "gate after 50 %": {"guidance_gate": {"after_percent": 50}},
    }
    assert left_out == []
    other = models.load("tiny-ltx-i2v", weights="random", device="cpu")
    variants, (line,) = techniques.cache_variants(other, chosen)
    assert list(variants) == ["EasyCache at 0.05", "EasyCache at 0.2"]
    assert line.startswith("mag_cache is left out: it needs a model of the Wan family")
