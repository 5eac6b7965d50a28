"""31_precision_plan on this machine: the plan it keeps is the one it proved."""

from __future__ import annotations

import pytest

from wanlab import precision
from wanlab.runs import read_run

pytestmark = pytest.mark.notebook


@pytest.fixture(scope="module")
def done(run_notebook):
    return run_notebook("31_precision_plan", "-p", "cases=3", "-p", 'compare=["ffn-int8"]')


def test_the_bound_is_said_before_the_work(done):
    bound = done.values["bound"]
    assert 0 < bound["share_percent"] < 100
    assert 1 < bound["at_format"] < bound["infinite"]
    assert bound["infinite"] == pytest.approx(1 / (1 - bound["share_percent"] / 100))
    text = done.page.get_text()
    assert text.index("Bound: linear layers") < text.index("What rounding does")
    assert "counted and not timed" in text


def test_the_plan_is_kept_and_does_what_was_predicted(done, outputs):
    (path,) = outputs.glob("31_precision_plan/*/artifacts/plan.yaml")
    plan, said = precision.load_plan(path), done.values["plan"]
    assert plan.hash == said["hash"]
    assert said["share_8bit_percent"] >= 80
    verified = {row["plan"]: row for row in done.values["verified"]}
    own = verified[said["plan"]]
    assert own["bits_per_weight"] == pytest.approx(said["bits_per_weight"], rel=1e-3)
    assert own["cases"] == 3  # of fewer there is no interval
    assert verified["ffn-int8"]["bits_per_weight"] > own["bits_per_weight"]
    # Predicted on training photographs, true on others: of the same size, not equal.
    assert 0.1 < own["effect"] / said["effect"] < 10
    assert (own["loss_high_percent"] <= 3) == said["holds"]


def test_the_verified_plans_are_results_without_a_time(done):
    own, other = read_run(done.folder).results
    verified = {row["plan"]: row for row in done.values["verified"]}
    for row in (own, other):
        assert row.quality.quality_loss_percent == pytest.approx(verified[row.plan]["loss_percent"])
        assert row.figures["bits_per_weight"] == pytest.approx(verified[row.plan]["bits_per_weight"])
        assert (row.time_ms, row.work.steps, row.work.height) == (None, 4, 64)
    assert (own.plan, other.plan) == (done.values["plan"]["plan"], "ffn-int8")


def test_the_search_costs_a_tenth_of_brute_force_at_most(done):
    search = done.values["search"]
    assert search["brute_force_forwards"] == (120 * 4 + 1) * 3 * 8
    assert search["percent_of_brute_force"] <= 10


def test_figures_are_drawn(done):
    names = {tag["data-figure"] for tag in done.page.select("div.figure[data-figure]")}
    assert len(names) == 4
    assert "bits per linear weight" in {tile["title"] for tile in done.record["tiles"]}
