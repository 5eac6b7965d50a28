"""Notebooks on models of other families, in miniature; recipes/sweeps/families.yaml has all of them."""

from __future__ import annotations

import json

import pytest

from wanlab import models

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
        "21_onnxruntime", "-p", "model=tiny-ltx-i2v", "-p", "frames=none", "-p", "steps=2", *RANDOM
    )
    assert set(made.values["engines"].values()) == {"onnxruntime-cpu"}
    assert made.values["speedup"]["speedup"] > 0


def test_the_kept_table_names_models_and_notebooks_that_are_here(root):
    kept = json.loads((root / "data" / "results" / "families_cpu.json").read_text())
    known = models.tiny_names()
    assert len(kept["notebooks"]) >= 5
    for notebook, outcomes in kept["notebooks"].items():
        assert (root / "notebooks" / f"{notebook}.ipynb").is_file()
        assert len(outcomes) >= 12
        assert set(outcomes) <= set(known)
        assert all(outcome == "works" or len(outcome) > 20 for outcome in outcomes.values())
