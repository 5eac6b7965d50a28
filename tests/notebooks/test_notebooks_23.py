"""23_engine_report over engines that it makes, and over recorded ones."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.notebook


def add_up(rows, column):
    return sum(row[column] for row in rows)


def test_two_engines_are_made_reported_and_compared(run_notebook):
    done = run_notebook("23_engine_report")
    totals, roles = done.values["totals"], done.values["by_role"]
    assert totals["joined_percent"] == 100
    assert totals["layers_ms"] > 0
    assert totals["latency_ms"] > 0
    assert add_up(roles, "layers") == add_up(done.values["by_precision"], "layers") == totals["layers"]
    assert add_up(roles, "time_ms") == pytest.approx(totals["layers_ms"])
    attention = sum(row["share_percent"] for row in roles if row["role"] in ("attn1", "attn2"))
    assert totals["attention_percent"] == pytest.approx(attention)
    assert ("attention", f"{attention:.3g} %") in {
        (tile["title"], tile["value"]) for tile in done.record["tiles"]
    }
    assert "36 layers of attention are not fused" in done.record["verdict"]
    hazards = [row["hazard"] for row in done.values["lint"]]
    assert any("attention is not fused in 12 places" in hazard for hazard in hazards)
    assert "write 22.1 MiB of scores" in {tile["change"] for tile in done.record["tiles"]}
    fusions = {row["type"]: row["change"] for row in done.values["fusions"]}
    assert fusions["SimplifiedLayerNormalization"] == 24
    difference = done.values["difference"]
    assert add_up(difference, "time_a_ms") == pytest.approx(totals["layers_ms"])
    change = add_up(difference, "time_b_ms") - add_up(difference, "time_a_ms")
    assert add_up(difference, "difference_ms") == pytest.approx(change)
    assert all(row["noise_ms"] >= 0 for row in difference)
    assert len(done.page.select("div.figure[data-figure]")) == 4


def test_saved_engines_need_no_gpu(run_notebook, root):
    inspector = root / "tests" / "fixtures" / "inspector"
    done = run_notebook(
        "23_engine_report",
        "-p",
        f"engine={inspector / 'documented_10x.json'}",
        "-p",
        f"beside=['{inspector / 'documented_profile.json'}', '{inspector / 'documented_times.json'}']",
        "-p",
        f"other={inspector / 'rtx_expert_high_fixed_size.layers.json.gz'}",
    )
    assert done.values["totals"]["latency_ms"] == pytest.approx(0.82)
    assert done.values["fusions"] == []
    assert "3 layers of attention are not fused" in done.record["verdict"]
    assert "176 layers" in done.answer
    assert len(done.page.select("div.figure[data-figure]")) == 2
