"""Notebooks on models of other families, in miniature; recipes/sweeps/families.yaml has all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wanlab import models
from wanlab.launch.grid import load_grid

pytestmark = pytest.mark.notebook

RANDOM = ("-p", "weights=random", "-p", "device=cpu")


def test_a_text_to_video_model_with_two_experts(run_notebook):
    made = run_notebook("12_experts", "-p", "model=tiny-wan2.2-t2v", *RANDOM)
    assert "quality is unknown" in str(made.page)
    assert "high-noise expert" in str(made.page)


def test_a_model_that_needs_more_than_a_picture(run_notebook):
    made = run_notebook("10_baseline", "-p", "model=tiny-wan2.1-flf2v", "-p", "warmup=0", *RANDOM)
    assert any(note.startswith("last_image: frames of a held-out clip") for note in made.record["notes"])


def test_a_pipeline_of_another_family_on_onnxruntime(run_notebook):
    made = run_notebook(
        "21_onnxruntime",
        "-p",
        "model=tiny-ltx-i2v",
        "-p",
        "frames=none",
        "-p",
        "steps=2",
        "-p",
        "limit_s=1",
        *RANDOM,
    )
    assert set(made.values["engines"].values()) == {"onnxruntime-cpu"}
    assert made.values["speedup"]["speedup"] > 0


SMALL = ("-p", "height=none", "-p", "width=none", "-p", "frames=none", "-p", "steps=2", "-p", "examples=1")


def test_a_plan_for_blocks_of_two_streams(run_notebook):
    formats = ("-p", "formats=['int8', 'int8-weight']", "-p", "compare=['uniform-int8']", "-p", "cases=1")
    made = run_notebook("31_precision_plan", "-p", "model=tiny-hunyuan-t2v", *SMALL, *formats, *RANDOM)
    # One rule is for the layers outside the blocks, of which one has the name of a projection.
    assert made.values["plan"]["rules"] >= 2


def test_quality_and_triage_of_a_family_without_pictures(run_notebook):
    how = ("-p", "model=tiny-mochi", "-p", "frames=none", "-p", "steps=2", "-p", "cases=1")
    made = run_notebook("40_quality", *how, *RANDOM)
    assert made.values["quality_loss"]["within_limit"] == "unknown"
    triage = run_notebook("15_triage", "-p", "model=tiny-mochi")
    assert "divergence" in str(triage.page)


def test_the_kept_table_names_models_and_notebooks_that_are_here(root):
    grid = load_grid(root / "recipes" / "sweeps" / "families.yaml").grid
    kept = json.loads((root / "data" / "results" / "families_cpu.json").read_text())
    known = models.tiny_names()
    seen = set()
    for sweep in kept["sweeps"]:
        for notebook, outcomes in sweep["notebooks"].items():
            assert (root / "notebooks" / f"{notebook}.ipynb").is_file()
            assert set(outcomes) <= set(known)
            assert all(outcome == "works" or len(outcome) > 20 for outcome in outcomes.values())
            runs = {(notebook, model) for model in outcomes}
            assert not runs & seen  # one sweep tells of a run
            seen |= runs
    assert {notebook for notebook, _ in seen} <= {Path(part.notebook).stem for part in grid.parts()}
