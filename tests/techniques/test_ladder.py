"""A stack of techniques taken apart: which variants there are, and what the answer owes to whom."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wanlab import heldout, models, plots, techniques
from wanlab.core.errors import WanlabError

SIZE = {"height": 64, "width": 64, "frames": 5, "steps": 6}
STACK = {"guidance_gate": {"after_percent": 0}, "text_keys": {}}


@pytest.fixture(scope="module")
def ladder():
    model = models.load("wan-nano", device="cpu")
    asked, truths = heldout.ask(model, heldout.load_cases("selection", 2), **SIZE)
    return techniques.climb(model, STACK, asked, truths, rounds=1, precision=None, progress=False)


def test_equal_variants_are_measured_once(ladder):
    assert ladder.names == ("text_keys", "guidance_gate")  # in the order in which they are applied
    assert [tried.label for tried in ladder.trial.variants] == [
        "text keys",
        "text keys + guidance gate",
        "guidance gate",
    ]
    assert ladder.variant("without", "text_keys") is ladder.variant("alone", "guidance_gate")
    assert ladder.full is ladder.variant("rung", "guidance_gate")


def test_a_rung_says_what_it_adds(ladder):
    frame = ladder.frame().set_index("technique")
    assert frame["did_what_it_says"].all()
    assert frame.loc["text_keys", "skipped_percent"] == 0
    assert frame.loc["guidance_gate", "skipped_percent"] > 25
    assert frame.loc["guidance_gate", "bound_times_faster"] > 1
    assert len(plots.ladder_rows(ladder.frame()).data) > 0


def with_speedups(ladder, **speedups):
    compared = ladder.trial.timed.comparisons
    changed = {
        label: replace(each, speedup=speedups[label.replace(" ", "_").replace("+", "and")])
        for label, each in compared.items()
    }
    return replace(
        ladder, trial=replace(ladder.trial, timed=replace(ladder.trial.timed, comparisons=changed))
    )


def test_the_answer_names_the_technique_that_is_missed_most(ladder):
    known = with_speedups(ladder, text_keys=1.1, guidance_gate=1.5, text_keys_and_guidance_gate=1.6)
    found = known.answer(3.0, 2)
    assert (
        "It owes most to guidance gate: without it, it is 1.10 times as fast as the original."
        in found.details
    )
    assert "If the gains of each alone multiplied, it would be 1.65 times as fast." in found.details
    assert len(found.headline) <= 240
    slower = with_speedups(ladder, text_keys=1.1, guidance_gate=1.5, text_keys_and_guidance_gate=1.05)
    assert "Taking any one of them out makes it no slower." in slower.answer(3.0, 2).details


def test_an_empty_stack_is_refused():
    with pytest.raises(WanlabError, match="has no techniques"):
        techniques.climb(models.load("wan-nano", device="cpu"), {}, [{}])
