"""The quickstart and the baseline, executed with their default parameters; what they record must hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.notebook


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "outputs"


def execute(root, outputs, name: str) -> tuple[dict, str]:
    """The last value recorded under each name, and the report."""
    command = [sys.executable, "-m", "wanlab.cli", "run", str(root / "notebooks" / f"{name}.ipynb")]
    done = subprocess.run(
        [*command, "--output", str(outputs), "--force"],
        cwd=outputs.parent,
        env={"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (path for path in (outputs / name).iterdir() if path.is_dir())
    assert done.stdout.splitlines()[-1] == str(folder / "report.html")
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["name"]: line["value"] for line in lines}, (folder / "report.html").read_text()


def test_quickstart_shows_what_onnx_runtime_bought_and_cost(root, outputs):
    values, page = execute(root, outputs, "00_quickstart")
    assert values["psnr_db"] >= 50
    assert values["speedup"]["speedup"] > 1
    assert abs(values["quality_loss"]["quality_loss_percent"]) < 0.5
    for words in ("photograph", "PyTorch eager", "ONNX Runtime", "peak_memory_gib", "divergence_lpips"):
        assert words in page
    assert page.count("<video") >= 3


def test_baseline_adds_up(root, outputs):
    values, _ = execute(root, outputs, "10_baseline")
    row = values["baseline"]
    assert row["time_per_video_ms"] == pytest.approx(17 * row["time_per_frame_ms"])
    assert 0.3 < row["peak_memory_gib"] < 2.0
    assert {line["component"] for line in values["forward"]} == {"expert_high", "expert_low"}
