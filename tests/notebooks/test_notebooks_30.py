"""The sensitivity notebook: two experts with generations to hold predictions against, and a model with one expert."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from models_tiny import save

pytestmark = pytest.mark.notebook

SMALL = ["height=64", "width=64", "frames=5", "steps=4", "examples=2", "samples=8", "cases=1"]


def arguments(*values: str) -> list[str]:
    return [word for value in values for word in ("-p", value)]


def test_sensitivity_of_wan_nano(run_notebook):
    done = run_notebook("30_sensitivity", *arguments(*SMALL, "formats=['int8', 'int4-weight']"))
    found = done.values["sensitivity"]
    assert found["format"] == "int4-weight"
    assert found["effect"] > 0
    assert found["low"] <= found["rank_correlation"] <= found["high"]
    assert found["rank_correlation"] > 0.5
    cost = done.values["cost"][0]
    assert cost["calls"] == 2 * 4 * 2
    assert cost["forward_equivalents"] < 0.2 * cost["brute_force"]
    assert {row["less_tolerant"] for row in done.values["tolerance"]} <= {
        "expert_high",
        "expert_low",
        "neither",
    }
    assert "tolerates less" in done.record["verdict"]
    assert "rank correlation with generations" in done.record["verdict"]
    for words in ("high-noise expert", "brute_force", "predicted"):
        assert words in str(done.page)


def test_one_expert_and_no_generations(run_notebook, tmp_path):
    folder = save(tmp_path / "single", transformer_2=None, boundary_ratio=None)
    small = [f"model={folder}", "height=32", "width=32", "frames=5", "steps=2", "examples=1", "samples=0"]
    done = run_notebook("30_sensitivity", *arguments(*small, "formats=['int8-weight']", "calls=1"))
    assert "one expert, nothing to compare" in done.record["verdict"]
    assert "not measured" in done.record["verdict"]
