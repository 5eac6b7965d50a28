"""Report card and lint: engines of every source, graphs that are wrong in one way each, a real run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from support import convert_tiny as tiny
from support.answers import faults

from wanlab import (
    engine_report,
    plots,
)
from wanlab.core.errors import WanlabError
from wanlab.engine_report import EngineLayers, Layer, Tensor

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
INSPECTOR = FIXTURES / "inspector"
PROFILE = FIXTURES / "ort_profile" / "nano_expert_cpu.json.gz"
SIZE = {"height": 64, "width": 96, "frames": 9}


@pytest.fixture(scope="module")
def folder(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    model = tiny.bare(tiny.pipeline())
    model.spec = replace(model.spec, name="wan-nano")  # whose sizes the tiny model has
    kinds = {"20": {"dynamic": False}, "23": {"dynamic": False, "opset": 23}, "free": {}}
    for name, kind in kinds.items():
        (report,) = exported(model, "expert_high", **kind, **SIZE)
        for file in (Path(report.path), Path(report.path).with_suffix(".json")):
            shutil.copy(file, folder / f"{name}{file.suffix}")
    return folder


@pytest.fixture(scope="module")
def measured(folder):
    return engine_report.profile_engine(
        folder / "20.onnx", folder / "measured", provider="cpu", threads=1, runs=4
    )


@pytest.fixture(scope="module")
def rtx_int8():
    return engine_report.read_layers(INSPECTOR / "rtx_expert_high_int8.layers.json.gz")


def rules(layers, **more):
    return {finding.rule: finding for finding in engine_report.lint(layers, **more)}


def graph(nodes, inputs, outputs, constants=(), **metadata):
    """An ONNX file in memory: `(operator, inputs, outputs, name, attributes)` nodes."""
    made = [helper.make_node(op, list(i), list(o), name=name, **more) for op, i, o, name, more in nodes]
    values = [
        [helper.make_tensor_value_info(n, kind, shape) for n, kind, shape in side]
        for side in (inputs, outputs)
    ]
    tensors = [helper.make_tensor(n, kind, shape, data) for n, kind, shape, data in constants]
    built = helper.make_model(
        helper.make_graph(made, "g", *values, tensors), opset_imports=[helper.make_opsetid("", 19)]
    )
    return onnx.shape_inference.infer_shapes(built, data_prop=True)


def saved(path, *parts, **more):
    onnx.save(graph(*parts, **more), path)
    return engine_report.read_onnx(path)


def tables_add_up(layers):
    report = engine_report.summarize(layers)
    for table in (report.by_role, report.by_kind, report.by_type, report.by_precision, report.by_site):
        assert table["layers"].sum() == len(layers.layers)
        assert table["weight_bytes"].sum() == report.totals["weight_bytes"]
        if layers.timed:
            assert table["time_ms"].sum() == pytest.approx(layers.total_ms)
            assert table["share_percent"].sum() == pytest.approx(100)
    return report


def test_names_of_the_package_do_not_hide_one_another():
    """A module of the same name as a function would take its place once it was imported."""
    import importlib
    import pkgutil

    modules = {module.name for module in pkgutil.iter_modules(engine_report.__path__)}
    for name in modules:
        importlib.import_module(f"{engine_report.__name__}.{name}")
    assert not modules & set(engine_report.__all__)
    assert engine_report is engine_report


def test_a_graph_alone_has_a_card(folder):
    plain, fused = (engine_report.read_onnx(folder / f"{opset}.onnx") for opset in (20, 23))
    report = tables_add_up(plain)
    assert all(layer.modules for layer in plain.layers)
    assert (plain.source, plain.metadata["component"]) == ("onnx", "expert_high")
    assert not report.layers.timed
    assert report.caveat == ""
    assert math.isnan(report.totals["attention_percent"])
    found = rules(plain)
    # one block: self-attention and cross-attention, each three nodes
    assert len(found["attention not fused"].layers) == 6
    assert "unless the engine fuses" in found["attention not fused"].hazard
    assert {layer.type for layer in found["norm not fused"].layers} == {
        "Pow",
        "ReduceMean",
        "Add",
        "Sqrt",
        "Div",
        "Mul",
    }
    assert len(found["norm not fused"].layers) == 4 * 6
    assert not {"attention not fused", "norm not fused"} & set(rules(fused))
    assert "no attention is left unfused" in engine_report.summarize(fused).answer().headline
    weights = sum(p.numel() for p in tiny.expert(2).parameters())
    assert sum(layer.weight_bytes for layer in plain.layers) == pytest.approx(4 * weights, rel=0.25)


def test_free_sizes_are_set_to_those_of_the_traced_clip(folder):
    fixed, free = engine_report.read_onnx(folder / "20.onnx"), engine_report.read_onnx(folder / "free.onnx")
    scores = [rules(layers)["attention not fused"].size_bytes for layers in (fixed, free)]
    assert scores[0] == scores[1] > 0
    larger = engine_report.read_onnx(folder / "free.onnx", sizes={"batch": 1, "latent_frames": 3, "latent_height": 16,
                                                         "latent_width": 24, "text_tokens": 24})  # fmt: skip
    assert rules(larger)["attention not fused"].size_bytes > 4 * scores[0]
    assert "288 x 288 tokens" in rules(larger)["attention not fused"].hazard
    unknown = engine_report.read_onnx(folder / "free.onnx", sizes={})
    assert any("unknown sizes" in note for note in unknown.notes)


def test_a_measured_engine_finds_its_modules_and_its_time(measured, folder):
    report = tables_add_up(measured)
    assert all(layer.modules for layer in measured.layers)
    assert {layer.joined_by for layer in measured.layers} <= {"name", "graph", "weight"}
    made = [layer for layer in measured.layers if layer.name.startswith("gemm_")]
    assert made
    assert {layer.joined_by for layer in made} == {"graph"}
    assert measured.facts["runs"] == 4
    assert measured.latency_ms > 0
    assert str(round(measured.latency_ms, 2))[:3] in report.caveat
    weights = sum(layer.weight_bytes for layer in engine_report.read_onnx(folder / "20.onnx").layers)
    assert report.totals["weight_bytes"] == pytest.approx(weights, rel=0.02)
    assert report.top(3)["time_ms"].is_monotonic_decreasing
    assert report.share_percent(["attn1", "attn2"]) == pytest.approx(report.totals["attention_percent"])
    tiles = {tile.title: tile.value for tile in report.answer().tiles}
    assert tiles["attention"] == f"{report.totals['attention_percent']:.3g} %"
    assert faults(report.answer()) == []
    # what was kept of it reads the same without running anything
    kept = engine_report.read_layers(
        folder / "measured" / "all.profile.json", [folder / "measured" / "all.onnx"]
    )
    assert [layer.modules for layer in kept.layers] == [layer.modules for layer in measured.layers]


def test_what_was_fused_is_told(measured, folder):
    source = engine_report.read_onnx(folder / "20.onnx")
    table = engine_report.fusions(source, measured).set_index("type")
    assert table.loc["SimplifiedLayerNormalization", "change"] == 4
    assert table.loc["Pow", "change"] == -4
    assert table["change"].sum() == len(measured.layers) - len(source.layers)
    norms = engine_report.fused_layers(source, measured).query("type == 'SimplifiedLayerNormalization'")
    assert len(norms) == 4
    assert set(norms["nodes_before"]) == {6}
    assert "blocks.0.attn1.norm_q" in set(norms["modules"])
    assert len(engine_report.fusions(None, measured)) == 0


def test_profiles_of_one_engine_are_merged(measured):
    from wanlab.engine_report.from_onnxruntime import merged

    both = merged(measured, measured)
    assert all(len(layer.samples_ms) == 8 for layer in both.layers)
    assert both.total_ms == pytest.approx(measured.total_ms)
    assert both.facts["runs"] == 8
    with pytest.raises(WanlabError, match="different engines"):
        merged(measured, engine_report.read_ort_profile(PROFILE))


def test_recorded_engines_of_tensorrt():
    fused = engine_report.read_layers(INSPECTOR / "rtx_expert_high_float16.layers.json.gz")
    found = rules(fused, planned={"blocks.*.attn1.to_*": "fp16"})
    assert "attention not fused" not in found
    assert "precision not as planned" not in found
    assert sum(layer.kind == "attention" for layer in fused.layers) == 12
    assert (
        "int8 was planned and fp16 is used"
        in rules(fused, planned={"blocks.*.ffn.*": "int8"})["precision not as planned"].hazard
    )
    plain = engine_report.summarize(
        engine_report.read_layers(INSPECTOR / "rtx_expert_high_fixed_size.layers.json.gz")
    )
    attention = plain.findings[0]
    # 6 blocks of 480 x 480 and 480 x 24 scores, 4 heads, FP32
    assert attention.size_bytes == 6 * 4 * 4 * (480 * 480 + 480 * 24)
    assert "480 x 480 tokens" in attention.hazard
    assert "36 layers of attention are not fused" in plain.answer().headline
    assert "write 22.1 MiB of scores" in {tile.beside for tile in plain.answer().tiles}


def test_a_quantised_engine_of_tensorrt(rtx_int8):
    found = rules(rtx_int8, planned={"blocks.*.ffn.*": "int8", "proj_out": "fp32", "blocks.9.*": "int8"})
    assert "precision not as planned" not in found
    assert "no layer matches the planned patterns: blocks.9.*" in found["planned layers not found"].hazard
    assert "products are INT8" in found["FP32 islands"].hazard
    assert all(layer.precision == "fp32" for layer in found["FP32 islands"].layers)
    assert found["Q/DQ not fused"].layers
    tables_add_up(rtx_int8)


def test_documented_engine_shows_every_precision_finding():
    layers = engine_report.read_layers(
        INSPECTOR / "documented_10x.json", [INSPECTOR / "documented_profile.json"]
    )
    found = rules(layers, planned={"blocks.*.attn1.to_*": "int8", "blocks.0.ffn.*": "int8"})
    assert found["attention not fused"].time_ms == pytest.approx(0.56)
    assert [layer.name for layer in found["conversions between quantised layers"].layers] == [
        "Reformatting CopyNode for Input Tensor 0 to blocks.0.ffn.net.2/node_linear_8"
    ]
    assert "int8 was planned and fp16 is used: 1 gemm" in found["precision not as planned"].hazard
    assert [layer.modules for layer in found["FP32 islands"].layers] == [("proj_out",)]
    assert found["Q/DQ not fused"].time_ms == pytest.approx(0.015)
    assert found["conversions"].time_ms == pytest.approx(0.045)
    assert "conversions" not in rules(layers, minimum_percent=5)
    assert engine_report.lint(layers)[0].rule == "attention not fused"  # by time
    frame = engine_report.summarize(layers).lint_frame()
    assert frame["share_percent"].iloc[0] == pytest.approx(100 * 0.56 / layers.total_ms)
    assert frame[["hazard", "mitigation", "help"]].map(len).min().min() > 10
    with pytest.raises(WanlabError, match="did you mean 'int8'"):
        engine_report.summarize(layers, planned={"a": "int9"})


def test_a_quantised_graph_is_read_as_it_is_meant(folder, tmp_path):
    """Q/DQ around a product is the plan of a graph; left over in an engine it is a finding."""
    from wanlab.precision import quantize

    report = quantize(
        folder / "20.onnx", tmp_path / "w8.onnx", layers=["blocks.*.ffn.*"], format="int8-weight"
    )
    layers = engine_report.read_onnx(report.path)
    planned = engine_report.read_planned(tmp_path / "w8.json")
    assert set(planned.values()) == {"int8-weight"}
    assert not {"precision not as planned", "planned layers not found"} & set(rules(layers, planned=planned))
    wrong = rules(layers, planned={"blocks.*.attn1.to_q": "int8-weight"})["precision not as planned"]
    assert "a weight in int8 was planned and fp32 is used" in wrong.hazard
    assert "Q/DQ not fused" not in rules(layers)
    seen = rules(engine_report.read_onnx(report.path, source="onnxruntime"))[
        "weights dequantised at run time"
    ]
    assert len(seen.layers) == 2
    assert seen.size_bytes == 2 * 24 * 48 * 4


def test_bad_operators_are_named(tmp_path):
    f, i, d = TensorProto.FLOAT, TensorProto.INT64, TensorProto.DOUBLE
    layers = saved(
        tmp_path / "bad.onnx",
        [
            ("ScatterND", ("x", "at", "part"), ("y",), "rope/node_scatter", {}),
            ("Cast", ("y",), ("y64",), "rope/node_cast", {"to": d}),
            ("Mul", ("y64", "y64"), ("z64",), "rope/node_mul", {}),
            ("Cast", ("z64",), ("z",), "rope/node_cast_1", {"to": f}),
            ("Transpose", ("blocks.0.attn1.to_q.weight",), ("t",), "node_t", {"perm": [1, 0]}),
            ("MatMul", ("z", "t"), ("o",), "blocks.0.attn1.to_q/node_mm", {}),
        ],
        [("x", f, [8, 4]), ("at", i, [1, 1]), ("part", f, [1, 4])],
        [("o", f, [8, 6])],
        [("blocks.0.attn1.to_q.weight", f, [6, 4], [0.0] * 24)],
    )
    found = rules(layers)
    assert found["ScatterND in the graph"].layers[0].modules == ("rope",)
    assert len(found["float64 in the graph"].layers) == 3
    assert found["weights transposed at run time"].size_bytes == 96
    assert found["weights transposed at run time"].layers[0].joined_by == "weight"
    assert len(found["conversions"].layers) == 2
    product = layers.layers[-1]
    assert (product.weight_dtype, product.modules) == ("fp32", ("blocks.0.attn1.to_q",))


def test_what_leaves_the_gpu_is_found():
    def node(index, operator, provider, kind="pointwise", dtype="fp16"):
        inputs, outputs = ((Tensor(f"t{i}", dtype, (4,)),) for i in (index, index + 1))
        more = {"inputs": inputs, "outputs": outputs, "precision": dtype, "provider": provider}
        return Layer(index, f"n{index}", operator, kind, **more)

    cpu, gpu = "CPUExecutionProvider", "CUDAExecutionProvider"
    layers = (
        node(0, "MatMul", gpu, kind="matmul"),
        node(1, "MemcpyToHost", gpu, kind="copy"),
        node(2, "RMSNormalization", cpu, kind="norm"),
        node(3, "MemcpyFromHost", gpu, kind="copy"),
        node(4, "Add", cpu, dtype="int64"),
        node(5, "Mul", cpu),
    )
    found = rules(EngineLayers("e", "onnxruntime", layers))
    assert [layer.index for layer in found["copies between host and GPU"].layers] == [1, 3]
    assert [layer.index for layer in found["computed on the CPU"].layers] == [2, 5]
    alone = EngineLayers("e", "onnxruntime", tuple(replace(layer, provider=cpu) for layer in layers))
    assert "computed on the CPU" not in rules(alone)


def test_attention_is_found_without_a_graph_too():
    found = rules(engine_report.read_ort_profile(PROFILE))["attention not fused"]
    assert len(found.layers) == 36
    assert found.size_bytes == 6 * 4 * 4 * (480 * 480 + 480 * 24)


@pytest.mark.parametrize("timed", [True, False])
def test_figures(measured, rtx_int8, timed):
    layers = measured if timed else rtx_int8
    bars = plots.role_bars(layers.frame)
    total = sum(sum(trace.x) for trace in bars.data)
    assert total == pytest.approx(layers.total_ms if timed else len(layers.layers))
    areas = plots.module_treemap(layers.frame).data[0]
    assert len(areas.ids) == len(set(areas.ids)) == len(areas.parents)
    assert set(areas.parents) - {""} <= set(areas.ids)
    if timed:
        assert areas.values[0] == pytest.approx(layers.total_ms)


def test_figures_of_a_comparison(measured):
    slower = replace(measured, layers=tuple(replace(x, time_ms=2 * x.time_ms) for x in measured.layers))
    rows = engine_report.match_layers(measured, slower)
    figure = plots.difference_waterfall(engine_report.difference_by(rows), "a", "b")
    steps = figure.data[0].x
    assert steps[0] + sum(steps[1:-1]) == pytest.approx(steps[-1])
    sites = engine_report.difference_by(rows, "site")
    assert len(plots.site_dumbbells(sites, "a", "b", 5).data[-1].x) == 5
    with pytest.raises(WanlabError, match="missing"):
        plots.role_bars(rows)


def test_a_profile_says_how_it_was_taken(measured, folder):
    events = json.loads((folder / "measured" / "all.profile.json").read_text())
    assert events[-1]["args"] == {"launch_blocking": "0", "optimization": "all"}
    with pytest.raises(WanlabError, match="give one, or two"):
        engine_report.profile_levels(folder, "wan-nano", levels=["basic", "extended", "all"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_layers_add_up_to_about_the_run(tmp_path):
    _, first, second = engine_report.profile_levels(
        tmp_path, "wan-nano", device="cuda", dtype="float16", runs=4
    )
    for layers in (first, second):
        assert not any("CUDA_LAUNCH_BLOCKING" in note for note in layers.notes)
        assert sum(layer.provider == "CUDAExecutionProvider" for layer in layers.layers) > 50
        assert layers.latency_ms > 0
    engine_report.match_layers(first, second)
