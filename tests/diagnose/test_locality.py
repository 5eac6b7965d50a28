"""Which heads are local: known heads are found, intervals are over cases, and what cannot be told is said."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from wanlab import diagnose, heldout, models, plots
from wanlab.core.errors import WanlabError
from wanlab.diagnose.attention.locality import LOCAL, NOT_LOCAL, STATISTICS, UNDECIDED, locality
from wanlab.diagnose.attention.maps import AttentionMap

GRID = [9, 16, 24]


def attention(mass: dict[tuple[str, int], float], noise: float, seed: int) -> AttentionMap:
    """A map of heads with a known mass within one latent frame, by expert and head."""
    generator = np.random.default_rng(seed)
    rows = [
        {"component": component, "step": step, "branch": "cond", "kind": "self", "layer": 0, "head": head}
        | {name: 50.0 for name in STATISTICS}
        | {"within1_frames_percent": value + noise * generator.standard_normal()}
        for (component, head), value in mass.items()
        for step in (0, 1)
    ]
    facts = {"grid": GRID, "near_window": [7, 7], "prompt_tokens": {}, "text_keys": 24}
    return AttentionMap(pd.DataFrame(rows), facts)


def found(mass: dict[tuple[str, int], float], noise: float = 0.5, cases: int = 6) -> diagnose.Locality:
    return locality([attention(mass, noise, seed) for seed in range(cases)])


def test_heads_are_local_where_the_whole_interval_says_so():
    result = found({("expert_high", 0): 99.0, ("expert_high", 1): 60.0, ("expert_high", 2): 90.0})
    assert list(result.heads["in_time"]) == [LOCAL, NOT_LOCAL, UNDECIDED]
    assert set(result.heads["in_space"]) == {NOT_LOCAL}
    counts = result.counts.set_index("where").loc["in_time"]
    assert (counts[LOCAL], counts[NOT_LOCAL], counts[UNDECIDED]) == (1, 1, 1)
    first = result.heads.iloc[0]
    assert first["within1_frames_low_percent"] < 99.2
    assert first["within1_frames_high_percent"] > 98.8


@pytest.mark.parametrize(("apart", "differ"), [(8.0, "yes"), (0.0, "no")])
def test_experts_differ_only_where_cases_agree_on_it(apart, differ):
    result = found({("expert_high", 0): 50.0 + apart, ("expert_low", 0): 50.0}, noise=2.0, cases=12)
    row = result.differences.set_index("statistic").loc["within1_frames_percent"]
    assert row["differ"] == differ
    assert row["low_percent"] <= row["difference_percent"] <= row["high_percent"]
    # A statistic that is the same in all cases differs by nothing.
    assert result.differences.set_index("statistic").loc["within4_frames_percent", "differ"] == "no"
    assert ("cannot be told" in str(result)) == (differ == "no")


def test_two_cases_have_no_interval():
    result = found({("expert_high", 0): 99.0, ("expert_low", 0): 10.0}, cases=2)
    assert set(result.heads["in_time"]) == {UNDECIDED}
    assert set(result.differences["differ"]) == {UNDECIDED}


def test_uniform_attention_has_the_share_of_frames_that_are_near():
    uniform = found({("expert", 0): 50.0}).experts.set_index("statistic")["uniform_percent"]
    # Of nine frames seven have three within one frame, and two have two.
    assert uniform["within1_frames_percent"] == pytest.approx(100 * (7 * 3 + 2 * 2) / 81)
    assert uniform["within4_frames_percent"] == pytest.approx(100 * (9 + 2 * (8 + 7 + 6 + 5)) / 81)


def test_maps_of_other_sizes_or_of_earlier_versions_are_refused():
    first = attention({("expert", 0): 50.0}, 0.0, 0)
    other = dataclasses.replace(first, facts=first.facts | {"grid": [5, 8, 12]})
    with pytest.raises(WanlabError, match="one size"):
        locality([first, other])
    with pytest.raises(WanlabError, match="no attention map"):
        locality([])
    older = dataclasses.replace(first, frame=first.frame.drop(columns="within2_frames_percent"))
    with pytest.raises(WanlabError, match="earlier version"):
        locality([older])


@pytest.mark.slow
def test_a_model_is_looked_at_over_cases():
    model = models.load("wan-nano")
    size = dict(height=64, width=96, frames=9, steps=3)
    result = diagnose.attention_locality(model, heldout.draw_cases(3), queries=2, progress=False, **size)
    assert result.cases == 3
    assert result.grid == (3, 4, 6)
    assert set(result.heads["component"]) == {"expert_high", "expert_low"}
    within = result.heads[["within1_frames_percent", "within2_frames_percent", "within4_frames_percent"]]
    assert (within.diff(axis=1).iloc[:, 1:] >= -1e-3).all().all()
    # With three frames all lie within two of every query.
    assert within["within2_frames_percent"].to_numpy() == pytest.approx(100, abs=1e-2)
    figure = plots.locality_dots(result)
    assert {len(trace.x) for trace in figure.data} == {24}
