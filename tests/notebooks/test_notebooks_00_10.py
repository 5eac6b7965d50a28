"""The quickstart and the baseline, executed with their default parameters; what they record must hold."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.notebook


def test_quickstart_shows_what_onnx_runtime_bought_and_cost(shared_run):
    done = shared_run("00_quickstart")
    assert done.values["psnr_db"] >= 50
    assert done.values["speedup"]["speedup"] > 1
    assert " pairs " in done.values["speedup"]["sampling"]
    assert abs(done.values["quality_loss"]["quality_loss_percent"]) < 0.5
    for words in ("photograph", "PyTorch eager", "ONNX Runtime", "peak_memory_gib", "divergence_lpips"):
        assert words in str(done.page)
    assert len(done.page.select("video")) >= 3


def test_baseline_adds_up(shared_run):
    values = shared_run("10_baseline").values
    row = values["baseline"]
    assert row["time_per_video_ms"] == pytest.approx(17 * row["time_per_frame_ms"])
    assert 0.3 < row["peak_memory_gib"] < 2.0
    assert {line["component"] for line in values["forward"]} == {"expert_high", "expert_low"}
