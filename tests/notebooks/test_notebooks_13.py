"""The attention notebook: a map of its own, and one that was saved before, read without a model."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.notebook


def test_attention_of_a_model_and_again_from_its_saved_map(run_notebook, outputs):
    made = run_notebook("13_attention")
    found = made.values["attention"]
    assert 5 < found["attention_share_percent"] < 60
    # What is trained looks somewhere: at fewer keys than attention to all alike.
    assert 10 < found["density95_median_percent"] < 60
    assert 1 <= found["block_bound_ratio"] <= found["bound_ratio"]
    assert sum(found[f"{name}_percent"] for name in ("spatial", "temporal", "global")) == pytest.approx(100)
    assert made.values["kernels"]["default_took"] == "flash"
    assert f"at most {found['bound_ratio']:.2f} times as fast" in made.record["verdict"]
    assert len(made.page.select("div.figure[data-figure]")) == 9
    assert "needs a GPU" in str(made.page)

    (kept,) = outputs.rglob("attention_map.csv.gz")
    read = run_notebook("13_attention", "-p", f"saved={kept}")
    again = read.values["attention"]
    assert again == pytest.approx(found, rel=1e-3)
    assert "kernels" not in read.values
    assert "Layers were not timed here" in str(read.page)
    assert "Kernels were not timed" in str(read.page)


def test_attention_of_another_family(run_notebook):
    """Joint attention with guidance in one batch, whose processor calls PyTorch itself."""
    made = run_notebook("13_attention", "-p", "model=tiny-mochi", "-p", "weights=random", "-p", "device=cpu")
    found = made.values["attention"]
    assert 0 < found["text_median_percent"] < 100
    assert found["bound_ratio"] >= 1
    assert len(made.page.select("div.figure[data-figure]")) == 9
    assert "joint attention of video and text, the text last" in str(made.page)


def test_the_recorded_map_of_a_large_model_beside_its_profile(run_notebook, root):
    recorded = root / "data" / "results" / "attention_a14b_h200.csv.gz"
    trace = root / "data" / "traces" / "wan2.2-i2v-a14b.pt.trace.json.gz"
    done = run_notebook("13_attention", "-p", f"saved={recorded}", "-p", f"trace={trace}")
    assert 60 < done.values["attention"]["attention_share_percent"] < 75
    assert "With random weights only the times mean something" in done.record["details"][0]
    # Maps and types as from any saved map, and the times of the profile's layers.
    assert len(done.page.select("div.figure[data-figure]")) == 7
