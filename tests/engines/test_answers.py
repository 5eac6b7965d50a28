"""The answers of an export, an engine and a build, from small tables."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from support.answers import faults

from wanlab import engines, evaluate
from wanlab.measure.timing import Comparison

PARITY = pd.DataFrame(
    {
        "component": ["expert_high", "expert_high", "vae_decoder"],
        "shape": ["5x32x32"] * 3,
        "relative_l2": [1e-6, 4.7e-5, 2e-6],
    }
)
EXPORTS = pd.DataFrame(
    {
        "component": ["expert_high", "vae_decoder"],
        "nodes_before": [3000, 900],
        "nodes_after": [1000, 400],
        "size_bytes": [2**20, 2**21],
    }
)
FORMS = pd.DataFrame(
    {
        "form": ["eager", "original", "friendly", "fused"],
        "ratio": [0.5, 1.0, 1.4, 1.2],
        "low": [0.4, np.nan, 1.3, 1.1],
        "high": [0.6, np.nan, 1.5, 1.3],
        "noise_percent": [3.0] * 4,
        "verdict": ["slower", "baseline", "faster", "faster"],
    }
)


def test_graphs_that_agree_are_correct_and_the_better_form_has_its_gain():
    answer = engines.export_answer(EXPORTS, 2, engines.parity_summary(PARITY), FORMS)
    assert faults(answer) == []
    assert answer.headline == (
        "All 2 components became correct ONNX graphs: the high-noise expert differs most from PyTorch, by 0.0047 %,"
        " where 0.1 % is allowed."
    )
    assert answer.details[0].startswith("An expert with the export-friendly form is 1.40 times as fast")
    assert {tile.title: tile.value for tile in answer.tiles} == {
        "correct graphs": "2 of 2",
        "largest distance to PyTorch": "0.0047 %",
        "graph nodes": "1,400",
        "size of the files": "3 MiB",
        "gain of the best form": "1.40×",
    }


def test_a_graph_that_is_far_off_is_said_first():
    answer = engines.export_answer(EXPORTS, 5, engines.parity_summary(PARITY, 1e-5))
    assert faults(answer) == []
    assert answer.headline.startswith("Not every graph is correct: 1 of 2 agree with PyTorch")
    assert "where the distance begins" in answer.next.why


@pytest.mark.parametrize(
    ("verdict", "said"), [("faster", "ONNX Runtime is 2.00"), ("not distinguishable", "cannot be told")]
)
def test_an_engine_is_told_with_its_video(verdict, said):
    clips = [np.full((2, 32, 32, 3), value, np.float32) for value in (0.2, 0.5, 0.7)]
    same = evaluate.divergence(clips, clips, progress=False)
    gain = Comparison("eager", "onnxruntime", 2.0, 1.9, 2.1, verdict, 4.0, 2000.0, 1000.0)
    operators = pd.DataFrame({"operator": ["MatMul"], "share_percent": [41.2]})
    names = ["vae_encoder", "expert_high", "expert_low", "vae_decoder", "other"]
    stages = pd.DataFrame({"component": names, "onnxruntime_percent": [20.0, 14.0, 15.0, 50.0, 1.0]})
    answer = engines.engine_answer(gain, same, stages, operators, "expert_high")
    assert faults(answer) == []
    assert said in answer.headline
    assert "The videos are identical in every pixel" in answer.headline
    assert answer.details[1] == "Of the high-noise expert's own time, MatMul takes 41 %."
    assert [tile[:2] for tile in answer.tiles[1:4]] == [
        ("VAE decoder", "50 %"),
        ("two experts", "29 %"),
        ("VAE encoder", "20 %"),
    ]
    assert answer.next.parameters["engine"] == "onnxruntime"


@pytest.mark.parametrize("executed", [False, True])
def test_a_build_says_for_which_gpus_and_what_ran(executed):
    info = SimpleNamespace(compute_capabilities=("8.9", "12.0"), time_ms=2500.0, size_bytes=3 * 2**20)
    builds = SimpleNamespace(
        built=[info], refused=pd.DataFrame({"capability": ["7.5"]}), runtime="TensorRT for RTX 1.2"
    )
    tried = pd.DataFrame({"executed": [executed], "relative_l2": [0.004]})
    answer = engines.build_answer(builds, ["a.onnx", "b.onnx"], tried)
    assert faults(answer) == []
    assert answer.headline.startswith(
        "1 of 2 graphs became engines of TensorRT for RTX 1.2 for GPUs of compute capability 8.9"
    )
    assert ("1 ran here, at most 0.4 % from PyTorch" in answer.headline) == executed
    assert ("none of them could run on this machine" in answer.headline) == (not executed)
    assert answer.details[0] == "1 build refused: see below."
