"""Layers of engines from what was saved of them: module names, inspector JSON, profiles, graphs, times."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanlab import engine_report
from wanlab.core.errors import WanlabError
from wanlab.engine_report.from_tensorrt import dtype_in
from wanlab.engine_report.layers import (
    block_of,
    module_of,
    modules_in,
    onnx_nodes,
    role_of,
    site_of,
    tensorrt_kind,
)

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
INSPECTOR, ORT = FIXTURES / "inspector", FIXTURES / "ort_profile"
PROFILE = ORT / "nano_expert_cpu.json.gz"


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("blocks.0.attn1.to_q/node_linear", ("blocks.0.attn1.to_q",)),
        ("/blocks.0/attn1/to_q/MatMul", ("blocks.0.attn1.to_q",)),
        ("blocks.0.attn1/node_MatMul_3/MatMulScaleFusion/", ("blocks.0.attn1",)),
        ("a.b/x + a.c/y_myl0_3", ("a.b", "a.c")),
        ("a.b/x+a.c/y+a.b/z_myl0_3", ("a.b", "a.c")),
        ("PWN(a.b/x, PWN(a.c/y))", ("a.b", "a.c")),
        ("{ForeignNode[a.b/x...a.c/y]}", ("a.b", "a.c")),
        ("Reformatting CopyNode for Input Tensor 0 to a.b/x", ("a.b",)),
        ("blocks.7.ffn.net.0.proj.weight + ONNXTRT_Broadcast_12", ("blocks.7.ffn.net.0.proj",)),
        ("blocks/node_QuantizeLinear + blocks.3.attn2.to_k/node_MatMul", ("blocks.3.attn2.to_k",)),
        ("node_view_9/GatherSliceToSplitFusion", ()),
        ("__myl_FcAdd_myl0_20", ()),
        ("Transpose_token_5", ()),
        ("", ()),
    ],
)
def test_modules_are_found_in_the_names_of_layers(text, modules):
    assert modules_in([text]) == modules


@given(
    st.lists(
        st.from_regex(r"[a-z]\w{0,6}(\.[a-z]\w{0,6}){1,3}", fullmatch=True),
        min_size=1,
        max_size=5,
        unique=True,
    )
)
def test_joined_names_give_their_parts_back(modules):
    joined = " + ".join(f"{module}/node_{i}" for i, module in enumerate(modules))
    assert modules_in([joined]) == tuple(modules)
    metadata = "\x1e".join(f"[ONNX Layer: {module}/node]" for module in modules)
    assert tuple(module_of(node) for node in onnx_nodes(metadata)) == tuple(modules)


@given(st.text(max_size=80))
def test_any_name_can_be_read(text):
    for module in modules_in([text]):
        assert module
    assert tensorrt_kind(text, text, text)


@pytest.mark.parametrize(
    ("modules", "kind", "role"),
    [
        (["blocks.3.attn1.norm_q"], "norm", "attn1"),
        (["blocks.3.attn2.to_out.0", "blocks.3"], "matmul", "attn2"),
        (["blocks.3.attn2.to_out.0", "blocks.3.norm3"], "norm", "norm"),
        (["blocks.3.ffn.net.2", "blocks.3"], "matmul", "ffn"),
        (["blocks.3"], "pointwise", "norm"),
        (["condition_embedder.time_proj"], "matmul", "embeddings"),
        (["proj_out"], "matmul", "embeddings"),
        (["decoder.up_blocks.0.resnets.1.conv1"], "conv", "convolution"),
        (["encoder.block.0.layer.0.SelfAttention.q"], "matmul", "attn1"),
        (["encoder.block.0.layer.1.DenseReluDense.wi_0"], "matmul", "ffn"),
        (["decoder.mid_block.attentions.0.to_qkv"], "conv", "attn1"),
        (["blocks.3.attn1.to_q"], "cast", "reformat_cast"),
        (["blocks.3.attn1.to_q", "blocks.3.ffn.net.0"], "matmul", "several"),
        ([], "other", "other"),
    ],
)
def test_roles(modules, kind, role):
    assert role_of(modules, kind) == role


def test_blocks_and_sites():
    assert block_of(["blocks.12.attn1.to_q", "blocks.12"]) == 12
    assert block_of(["blocks.1.attn1", "blocks.2.attn1"]) is None
    assert site_of(["blocks.12.attn1.to_q", "blocks.3.attn1.to_q"]) == "blocks.*.attn1.to_q"
    assert site_of(["encoder.block.3.layer.0", "proj_out"]) == "encoder.block.*.layer.0, proj_out"


@pytest.mark.parametrize(
    ("layer_type", "name", "kind"),
    [
        ("kgen", "_gemm_mha_v2_myl0_39", "attention"),
        ("kgen", "__myl_MaxrSubExpSumDivMul_myl0_29", "softmax"),
        ("kgen", "__myl_AddSqrtDivMulMulReshTran_myl0_22", "norm"),
        ("kgen", "__myl_MoveReplConc_myl0_13", "layout"),
        ("kgen", "__myl_Cast_myl0_1", "cast"),
        ("kgen", "__myl_MulMinMaxRounCastReshTran_myl0_20", "quantize"),
        ("kgen", "__myl_AddMulMinMaxRounCast_myl0_28", "pointwise"),
        ("runtime_fusion", "__myl_FcAddMulTanh_myl0_35", "matmul"),
        ("gemm", "blocks.0.attn1.to_v/node_MatMul_1_myl0_38", "matmul"),
        ("correlation", "patch_embedding/node_conv", "conv"),
        ("CaskConvolution", "", "conv"),
        ("SoftMax", "", "softmax"),
        ("Matrix Multiply", "", "matmul"),
        ("signal", "", "sync"),
    ],
)
def test_what_a_layer_of_tensorrt_does(layer_type, name, kind):
    assert tensorrt_kind(layer_type, name) == kind


def test_both_schemas_of_the_inspector_say_the_same():
    old, new = (
        engine_report.read_inspector(INSPECTOR / f"documented_{name}.json") for name in ("10x", "11x")
    )
    assert old.frame.drop(columns=["inputs", "outputs"]).equals(new.frame.drop(columns=["inputs", "outputs"]))
    assert [layer.outputs[0].shape for layer in old.layers] == [
        layer.outputs[0].shape for layer in new.layers
    ]
    for layers in (old, new):
        assert [(t.name, t.dtype) for t in layers.inputs] == [("hidden", "fp32")]
        assert [(t.name, t.dtype) for t in layers.outputs] == [("velocity", "fp32")]
    rows = {layer.name: layer for layer in old.layers}
    fused = old.layers[1]
    assert fused.modules == ("blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn1.to_v")
    assert (fused.kind, fused.role, fused.precision, fused.weight_dtype) == (
        "matmul",
        "attn1",
        "fp16",
        "fp16",
    )
    assert fused.weight_bytes == 2 * (110592 + 576)
    # FP32 in, FP16 out: a cast, whatever TensorRT calls it; INT8 in two layouts is a reformat
    assert [layer.kind for layer in old.layers if layer.type == "Reformat"] == ["cast", "reformat"]
    assert rows["blocks.0.ffn.net.2/node_linear_8"].precision == "int8"
    assert old.layers[8].modules == ("blocks.0.ffn.net.2",)
    assert rows["blocks.0.attn1/node_Softmax_1"].activation_bytes == 4 * 480 * 480 * 2
    assert not old.timed


def test_an_engine_of_rtx_is_joined_to_modules():
    """Real: its builder fuses across modules and calls kernels by what they compute."""
    layers = engine_report.read_inspector(INSPECTOR / "rtx_expert_high_fixed_size.layers.json.gz")
    assert all(layer.modules for layer in layers.layers)
    assert Counter(layer.kind for layer in layers.layers)["softmax"] == 12
    merged = next(layer for layer in layers.layers if len(layer.modules) == 12)
    assert merged.site == "blocks.*.attn2.to_v, blocks.*.attn2.to_k"
    assert (merged.role, merged.block, merged.weight_dtype) == ("attn2", None, "fp32")
    # 3.37 million weights, a few of which TensorRT folds or repeats
    assert sum(layer.weight_bytes for layer in layers.layers) == pytest.approx(4 * 3.37e6, rel=0.02)
    assert {t.name for t in layers.inputs} == {"hidden_states", "timestep", "encoder_hidden_states"}
    assert [t.name for t in layers.outputs] == ["velocity"]


def test_layer_names_alone_are_refused_with_how_to_rebuild():
    data = json.loads((INSPECTOR / "documented_10x.json").read_text())
    for poor in ([layer["Name"] for layer in data["Layers"]], [{"Name": "a"}]):
        with pytest.raises(WanlabError, match="profilingVerbosity=detailed"):
            engine_report.read_inspector({"Layers": poor, "Bindings": []})
    with pytest.raises(WanlabError, match="verbosity was NONE"):
        engine_report.read_inspector({"Layers": []})
    with pytest.raises(WanlabError, match="no list of Layers"):
        engine_report.read_inspector({"layers": []})


def test_one_optimisation_profile_is_read():
    data = json.loads((INSPECTOR / "documented_10x.json").read_text())
    more = [layer | {"Name": layer["Name"] + " [profile 1]"} for layer in data["Layers"]]
    both = {"Layers": [*data["Layers"], *more], "Bindings": [*data["Bindings"], "hidden [profile 1]"]}
    first = engine_report.read_inspector(both)
    assert len(first.layers) == len(data["Layers"])
    assert "other optimisation profiles" in first.notes[0]
    assert all(
        layer.name.endswith("[profile 1]")
        for layer in engine_report.read_inspector({"Layers": more}, profile=1).layers
    )
    with pytest.raises(WanlabError, match="no optimisation profile 1"):
        engine_report.read_inspector(data, profile=1)


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("Row major linear FP16 format", "fp16"),
        ("Half", "fp16"),
        ("BFloat16", "bf16"),
        ("Float", "fp32"),
        ("Thirty-two wide channel vectorized row major Int8 format.", "int8"),
        ("FP8", "fp8"),
        ("Int64", "int64"),
        ("N/A due to dynamic shapes", ""),
    ],
)
def test_dtypes_of_tensorrt(text, dtype):
    assert dtype_in(text) == dtype


def test_times_of_trtexec_are_joined_by_name():
    engine = INSPECTOR / "documented_11x.json"
    layers = engine_report.read_layers(
        engine, [INSPECTOR / "documented_profile.json", INSPECTOR / "documented_times.json"]
    )
    assert layers.total_ms == pytest.approx(0.94)
    assert layers.latency_ms == pytest.approx(0.82)
    report = engine_report.summarize(layers)
    assert "15 % more" in report.caveat
    assert report.totals["beyond_layers_ms"] == pytest.approx(-0.12)
    rows = json.loads((INSPECTOR / "documented_profile.json").read_text())
    poor = engine_report.with_times(
        engine_report.read_inspector(engine), [*rows[:5], {"name": "lost", "averageMs": 1.0}]
    )
    assert [math.isnan(layer.time_ms) for layer in poor.layers] == [False] * 4 + [True] * 7
    assert "7 of 11 layers have no time" in poor.notes[-2]
    assert "1.000 ms, are not in the engine" in poor.notes[-1]
    with pytest.raises(WanlabError, match="same engine"):
        engine_report.with_times(poor, [{"name": "lost", "averageMs": 1.0}])


def test_latency_comes_from_a_benchmark_too(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(
        json.dumps({"samples": {"device": {"values_ms": [3.0, 1.0, 2.0]}, "latency": {"values_ms": [9.0]}}})
    )
    assert engine_report.read_latency(path) == 2.0
    with pytest.raises(WanlabError, match="no times of runs"):
        engine_report.read_latency(INSPECTOR / "documented_profile.json")


def test_a_profile_of_onnxruntime_becomes_layers():
    layers = engine_report.read_ort_profile(PROFILE)
    assert len(layers.layers) == 629
    assert layers.facts["runs"] == 4
    assert all(len(layer.samples_ms) == 4 for layer in layers.layers)
    assert all(layer.time_ms == sum(sorted(layer.samples_ms)[1:3]) / 2 for layer in layers.layers)
    # summed medians of layers are below the run they are of; the profiler's own work lies between them
    assert 0.5 < layers.total_ms / layers.facts["run_ms"] < 1
    assert Counter(layer.type for layer in layers.layers)["SimplifiedLayerNormalization"] == 24
    softmax = next(layer for layer in layers.layers if layer.type == "Softmax")
    assert softmax.outputs[0].shape == (1, 4, 480, 480)
    assert (softmax.precision, softmax.provider, softmax.role) == ("fp32", "CPUExecutionProvider", "attn1")
    # nodes that ONNX Runtime made have names of no module: their neighbours tell
    made = [layer for layer in layers.layers if layer.name.startswith("gemm_")]
    assert made
    assert {layer.joined_by for layer in made} == {"order"}
    around = {layer.name: layer for layer in layers.layers}
    assert around["gemm_input_reshape"].modules == ("condition_embedder.text_embedder.linear_1",)
    assert sum(not layer.modules for layer in layers.layers) < 10
    assert "packed" in layers.notes[-1]


def test_a_profile_of_cuda_on_an_h200():
    layers = engine_report.read_ort_profile(ORT / "h200_expert_high_float16.json.gz")
    report = engine_report.summarize(layers)
    assert (layers.times_of, layers.notes[0][:19]) == ("launches", "times of CUDA nodes")
    assert "take most of the launch time on the host" in report.answer().headline
    assert Counter(layer.provider for layer in layers.layers)["CUDAExecutionProvider"] > 400
    kinds = Counter(layer.kind for layer in layers.layers)
    assert (kinds["attention"], kinds["norm"], kinds["other"]) == (12, 43, 0)
    assert {layer.precision for layer in layers.layers if layer.kind == "attention"} == {"fp16"}
    found = {finding.rule: finding for finding in report.findings}
    assert {"FP32 islands", "conversions"} <= set(found)
    assert {layer.type for layer in found["conversions"].layers} == {"Cast"}
    # what runs on the CPU there is arithmetic on sizes
    assert not {"attention not fused", "norm not fused", "computed on the CPU"} & set(found)
    assert sum(bool(layer.modules) for layer in layers.layers) > 0.98 * len(layers.layers)


def test_blocking_launches_give_times_of_layers():
    layers = engine_report.read_ort_profile(ORT / "h200_expert_high_float16_blocking.json.gz")
    assert layers.times_of == "layers"
    assert not any("CUDA_LAUNCH_BLOCKING" in note for note in layers.notes)
    assert "launch time" not in engine_report.summarize(layers).answer().headline
    # a node that waits for its kernels takes longer than one that only launches them
    launches = engine_report.read_ort_profile(ORT / "h200_expert_high_float16.json.gz")
    assert layers.total_ms > launches.total_ms


def test_compressed_and_plain_files_read_alike(tmp_path):
    plain = tmp_path / "profile.json"
    plain.write_bytes(gzip.decompress(PROFILE.read_bytes()))
    one, other = engine_report.read_layers(plain), engine_report.read_layers(PROFILE)
    assert one.frame.equals(other.frame)


def test_times_of_cuda_nodes_carry_their_caveat():
    events = json.loads(gzip.decompress(PROFILE.read_bytes()))
    for event in events:
        if event.get("cat") == "Node":
            event["args"]["provider"] = "CUDAExecutionProvider"
    assert any("CUDA_LAUNCH_BLOCKING" in note for note in engine_report.read_ort_profile(events).notes)
    mark = {"cat": "wanlab", "name": "wanlab", "args": {"launch_blocking": "1"}}
    assert not any(
        "CUDA_LAUNCH_BLOCKING" in note for note in engine_report.read_ort_profile([*events, mark]).notes
    )
    assert not any(
        "CUDA_LAUNCH_BLOCKING" in note for note in engine_report.read_ort_profile(events, blocking=True).notes
    )


def test_files_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(WanlabError, match="goes with a profile"):
        engine_report.read_layers(INSPECTOR / "documented_10x.json", ["graph.onnx"])
    with pytest.raises(WanlabError, match="go with inspector JSON"):
        engine_report.read_layers(PROFILE, [INSPECTOR / "documented_profile.json"])
    with pytest.raises(WanlabError, match="neither inspector JSON"):
        engine_report.read_layers(INSPECTOR / "documented_profile.json")
    with pytest.raises(WanlabError, match="no file"):
        engine_report.read_layers(tmp_path / "nothing.json")
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    with pytest.raises(WanlabError, match="not JSON"):
        engine_report.read_layers(bad)
    with pytest.raises(WanlabError, match="no node events"):
        engine_report.read_ort_profile([{"cat": "Session", "name": "model_run", "dur": 1, "ts": 0}])


@pytest.mark.parametrize("duration", [-1.0, 1e14])
def test_an_event_of_an_impossible_duration_is_left_out_and_counted(duration):
    event = {
        "cat": "Node",
        "name": "a_kernel_time",
        "ts": 0,
        "dur": 5.0,
        "args": {"op_name": "Add", "node_index": "0"},
    }
    wrong = event | {"name": "b_kernel_time", "ts": 9, "dur": duration}
    layers = engine_report.read_ort_profile([event, wrong])
    assert [layer.name for layer in layers.layers] == ["a"]
    assert layers.layers[0].time_ms == 0.005
    assert "1 of 2 events have an impossible duration and are left out" in layers.notes
    with pytest.raises(WanlabError, match="1 of 1 events have an impossible duration"):
        engine_report.read_ort_profile([wrong])


def test_nodes_of_a_body_are_part_of_the_time_of_its_loop():
    def node(name, ts, dur, operator, tid=1):
        args = {"op_name": operator, "node_index": name[-1]}
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "tid": tid, "args": args}

    run = [
        ("Relu_1", 11, 4, "Relu"),
        ("Relu_1", 16, 4, "Relu"),
        ("Loop_0", 10, 12, "Loop"),
        ("Add_2", 22, 5, "Add"),
    ]
    events = [node(name, ts + start, dur, kind) for start in (0, 100) for name, ts, dur, kind in run]
    layers = engine_report.read_ort_profile([*events, node("Mul_3", 12, 2, "Mul", tid=2)])
    assert [(layer.name, layer.time_ms) for layer in layers.layers] == [
        ("Loop_0", 0.012),
        ("Mul_3", 0.002),
        ("Add_2", 0.005),
    ]
    assert "1 nodes of bodies of Loop, If and Scan are part of the times of those" in layers.notes


def test_planned_formats_are_read_from_files(tmp_path):
    assert engine_report.read_planned(None) == {}
    flat = tmp_path / "plan.yaml"
    flat.write_text('"blocks.*.attn1.to_q": int8\n')
    assert engine_report.read_planned(flat) == {"blocks.*.attn1.to_q": "int8"}
    report = tmp_path / "graph.json"
    report.write_text(json.dumps({"layers": [{"layer": "blocks.0.attn1.to_q", "format": "fp8"}]}))
    assert engine_report.read_planned(report) == {"blocks.0.attn1.to_q": "fp8"}
    report.write_text("[1]")
    with pytest.raises(WanlabError, match="no mapping"):
        engine_report.read_planned(report)
