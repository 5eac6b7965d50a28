"""ONNX Runtime as an engine: options, where nodes run, what fell back, its own profile."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx.parser
import pandas as pd
import pytest
import torch
from support import convert_tiny as tiny

from wanlab import engines, export, measure
from wanlab.core.errors import WanlabError
from wanlab.engines import onnxruntime as session
from wanlab.engines.onnxruntime import assigned_nodes, fallen_back, floating_nodes
from wanlab.export.components import component_spec, default_shape, random_feeds

pytestmark = pytest.mark.slow

COMPONENTS = ("text_encoder", "vae_encoder", "expert_high", "vae_decoder")


@pytest.fixture(scope="module")
def folder(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ort")
    model = tiny.bare(tiny.pipeline())
    model.spec = replace(model.spec, name="wan-nano")  # whose sizes the tiny model has
    exported(model, COMPONENTS, folder, height=64, width=96, frames=9)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return engines.OrtEngine(folder / "expert_high.onnx", provider="cpu", threads=1)


@pytest.mark.parametrize("component", COMPONENTS)
def test_inputs_can_be_drawn_from_the_file_alone(folder, component):
    engine = engines.OrtEngine(folder / f"{component}.onnx", provider="cpu")
    small = export.random_feeds(engine, height=32, width=48, frames=9, text_tokens=7, batch=2)
    again = export.random_feeds(engine, height=32, width=48, frames=9, text_tokens=7, batch=2)
    assert all(torch.equal(small[name], again[name]) for name in engine.inputs)
    for made in engine.run(small).values():
        assert made.shape[0] == 2
        assert torch.isfinite(made).all()
    with pytest.raises(WanlabError, match="33x48 is not legal"):
        export.random_feeds(engine, height=33, width=48)


def test_sizes_that_a_graph_is_fixed_to_are_not_passed_over(exported):
    model = tiny.bare(tiny.pipeline())
    model.spec = replace(model.spec, name="wan-nano")
    (report,) = exported(model, "expert_high", dynamic=False, height=64, width=96, frames=9)
    engine = engines.OrtEngine(report.path, provider="cpu", threads=1)
    feeds = export.random_feeds(engine, height=64, width=96, batch=1)
    assert engine.run(feeds)["velocity"].shape == (1, 16, 3, 8, 12)
    for size, axis in (
        ({"height": 32, "width": 96}, "latent_height"),
        ({"batch": 2}, "batch"),
        ({"text_tokens": 7}, "text_tokens"),
        ({"frames": 5}, "latent_frames"),
    ):
        with pytest.raises(WanlabError, match=rf"\({axis}\) is fixed at"):
            export.random_feeds(engine, **size)


def test_levels_of_optimisation_compute_the_same(folder, engine):
    feeds = export.random_feeds(engine, height=32, width=48, frames=9)
    expected = engine.run(feeds)["velocity"]
    for level in ("disabled", "basic", "extended"):
        other = engines.OrtEngine(engine.path, provider="cpu", threads=1, optimization=level)
        assert torch.allclose(other.run(feeds)["velocity"], expected, atol=1e-4), level
    with pytest.raises(WanlabError, match="did you mean 'extended'"):
        engines.OrtEngine(engine.path, provider="cpu", optimization="extnded")


def test_every_node_is_accounted_for(engine):
    counts = engine.nodes_by_provider()
    assert set(counts["provider"]) == {"CPUExecutionProvider"}
    assert counts["nodes"].sum() == len(assigned_nodes(engine.session)) > 50
    assert counts["nodes"].is_monotonic_decreasing


def test_nodes_that_compute_are_told_from_arithmetic_on_sizes(engine):
    floats = floating_nodes(engine.path)
    nodes = assigned_nodes(engine.session)
    # as if a CUDA session had put all of them on the CPU: what computes is lost, what handles sizes is not
    lost = fallen_back(nodes, floats)
    assert {"MatMul", "Conv", "LayerNormalization", "Softmax"} <= set(lost["operator"])
    assert "Shape" not in set(lost["operator"])
    kept = nodes.drop(lost.index)
    assert len(kept) > 5
    assert not [name for name in kept["node"] if floats.get(name)]
    unknown = pd.DataFrame([{"node": "new", "operator": "FusedMatMul", "provider": "CPUExecutionProvider"}])
    assert len(fallen_back(unknown, {})) == 1
    assert len(fallen_back(unknown.assign(provider="CUDAExecutionProvider"), {})) == 0
    assert len(fallen_back(unknown.iloc[:0], {})) == 0


def test_its_own_profile_names_the_nodes_and_leaves_the_session_alone(engine, tmp_path):
    feeds = export.random_feeds(engine, height=32, width=48, frames=9)
    before = engine.session
    path = engine.profile(feeds, tmp_path / "deep" / "profile.json", runs=2)
    assert engine.session is before
    events = json.loads(path.read_text())
    kernels = [
        event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]
    assert len({event["name"] for event in kernels}) > 40
    assert any(event["name"].startswith("blocks.0.attn1") for event in kernels)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["deep"]


def test_an_operator_without_a_kernel_is_named(tmp_path):
    text = """
    <ir_version: 9, opset_import: ["" : 20]>
    rounded (bfloat16[1, 3] x) => (bfloat16[1, 5] y)
    <int64[4] pads = {0, 2, 0, 0}> { y = Pad (x, pads) }
    """
    made = onnx.parser.parse_model(text)
    made.graph.node[0].name = "blocks.0/pad"
    onnx.save(made, tmp_path / "a.onnx")
    with pytest.raises(WanlabError, match=r"no kernel for Pad \(blocks\.0/pad\).*float16 or float32"):
        engines.OrtEngine(tmp_path / "a.onnx", provider="cpu")


def test_no_kernel_is_said_alike_by_every_provider():
    said = (
        "[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: transformer_memcpy.cc:253"
        " !node_provider_type.empty() was false. Provider type for DequantizeLinear node with name"
        " 'blocks.0.attn1.to_q/weight_dequantize' is not set."
    )
    why = session.load_failure(RuntimeError(said))
    assert why.startswith("it has no kernel for DequantizeLinear (blocks.0.attn1.to_q/weight_dequantize)")
    assert session.load_failure(RuntimeError("something else\nat length")) == "something else"


@pytest.mark.parametrize(
    ("formats", "on_cpu", "on_cuda"),
    [
        ("", True, True),
        ('{"int8": 60, "int8-weight": 7}', True, False),  # nothing there takes rounded inputs
        ('{"int8-weight": 67}', True, True),
        ('{"int4-weight": 60, "bf16": 7}', True, True),
        ('{"int8": 3, "fp8-channel": 64}', False, False),
    ],
)
def test_codes_are_fused_where_something_takes_them(formats, on_cpu, on_cuda):
    assert session.fuses_codes(formats, "cpu") is on_cpu
    assert session.fuses_codes(formats, "cuda") is on_cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_on_a_gpu_everything_stays_there(tmp_path, dtype):
    from wanlab import models

    model = models.load("wan-nano", components=["expert_high"], device="cuda", dtype=dtype)
    report = export.export(model, "expert_high", tmp_path / "a.onnx", opset=23)
    engine = engines.OrtEngine(report.path, provider="cuda")
    assert engines.parity(model, "expert_high", engine)["relative_l2"].max() < 3e-2
    feeds = {name: tensor.cuda() for name, tensor in export.random_feeds(engine).items()}
    expected = engine.run(feeds)["velocity"]
    assert expected.is_cuda
    for cuda_graph in (False, True):
        other = engines.OrtEngine(report.path, provider="cuda", cuda_graph=cuda_graph)
        output = torch.zeros_like(expected)
        call = other.bind(feeds, {"velocity": output}, cuda_graph=cuda_graph)
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        assert torch.equal(output, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["eager", "onnxruntime", "streamed_vae"])
@pytest.mark.parametrize("handle", [None, 0])
def test_a_bound_call_follows_what_is_queued_on_the_default_stream(tmp_path, kind, handle):
    from wanlab import models

    component = "vae_decoder" if kind == "streamed_vae" else "expert_high"
    model = models.load("wan-nano", components=[component], device="cuda", dtype="float16")
    engine = engines.open_component(kind, model, component, tmp_path)
    shape = default_shape(model, batch=1)
    plan = component_spec(model, component)
    given = dict(zip(plan.inputs, plan.inputs_for(shape, torch.Generator().manual_seed(0)), strict=True))
    feeds = {name: given[name].cuda().to(getattr(torch, kind[0])) for name, kind in engine.inputs.items()}
    expected = engine.run(feeds)
    late = {name: torch.zeros_like(tensor) for name, tensor in feeds.items()}
    outputs = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    call = engine.bind(late, outputs, stream=handle)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # cycles: the inputs come a tenth of a second later
    for name, tensor in feeds.items():
        late[name].copy_(tensor)
    call()
    torch.cuda.synchronize()
    for name, wanted in expected.items():
        assert torch.allclose(outputs[name], wanted, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_captured_graphs_keep_to_their_own_memory(tmp_path):
    from wanlab import models

    model = models.load("wan-nano", components=["expert_high"], device="cuda", dtype="float16")
    report = export.export(model, "expert_high", tmp_path / "a.onnx", opset=23)
    engine = engines.OrtEngine(report.path, provider="cuda", cuda_graph=True)
    feeds = {name: tensor.cuda() for name, tensor in export.random_feeds(engine).items()}
    halves = feeds | {"hidden_states": feeds["hidden_states"] / 2}
    expected = [engine.run(one)["velocity"] for one in (feeds, halves)]  # no capture, and none replayed
    assert not torch.allclose(*expected, atol=1e-2)
    outputs = [torch.zeros_like(one) for one in expected]
    calls = [
        engine.bind(one, {"velocity": output}, cuda_graph=True)
        for one, output in zip((feeds, halves), outputs, strict=True)
    ]
    for _ in range(3):
        for call in calls:
            call()
    torch.cuda.synchronize()
    for output, wanted in zip(outputs, expected, strict=True):
        assert torch.allclose(output, wanted, atol=1e-2)
    assert torch.allclose(engine.run(feeds)["velocity"], expected[0], atol=1e-2)


def test_modulation_for_every_token_is_not_computed_for_all_blocks_at_once(tmp_path):
    built = tiny.pipeline()
    built.register_modules(transformer=tiny.expert(2, num_layers=3), transformer_2=None)
    built.register_to_config(expand_timesteps=True, boundary_ratio=None)
    model = tiny.bare(built)
    model.spec = replace(model.spec, name="wan-nano")
    report = export.export(model, "expert", tmp_path / "expert.onnx", opset=23)
    engine = engines.OrtEngine(report.path, provider="cpu", threads=1)
    path = engine.profile(
        export.random_feeds(engine, height=32, width=48, frames=9), tmp_path / "p.json", runs=0
    )
    events = [event["name"] for event in json.loads(path.read_text()) if event.get("cat") == "Node"]
    order = [events.index(f"blocks.{i}/modulation_after_state_kernel_time") for i in range(3)]
    first = [
        min(i for i, name in enumerate(events) if name.startswith(f"blocks.{b}.attn1.to_q")) for b in range(3)
    ]
    assert order[0] < first[0] < order[1] < first[1] < order[2] < first[2]


def small_graph(folder, kind, shape, operator="Identity", out=None):
    """A graph of one node from x to y, of an element type of ONNX; without inputs where `kind` is None."""
    make = onnx.helper
    inputs = [] if kind is None else [make.make_tensor_value_info("x", kind, shape)]
    constant = onnx.numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
    node = make.make_node(operator, ["w" if kind is None else "x"], ["y"], **({"to": out} if out else {}))
    outputs = [make.make_tensor_value_info("y", out or kind or onnx.TensorProto.FLOAT, shape)]
    graph = make.make_graph([node], "g", inputs, outputs, [constant] if kind is None else [])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "a.onnx")
    return folder / "a.onnx"


@pytest.mark.parametrize(
    "kind", [None, onnx.TensorProto.BFLOAT16, onnx.TensorProto.BOOL, onnx.TensorProto.INT64]
)
def test_graphs_without_inputs_and_of_every_common_type_are_timed(tmp_path, kind):
    engine = engines.OrtEngine(small_graph(tmp_path, kind, [2, 3]), provider="cpu")
    feeds = random_feeds(engine)
    assert engine.run(feeds)["y"].shape == (2, 3)
    if kind:
        assert torch.equal(engine.run(feeds)["y"], feeds["x"])
    assert (
        measure.bench(engine, feeds, warmup_ms=0, duration_ms=1, iterations=2).samples["latency"].median > 0
    )


@pytest.mark.parametrize(
    ("kind", "shape", "said"),
    [
        (onnx.TensorProto.INT4, [2], "is int4; only numbers of 8 bits or more"),
        (onnx.TensorProto.FLOAT, [0, 8], "0x8: without numbers there is nothing to compute"),
    ],
)
def test_inputs_that_cannot_be_made_up_are_refused(tmp_path, kind, shape, said):
    path = small_graph(tmp_path, kind, shape, "Cast", onnx.TensorProto.FLOAT)
    with pytest.raises(WanlabError, match=said):
        random_feeds(engines.OrtEngine(path, provider="cpu"))


def test_a_graph_with_sequences_is_refused(tmp_path):
    make = onnx.helper
    graph = make.make_graph(
        [make.make_node("SplitToSequence", ["x"], ["s"], axis=0)],
        "g",
        [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 8])],
        [make.make_tensor_sequence_value_info("s", onnx.TensorProto.FLOAT, [1, 8])],
    )
    onnx.save(
        make.make_model(graph, opset_imports=[make.make_opsetid("", 21)], ir_version=10), tmp_path / "a.onnx"
    )
    with pytest.raises(WanlabError, match=r"'s' of a.onnx is seq\(tensor\(float\)\); only tensors are read"):
        engines.OrtEngine(tmp_path / "a.onnx", provider="cpu")
