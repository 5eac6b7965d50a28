"""41_configuration: the row that sweeps are made of, on PyTorch and as graphs of a plan."""

from __future__ import annotations

import json
import math

import pytest

from wanlab import configuration, runs

pytestmark = pytest.mark.notebook
SUMMARY = {
    "engine", "plan", "time_per_video_ms", "time_per_frame_ms", "p95_ms", "cv_percent", "noise_percent", "peak_memory_gib",
    "load_ms", "weights_gib", "divergence_lpips", "divergence_floor_lpips", "psnr_db", "quality_loss_percent",
    "effect",
}  # fmt: skip


def test_the_original_is_its_own_baseline(run_notebook, outputs):
    done = run_notebook("41_configuration", "-p", f"engines={outputs / 'configured'}")
    (result,) = runs.load_results(done.folder)[0]
    row = result.row()
    assert set(row) >= SUMMARY
    assert "quality_loss_low_percent" not in row  # two cases have no interval
    assert row["effect"] == "baseline"
    assert (row["divergence_lpips"], row["quality_loss_percent"], row["psnr_db"]) == (0, 0, math.inf)
    assert row["divergence_floor_lpips"] > 0
    assert all(row[name] > 0 for name in ("time_per_video_ms", "peak_memory_gib", "load_ms", "weights_gib"))
    assert len(result.samples_ms) == 4
    size = {"height": 64, "width": 64, "frames": 5}
    done_work = {"model": "wan-nano", "weights": "pretrained", "guided": True, "seed": 0, "steps": 4}
    assert result.work == runs.Work(**size, **done_work)
    chosen = configuration.load_configuration("eager")
    record = json.loads((done.folder / "run.json").read_text())
    assert record["configuration"] == {"name": "eager", "hash": chosen.hash}
    assert record["inputs"]["configuration"] == chosen.hash
    folder = next(outputs.glob("41_configuration/*/run.json")).parent
    assert all((folder / "artifacts" / f"{name}.mp4").is_file() for name in ("video", "original", "truth"))
    assert len(done.page.select("video")) == 3


def test_a_plan_on_onnxruntime_is_proven_and_both_are_compared(run_notebook, outputs):
    given = ("engine=onnxruntime", "plan=uniform-int8", "cases=1", f"engines={outputs / 'configured'}")
    done = run_notebook("41_configuration", *(word for each in given for word in ("-p", each)))
    row = runs.load_results(done.folder)[0][0].row()
    assert (row["effect"], row["plan"]) == ("applied", "uniform-int8")
    assert "66 of 66 layers in int8" in done.page.get_text()
    assert "5 of 5 networks run in ONNX Runtime" in done.page.get_text()
    assert row["divergence_lpips"] > row["divergence_floor_lpips"]
    assert row["weights_gib"] < 0.03  # 0.044 as loaded

    found = runs.compare(outputs, baseline="engine=eager")
    assert found.refused["reason"].tolist() == ["cases is 1 selection, the baseline's 2 selection"]
    found = runs.compare(outputs, baseline="engine=eager", allow=["cases"])
    assert found.refused.empty
    assert found.frame["weights_gib_ratio"][1] > 1.5
    assert found.frame["low"][1] <= found.frame["ratio"][1] <= found.frame["high"][1]
