"""Conversion notebooks, executed with their default parameters; what they record must hold."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.notebook
COMPONENTS = {"text_encoder", "vae_encoder", "expert_high", "expert_low", "vae_decoder"}


def test_every_component_is_exported_and_agrees_with_pytorch(run_notebook, outputs):
    done = run_notebook("20_export_onnx")
    exports = {row["component"]: row for row in done.values["exports"]}
    assert set(exports) == COMPONENTS
    assert all(row["nodes_after"] < row["nodes_before"] and not row["fixed_axes"] for row in exports.values())
    for expert in ("expert_high", "expert_low"):
        free = exports[expert]["dynamic_axes"]
        assert all(axis in free for axis in ("batch", "frames", "height", "width", "text_tokens"))
    parity = done.values["parity"]
    assert len([row for row in parity if row["inputs"] == "random"]) == 3 * len(COMPONENTS)
    recorded = {row["component"] for row in parity if row["inputs"] == "recorded"}
    assert recorded == {"expert_high", "expert_low"}
    assert max(row["relative_l2"] for row in parity) < 1e-3
    assert done.values["export"]["agree"] == len(COMPONENTS)
    assert done.record["verdict"].startswith("All 5 components became correct ONNX graphs: the ")
    assert "most from PyTorch, by less than 0.0" in done.record["verdict"]
    assert len(done.page.select("div.figure[data-figure]")) == 2
    assert all((outputs / "onnx" / "wan-nano" / f"{name}.onnx").is_file() for name in COMPONENTS)

    forms = {row["form"]: row for row in done.values["forms"]}
    assert forms["original"]["ScatterND"] == 24
    assert forms["friendly"]["ScatterND"] == forms["fused"]["ScatterND"] == forms["fused"]["Softmax"] == 0
    assert forms["fused"]["nodes"] < forms["friendly"]["nodes"] < forms["original"]["nodes"]
    blocks = done.values["blocks"]
    assert [row["piece"] for row in blocks] == ["before", *(f"blocks.{i}" for i in range(6)), "after"]
    assert max(row["relative_l2"] for row in blocks) < 1e-5
    assert "near float16's limit" in done.answer


def test_onnxruntime_makes_the_same_video_faster(run_notebook):
    done = run_notebook("21_onnxruntime", "-p", "frames=5", "-p", "limit_s=1")
    assert done.values["engines"] == dict.fromkeys(COMPONENTS, "onnxruntime-cpu")
    gain = done.values["speedup"]
    assert gain["low"] <= gain["speedup"] <= gain["high"]
    assert gain["speedup"] > 1
    # Whether it can be told from noise depends on what else the machine is doing.
    told_apart = gain["verdict"] != "not distinguishable"
    assert ("ONNX Runtime is " in done.record["verdict"]) == told_apart
    assert ("cannot be told from eager PyTorch" in done.record["verdict"]) == (not told_apart)
    size_told = "by how much cannot be told while" not in done.record["verdict"]
    assert (f"{gain['speedup']:.2f}" in done.record["verdict"]) == size_told
    assert "Timed in turn: 6 pairs in " in done.answer
    scores = {row["metric"]: row for row in done.values["divergence"]}
    assert float(scores["psnr"]["mean"]) >= 50
    assert float(scores["psnr"]["floor"]) >= 50
    assert [row["variant"] for row in done.values["before_after"]] == ["eager", "onnxruntime"]
    for row in done.values["before_after"]:
        assert all(row[name] > 0 for name in ("time_per_video_ms", "time_per_frame_ms", "load_ms"))
    providers = done.values["providers"]
    assert {row["component"] for row in providers} == COMPONENTS
    assert {row["provider"] for row in providers} == {"CPUExecutionProvider"}
    assert all(row["nodes"] > 50 and row["share_percent"] == 100 for row in providers)
    benches = done.values["benches"]
    assert [(row["component"], row["engine"]) for row in benches] == [
        (expert, engine)
        for expert in ("expert_high", "expert_low")
        for engine in ("eager", "onnxruntime-cpu")
    ]
    assert not {"h2d_ms", "device_ms", "d2h_ms", "enqueue_ms"} & set(benches[0])  # there is none on a CPU
    operators = done.values["operators"]
    assert {"MatMul", "Softmax"} <= {row["operator"] for row in operators}
    assert sum(row["share_percent"] for row in operators) == pytest.approx(100)
    assert "Of the high-noise expert's own time" in done.answer
    stages = done.values["stages"]
    assert {row["component"] for row in stages} == COMPONENTS | {"other"}
    for label in ("eager", "onnxruntime"):
        assert sum(row[f"{label}_percent"] for row in stages) == pytest.approx(100)
    assert len(done.page.select("video")) == 2


def test_an_exact_engine_is_of_the_numeric_tier(run_notebook):
    sizes = ("-p", "steps=3", "-p", "cases=1")
    done = run_notebook("40_quality", "-p", "technique=onnxruntime", *sizes)
    assert done.values["effect"] == dict.fromkeys(COMPONENTS, "onnxruntime-cpu")
    assert done.values["tier"]["tier"] == "numeric"
    assert done.values["quality_loss"]["within_limit"] == "undecided"  # one case has no interval
