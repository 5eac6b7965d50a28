"""The notebook of sparse attention: choices of patterns, and a file that a configuration can use."""

from __future__ import annotations

import json
import math

import pytest

from wanlab import configuration, techniques

pytestmark = pytest.mark.notebook


def test_patterns_of_heads_cost_what_they_leave_out(shared_run):
    done = shared_run("45_sparse")
    *own, window = done.values["variants"]
    assert [row["kind"] for row in (*own, window)] == ["a pattern for each head"] * 3 + ["window"]
    computed = [row["computed_percent"] for row in own]
    assert computed == sorted(computed, reverse=True)
    assert 30 < computed[-1] < 80 < computed[0] < 100
    assert all(row["did_what_it_says"] for row in (*own, window))
    assert own[0]["quality_loss_percent"] < own[-1]["quality_loss_percent"]
    heads = done.values["heads"]
    assert len(heads) == 2 * 6 * 4
    assert len({row["pattern"] for row in heads}) > 3
    assert all(row["relative_error"] <= row["relative_error_without_means"] + 1e-6 for row in heads)
    times = done.values["times"]
    assert times[0]["verdict"] == "baseline"
    assert all(row["time_ms"] > 0 for row in times)
    assert "no time is saved here" in done.record["verdict"]


def test_the_patterns_are_a_file_that_a_configuration_uses(shared_run):
    done = shared_run("45_sparse")
    patterns = techniques.HeadPatterns.load(done.folder / "artifacts" / "patterns.json")
    rows = {(row["component"], row["block"], row["head"]): row for row in done.values["heads"]}
    for row in patterns.heads:
        shown = rows[row.component, row.block, row.head]
        assert math.isclose(shown["density_percent"], 100 * row.density)
        assert shown["means_added"] == row.added
    cells = json.loads((done.folder / "executed.ipynb").read_text())["cells"]
    printed = ["".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", [])]
    (text,) = [text for text in printed if text.startswith("name: sparse")]
    parsed = configuration.parse_configuration(text)
    settings = parsed.techniques["sparse_attention"]
    assert settings["patterns"] == str(done.folder / "artifacts" / "patterns.json")
