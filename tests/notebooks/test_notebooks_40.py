"""The quality notebook, executed with its default parameters and over two files; what it records must hold."""

from __future__ import annotations

import pytest

from wanlab.evaluate import ALL_METRICS, write_video
from wanlab.heldout import cases as heldout

pytestmark = pytest.mark.notebook


def test_quality_over_cases_with_known_truth_and_floors(run_notebook):
    done = run_notebook("40_quality")
    loss = done.values["quality_loss"]
    assert loss["cases"] == 2
    assert (loss["low_percent"], loss["high_percent"]) == (None, None)  # two cases have no interval
    assert "from 2 cases, too few to say how sure that is" in done.record["verdict"]
    assert loss["backbone"] == "stlpips-alex"
    assert min(done.values["effect"].values()) > 90  # percent of the weights that the format moved
    divergence = {row["metric"]: row for row in done.values["divergence"]}
    assert tuple(divergence) == ALL_METRICS
    assert divergence["lpips"]["verdict"] == "above floor"
    assert divergence["lpips"]["floor_name"] == "other attention kernel"
    floors = {(row["floor"], row["metric"]): row for row in done.values["floors"]}
    assert {floor for floor, _ in floors} == {"run again", "other attention kernel"}
    assert floors["run again", "lpips"]["identical_cases"] == 2
    assert floors["other attention kernel", "lpips"]["identical_cases"] == 0
    assert done.values["tier"]["tier"] in {tile["value"] for tile in done.record["tiles"]}
    assert "LPIPS" in done.values["tier"]["why"]
    assert "farther from the true video" in done.answer
    assert len(done.page.select("video")) == 4
    assert len(done.page.select("div.figure[data-figure]")) == 3


def test_quality_of_two_files_is_divergence_only(run_notebook, tmp_path):
    truth = heldout.example_case().truth()
    one, two = tmp_path / "a.mp4", tmp_path / "b.mp4"
    write_video(one, truth, 8)
    write_video(two, (truth * 0.9), 8)
    done = run_notebook("40_quality", "-p", f"original={one}", "-p", f"optimized={two}")
    assert done.values["quality_loss"]["within_limit"] == "unknown"
    assert "unknown" in {tile["value"] for tile in done.record["tiles"]}
    assert {row["verdict"] for row in done.values["divergence"]} == {"no floor"}
    assert "floors" not in done.values
    assert done.values["effect"] == {"files": [str(one), str(two)], "notes": []}
    assert len(done.page.select("video")) == 3
