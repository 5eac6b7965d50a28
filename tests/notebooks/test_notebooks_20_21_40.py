"""Conversion and quality notebooks, executed with their default parameters; what they record must hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from bs4 import BeautifulSoup

from wanlab.evaluate import write_video
from wanlab.nano import heldout

pytestmark = pytest.mark.notebook
COMPONENTS = {"text_encoder", "vae_encoder", "expert_high", "expert_low", "vae_decoder"}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """One folder of runs: converted networks lie in it, and only the first notebook has to make them."""
    return tmp_path_factory.mktemp("runs") / "outputs"


@pytest.fixture(scope="module")
def run(root, outputs):
    """Execute a notebook; gives its run.json, the last value recorded under each name, and its report."""

    def go(name: str, *more: str):
        command = [sys.executable, "-m", "wanlab.cli", "run", str(root / "notebooks" / f"{name}.ipynb")]
        done = subprocess.run(
            [*command, "--output", str(outputs), "--force", *more],
            cwd=outputs.parent,
            env={"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        folder = max((p for p in (outputs / name).iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        return (
            json.loads((folder / "run.json").read_text()),
            {line["name"]: line["value"] for line in lines},
            BeautifulSoup((folder / "report.html").read_text(), "html.parser"),
        )

    return go


def test_every_component_is_exported_and_agrees_with_pytorch(run, outputs):
    record, values, page = run("20_export_onnx")
    exports = {row["component"]: row for row in values["exports"]}
    assert set(exports) == COMPONENTS
    assert all(row["nodes_after"] < row["nodes_before"] and not row["fixed_axes"] for row in exports.values())
    for expert in ("expert_high", "expert_low"):
        free = exports[expert]["dynamic_axes"]
        assert all(axis in free for axis in ("batch", "frames", "height", "width", "text_tokens"))
    compared = {(row["component"], row["shape"]) for row in values["parity"]}
    assert len(compared) == 3 * len(COMPONENTS)
    assert max(row["relative_l2"] for row in values["parity"]) < 1e-3
    assert values["export"]["agree"] == len(COMPONENTS)
    assert "5 of 5 components" in record["verdict"]
    assert len(page.select("div.figure[data-figure]")) == 1
    assert all((outputs / "onnx" / "wan-nano" / f"{name}.onnx").is_file() for name in COMPONENTS)


def test_onnxruntime_makes_the_same_video_faster(run):
    record, values, page = run("21_onnxruntime")
    assert values["engines"] == dict.fromkeys(COMPONENTS, "onnxruntime-cpu")
    gain = values["speedup"]
    assert gain["low"] <= gain["speedup"] <= gain["high"]
    assert gain["speedup"] > 1
    # Whether it can be told from noise depends on what else the machine is doing.
    assert gain["verdict"] in record["verdict"]
    assert f"{gain['speedup']:.2f}x" in record["verdict"]
    scores = {row["metric"]: row for row in values["divergence"]}
    assert float(scores["psnr"]["mean"]) >= 50
    assert float(scores["psnr"]["floor"]) >= 50
    assert [row["variant"] for row in values["before_after"]] == ["eager", "onnxruntime"]
    for row in values["before_after"]:
        assert all(row[name] > 0 for name in ("time_per_video_ms", "time_per_frame_ms", "load_ms"))
    stages = values["stages"]
    assert {row["component"] for row in stages} == COMPONENTS | {"other"}
    for label in ("eager", "onnxruntime"):
        assert sum(row[f"{label}_percent"] for row in stages) == pytest.approx(100)
    assert len(page.select("video")) == 2


def test_quality_loss_over_cases_with_known_truth(run):
    record, values, page = run("40_quality")
    loss = values["quality_loss"]
    assert loss["cases"] == 6
    assert loss["low_percent"] <= loss["quality_loss_percent"] <= loss["high_percent"]
    assert loss["within_limit"] == "yes"
    assert loss["backbone"] == "stlpips-alex"
    assert values["effect"] == dict.fromkeys(COMPONENTS, "onnxruntime-cpu")
    assert {row["metric"] for row in values["divergence"]} == {"lpips", "psnr", "ssim"}
    assert "stlpips-alex" in record["verdict"]
    assert len(page.select("video")) == 3


def test_quality_of_two_files_is_divergence_only(run, tmp_path):
    truth = heldout.example_case().truth()
    one, two = tmp_path / "a.mp4", tmp_path / "b.mp4"
    write_video(one, truth, 8)
    write_video(two, (truth * 0.9), 8)
    record, values, page = run("40_quality", "-p", f"original={one}", "-p", f"optimized={two}")
    assert values["quality_loss"]["within_limit"] == "unknown"
    assert "unknown" in record["verdict"]
    assert {row["verdict"] for row in values["divergence"]} == {"no floor"}
    assert len(page.select("video")) == 2
