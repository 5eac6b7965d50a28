"""TVM on the CPU, for real: the same numbers as PyTorch, and a library only while it is what its build information says."""

from __future__ import annotations

import json
import os
import shutil
import sys

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import convert_tiny as tiny

pytest.importorskip("tvm")

from msgspec.structs import replace

from wanlab import engines, export
from wanlab.core.errors import WanlabError
from wanlab.engines.parity import differences
from wanlab.engines.tvm.build import TvmBuildInfo, rewrite
from wanlab.export.components import component_spec

pytestmark = pytest.mark.slow

SIZE = dict(height=48, width=80, frames=9, text_tokens=7)  # 45 tokens: no tile divides them
SHAPE = export.ClipShape(1, 48, 80, 9, 7)


@pytest.fixture(scope="module")
def model():
    return tiny.bare(tiny.pipeline())


@pytest.fixture(scope="module")
def graph(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("tvm") / "expert_high.onnx"
    export.export(model, "expert_high", path, dynamic=False, **SIZE)
    return path


@pytest.fixture(scope="module")
def built(graph):
    return engines.build_tvm(graph)


@pytest.fixture(scope="module")
def engine(built):
    return engines.TvmEngine(built.path, threads=1)


@pytest.fixture(scope="module")
def feeds(model):
    plan = component_spec(model, "expert_high")
    inputs = plan.inputs_for(SHAPE, torch.Generator().manual_seed(0))
    return dict(zip(plan.inputs, inputs, strict=True))


@pytest.fixture(scope="module")
def expected(model, feeds):
    with torch.no_grad():
        return component_spec(model, "expert_high").reference(*feeds.values())


def small(path, nodes, inputs, outputs, constants=(), opset=20):
    """An ONNX file of a few nodes; inputs and outputs are name -> shape."""
    helper = onnx.helper

    def infos(values):
        return [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in values.items()]

    weights = [onnx.numpy_helper.from_array(value, name) for name, value in constants]
    body = helper.make_graph(nodes, "small", infos(inputs), infos(outputs), weights)
    made = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    if path is not None:
        onnx.save(made, path)
    return made


def by_onnxruntime(model, feeds):
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def test_it_computes_what_pytorch_computes(engine, built, feeds, expected):
    apart = differences(expected, engine.run(feeds)["velocity"])
    assert apart["relative_l2"] < 1e-5
    assert apart["cosine"] > 0.999999
    assert built.rewrites == {"patch convolution": 1, "tanh Gelu": 2, "square": 4}
    assert 0 < built.scheduled <= built.kernels < built.nodes


def test_plain_schedules_and_exact_mathematics_agree_too(graph, feeds, expected, tmp_path):
    plain = engines.build_tvm(graph, tmp_path / "plain.so", schedule="plain", fast_math=False)
    assert plain.scheduled == 0
    made = engines.TvmEngine(plain.path, graph=graph, threads=1).run(feeds)["velocity"]
    assert differences(expected, made)["relative_l2"] < 1e-5


def test_it_is_an_engine(engine, built, feeds):
    assert engine.name == "tvm-llvm"
    assert engine.device == torch.device("cpu")
    assert engine.inputs["hidden_states"] == ("float32", (1, 36, 3, 6, 10))
    assert engine.outputs == {"velocity": ("float32", (1, 16, 3, 6, 10))}
    assert engine.metadata["component"] == "expert_high"
    assert engine.size_bytes == os.path.getsize(built.path)
    assert engine.load_ms > 0
    assert built.build_ms == pytest.approx(built.row()["build_ms"])
    once = engine.run(feeds)["velocity"]
    # Other dtypes and strides, and memory that no vector may be loaded from, are taken care of.
    odd = {name: value.double() for name, value in feeds.items()}
    shifted = torch.empty(feeds["hidden_states"].numel() + 1)[1:].view_as(feeds["hidden_states"])
    odd["hidden_states"] = shifted.copy_(feeds["hidden_states"])
    assert torch.equal(once, engine.run(odd)["velocity"])


def test_bound_memory_is_written_in_place(engine, feeds):
    inputs = {name: value.clone() for name, value in feeds.items()}
    outputs = {"velocity": torch.full((1, 16, 3, 6, 10), torch.nan)}
    call = engine.bind(inputs, outputs)
    assert call() is None
    assert torch.equal(outputs["velocity"], engine.run(feeds)["velocity"])
    inputs["hidden_states"].mul_(0.5)
    call()
    assert torch.equal(outputs["velocity"], engine.run(inputs)["velocity"])
    assert not torch.equal(outputs["velocity"], engine.run(feeds)["velocity"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(hidden_state=torch.zeros(1)), "did you mean 'hidden_states'"),
        (dict(timestep=None), "misses input 'timestep'"),
        (dict(timestep=torch.zeros(2)), r"'timestep' of .* is \[2\], the library takes \[1\]"),
    ],
)
def test_wrong_inputs_are_refused_by_name(engine, feeds, change, said):
    wrong = {name: value for name, value in (feeds | change).items() if value is not None}
    with pytest.raises(WanlabError, match=said):
        engine.run(wrong)


def test_bind_refuses_what_does_not_fit(engine, feeds):
    outputs = {"velocity": torch.empty(1, 16, 3, 6, 10)}
    with pytest.raises(WanlabError, match="CUDA graph"):
        engine.bind(feeds, outputs, cuda_graph=True)
    with pytest.raises(WanlabError, match=r"torch\.float64"):
        engine.bind(feeds, {"velocity": outputs["velocity"].double()})
    with pytest.raises(WanlabError, match="misses output 'velocity'"):
        engine.bind(feeds, {})
    with pytest.raises(WanlabError, match="contiguous"):
        engine.bind(feeds | {"hidden_states": torch.empty(1, 36, 3, 10, 6).transpose(3, 4)}, outputs)


def test_the_pipeline_runs_on_it(model, engine):
    changed = engines.use(model, {"expert_high": engine})
    assert changed.pipeline.transformer is not model.pipeline.transformer
    with torch.no_grad():
        inputs = component_spec(model, "expert_high").inputs_for(SHAPE, torch.Generator().manual_seed(3))
        made = changed.pipeline.transformer(*inputs, return_dict=False)[0]
        eager = model.pipeline.transformer(*inputs, return_dict=False)[0]
    assert differences(eager, made)["relative_l2"] < 1e-5


def test_a_component_as_calls_of_every_engine(model, tmp_path):
    ready = engines.engine_calls(model, None, tmp_path, threads=1, **SIZE)
    assert ready.component == "expert_high"
    assert ready.size == {"height": 48, "width": 80, "frames": 9}
    assert list(ready.calls) == ["eager", "onnxruntime-cpu", "tvm-llvm"]
    assert ready.left_out == {}
    assert ready.facts["eager"]["relative_l2"] == 0
    for name, call in ready.calls.items():
        assert call() is not None
        assert ready.facts[name]["relative_l2"] < 1e-5
        assert ready.facts[name]["size_bytes"] > 0
    with pytest.raises(WanlabError, match="did you mean 'tvm'"):
        engines.engine_calls(model, None, tmp_path, engines=["tmv"], **SIZE)


def test_engines_that_cannot_be_had_are_left_out_with_the_reason(model, tmp_path, monkeypatch):
    from wanlab.engines import component_bench as calls

    monkeypatch.setitem(sys.modules, "tvm", None)
    ready = engines.engine_calls(model, None, tmp_path, engines=["tvm"], **SIZE)
    assert list(ready.calls) == ["eager"]
    assert "pip install" in ready.left_out["tvm"]
    monkeypatch.setattr(calls, "SMALL_BYTES", 1)
    ready = engines.engine_calls(model, "expert_low", tmp_path, **SIZE)
    assert list(ready.calls) == ["eager"]
    assert ready.left_out.keys() == {"onnxruntime", "tvm"}
    assert "GiB of weights" in ready.left_out["tvm"]


def test_threads_are_counted_and_the_process_is_left_free(built, feeds):
    before = os.sched_getaffinity(0)
    two = engines.TvmEngine(built.path, threads=min(2, os.cpu_count()))
    one = engines.TvmEngine(built.path, threads=1)
    for _ in range(2):
        torch.testing.assert_close(two.run(feeds), one.run(feeds))
    assert os.sched_getaffinity(0) == before  # TVM's default ties the caller to one core
    with pytest.raises(WanlabError, match="threads is 100000; give 1 to"):
        engines.TvmEngine(built.path, threads=100_000)


def test_a_library_is_built_once(graph, built):
    again = engines.build_tvm(graph)
    assert again.cached
    assert not built.cached
    assert again.engine_sha256 == built.engine_sha256
    assert TvmBuildInfo.read(built.path) == built


def test_a_library_for_a_gpu_is_refused_where_there_is_none(built, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    library = shutil.copy(built.path, tmp_path / "gpu.so")
    replace(built, path=str(library), target={"kind": "cuda", "arch": "sm_90"}).write()
    with pytest.raises(WanlabError, match=r"gpu\.so was built for sm_90; TVM sees no NVIDIA GPU here"):
        engines.TvmEngine(library)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(version="0.1"), r"built by TVM 0\.1, this is"),
        (dict(target={"kind": "llvm", "mcpu": "z80"}), "built for z80, this machine is"),
        (dict(engine_sha256="0" * 64), "its bytes differ"),
        (dict(graph_sha256="0" * 64), "was not built from this expert_high.onnx"),
        ("nothing", "has no build information"),
        ("broken", "cannot be read"),
    ],
)
def test_a_stale_or_foreign_library_is_refused_with_the_reason(built, graph, tmp_path, change, said):
    library = shutil.copy(built.path, tmp_path / "copy.so")
    shutil.copy(graph, tmp_path / graph.name)
    if isinstance(change, dict):
        replace(built, path=str(library), **change).write()
    elif change == "broken":
        TvmBuildInfo.file(library).write_text(json.dumps({"path": 1}))
    with pytest.raises(WanlabError, match=said) as refusal:
        engines.TvmEngine(library)
    assert "build" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_another_graph_is_another_library(built, graph, tmp_path):
    changed = onnx.load(graph)
    weight = next(t for t in changed.graph.initializer if t.name.endswith("to_q.bias"))
    array = onnx.numpy_helper.to_array(weight).copy()
    array.flat[0] += 1
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(changed, tmp_path / graph.name)
    with pytest.raises(WanlabError, match="whose content differs"):
        engines.TvmEngine(built.path, graph=tmp_path / graph.name)


def test_what_cannot_be_built_is_said_in_one_line(model, graph, tmp_path):
    with pytest.raises(WanlabError, match="no ONNX file"):
        engines.build_tvm(tmp_path / "none.onnx")
    with pytest.raises(WanlabError, match="did you mean 'tiled'"):
        engines.build_tvm(graph, schedule="tile")
    with pytest.raises(WanlabError, match="did you mean 'cuda'"):
        engines.build_tvm(graph, target="cdua")
    with pytest.raises(WanlabError, match=r"give target='cuda:9\.0'"):
        engines.build_tvm(graph, target="cuda:ninety")
    if not torch.cuda.is_available():
        with pytest.raises(WanlabError, match="TVM sees no NVIDIA GPU here"):
            engines.build_tvm(graph, target="cuda")
    free = tmp_path / "free.onnx"
    small(free, [onnx.helper.make_node("Relu", ["x"], ["y"])], {"x": ["batch", 3]}, {"y": ["batch", 3]})
    with pytest.raises(WanlabError, match=r"'x' of free\.onnx has free axes \(batch\).*dynamic=False"):
        engines.build_tvm(free)
    half = tmp_path / "half.onnx"
    node = onnx.helper.make_node("Cast", ["w"], ["y"], to=onnx.TensorProto.FLOAT)
    small(half, [node], {"x": [3]}, {"y": [3]}, [("w", np.ones(3, np.float16))])
    with pytest.raises(WanlabError, match="half precision"):
        engines.build_tvm(half)
    with pytest.raises(WanlabError, match="dtype='bfloat16'"):
        engines.build_tvm(half, target="cuda:9.0")


def test_an_operator_that_tvm_lacks_is_named_with_its_node(graph, model, tmp_path):
    lacking = tmp_path / "lacking.onnx"
    node = onnx.helper.make_node("StringNormalizer", ["x"], ["y"], name="blocks.0.attn1/StringNormalizer_3")
    small(lacking, [node], {"x": [3]}, {"y": [3]})
    with pytest.raises(
        WanlabError, match=r"TVM has no StringNormalizer \(blocks\.0\.attn1/StringNormalizer_3\)"
    ):
        engines.build_tvm(lacking)
    newer = tmp_path / "newer.onnx"
    export.export(model, "expert_high", newer, dynamic=False, opset=23, **SIZE)
    with pytest.raises(WanlabError, match=r"TVM .* \(blocks\.0\.attn1/.*opset 20") as refusal:
        engines.build_tvm(newer)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("*.so"))


def test_a_missing_package_is_one_line(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(WanlabError, match=r'tvm is not installed; add it with: pip install "wanlab\[tvm\]"'):
        engines.build_tvm(graph)


@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), (1, 1, 192, 64), (2, 7, 13, 5), (1, 6, 64, 48), (3, 12, 80, 1), (1, 97, 96, 33)]
)
def test_the_tiled_product_is_exact_at_any_size(size, tmp_path):
    batch, rows, columns, depth = size
    draw = np.random.default_rng(0)
    a, b, c = (
        draw.standard_normal(shape).astype(np.float32)
        for shape in ((batch, rows, depth), (batch, depth, columns), (columns,))
    )
    nodes = [
        onnx.helper.make_node("MatMul", ["a", "b"], ["ab"]),
        onnx.helper.make_node("Add", ["ab", "c"], ["sum"]),
        onnx.helper.make_node("Relu", ["sum"], ["y"]),
    ]
    path = tmp_path / "product.onnx"
    small(path, nodes, {"a": a.shape, "b": b.shape}, {"y": (batch, rows, columns)}, [("c", c)])
    made = engines.build_tvm(path)
    assert made.kernels == 1
    assert made.scheduled == (depth > 1)
    tensors = {"a": torch.from_numpy(a), "b": torch.from_numpy(b)}
    got = engines.TvmEngine(made.path, threads=1).run(tensors)["y"]
    torch.testing.assert_close(got, torch.from_numpy(np.maximum(a @ b + c, 0)), rtol=1e-5, atol=1e-5)


@given(
    kernel=st.lists(st.integers(1, 3), min_size=2, max_size=3),
    grid=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    batch=st.integers(1, 2),
    bias=st.booleans(),
)
@settings(max_examples=25)
def test_rewrites_change_no_number(kernel, grid, channels, batch, bias):
    draw = np.random.default_rng(1)
    size = [k * n for k, n in zip(kernel, grid, strict=False)]
    x = draw.standard_normal((batch, channels[0], *size)).astype(np.float32)
    weight = draw.standard_normal((channels[1], channels[0], *kernel)).astype(np.float32)
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["x", "w", "b"][: 2 + bias], ["u"], name="patch", kernel_shape=kernel, strides=kernel),
        node("Gelu", ["u"], ["v"], name="gelu", approximate="tanh"),
        node("Pow", ["v", "two"], ["y"], name="pow"),
    ]
    constants = [("w", weight), ("b", np.ones(channels[1], np.float32)), ("two", np.float32(2))]
    made = small(None, nodes, {"x": x.shape}, {"y": (batch, channels[1], *grid[: len(kernel)])}, constants)
    before = by_onnxruntime(made, {"x": x})
    assert rewrite(made) == {"patch convolution": 1, "tanh Gelu": 1, "square": 1}
    onnx.checker.check_model(made, full_check=True)
    assert not {"Conv", "Gelu", "Pow"} & {n.op_type for n in made.graph.node}
    np.testing.assert_allclose(by_onnxruntime(made, {"x": x}), before, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "change", [dict(strides=[1, 1]), dict(pads=[1, 1, 1, 1]), dict(group=2), dict(dilations=[2, 2])]
)
def test_other_convolutions_are_left_alone(change):
    constants = [("w", np.ones((2, 2 // change.get("group", 1), 2, 2), np.float32))]
    settings = dict(kernel_shape=[2, 2], strides=[2, 2]) | change
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], **settings)
    made = small(None, [node], {"x": [1, 2, 4, 4]}, {"y": None}, constants)
    assert rewrite(made)["patch convolution"] == 0
