"""Q/DQ graphs: every layer that was asked for computes in its format, and nothing else does."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from support import convert_tiny as tiny

from wanlab import export, models, precision
from wanlab.core.errors import InternalError, WanlabError
from wanlab.export.graph import file_bytes
from wanlab.precision.assignment import layer_set_key
from wanlab.precision.formats import decode_weight, encode_weight, get_format
from wanlab.precision.qdq import read_quantized_report
from wanlab.precision.quant_linear import fake_quantize

pytestmark = pytest.mark.slow

EXPERTS = ("expert_high", "expert_low")
NAMES = ("int8", "fp8", "fp8-channel", "int8-weight", "int4-weight", "int4-weight-32")
CODES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN, "int4": TensorProto.INT4}
SIZE = dict(height=64, width=64, frames=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("qdq")


@pytest.fixture(scope="module")
def model():
    return models.load("wan-nano", device="cpu")


@pytest.fixture(scope="module")
def graphs(model, folder, exported):
    reports = exported(model, EXPERTS, folder, opset=23, dynamic=False, **SIZE)
    return {report.component: report.path for report in reports}


@pytest.fixture(scope="module")
def recording(model, folder):
    return precision.record_inputs(
        model, precision.nano_examples(2), folder / "recording", steps=3, progress=False, **SIZE
    )


@pytest.fixture(scope="module")
def calibrations(model, recording):
    return {
        name: precision.calibrate(model, name, recording, method="max", progress=False) for name in EXPERTS
    }


@pytest.fixture(scope="module")
def quantized(graphs, calibrations, folder):
    """Format -> report, of expert_high."""
    return {
        name: precision.quantize(
            graphs["expert_high"],
            folder / name / "expert_high.onnx",
            format=name,
            calibration=calibrations["expert_high"],
        )
        for name in NAMES
    }


def session(path, optimised: bool = False, **entries):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if not optimised:  # what the graph says, without what ONNX Runtime makes of it
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds(recording, call) -> dict[str, np.ndarray]:
    return {name: value.float().numpy() for name, value in recording.inputs(call).items()}


def error(a, b) -> float:
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    return float((a - b).norm() / b.norm())


def load(path):
    return onnx.load(path, load_external_data=False)


# ---- effect


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_that_was_asked_for_is_quantised(quantized, graphs, name):
    report, wanted = quantized[name], get_format(name)
    assert report.quantized == report.requested == {name: 60}
    before, after = load(graphs["expert_high"]), load(report.path)
    counts = Counter(node.op_type for node in after.graph.node)
    pairs = 37 if wanted.activation else 0  # 60 layers, of which 18 + 12 share 6 + 1 inputs
    assert counts["QuantizeLinear"] == pairs
    assert counts["DequantizeLinear"] == 60 + pairs
    # Nothing else changed: the operators are those of before, in their order.
    plain = [node.op_type for node in after.graph.node if "quantize" not in node.name]
    assert plain == [node.op_type for node in before.graph.node]
    kinds = Counter(tensor.data_type for tensor in after.graph.initializer)
    assert kinds[CODES[wanted.weight.kind]] == 60 + (wanted.activation is not None)
    names = {tensor.name for tensor in after.graph.initializer}
    assert not [name for name in names if name.startswith("blocks.") and name.endswith(("weight.T", "weight"))
                and "norm" not in name]  # fmt: skip
    assert "blocks.0.attn1.to_q.bias" in names
    assert report.size_bytes == file_bytes(report_path(report))
    assert report.size_bytes < 0.5 * report.size_before_bytes


def report_path(report):
    from pathlib import Path

    return Path(report.path)


def test_inputs_are_quantised_where_they_are_read_and_biases_never(quantized):
    graph = load(quantized["int8"].path).graph
    biases = {tensor.name for tensor in graph.initializer if tensor.name.endswith(".bias")}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not biases & set(node.input)
    queries = [
        node for node in graph.node if node.name.startswith("blocks.1.attn1.to_") and node.op_type == "MatMul"
    ]
    inputs = {node.name.split("/")[0].rpartition(".")[2]: node.input[0] for node in queries}
    assert inputs["to_q"] == inputs["to_k"] == inputs["to_v"] != inputs["0"]
    layer = quantized["int8"].frame().set_index("layer").loc["blocks.1.attn1.to_q"]
    assert set(layer["shared_with"]) == {"blocks.1.attn1.to_k", "blocks.1.attn1.to_v"}
    assert layer["activation_scale"] == pytest.approx(layer["activation_amax"] / 127)
    assert layer["weight_bytes"] == 192 * 192 + 192 * 4
    assert layer["weight_before_bytes"] == 192 * 192 * 4


def test_siblings_take_the_largest_range(graphs, calibrations, folder):
    calibration = calibrations["expert_high"]
    amax = dict(calibration.amax)
    amax["blocks.0.attn1.to_k"] = 100.0
    changed = SimpleNamespace(
        amax=amax, key="changed", model=calibration.model, component=calibration.component
    )
    report = precision.quantize(
        graphs["expert_high"], folder / "siblings.onnx", format="int8", calibration=changed
    )
    table = report.frame().set_index("layer")["activation_amax"]
    assert {table[f"blocks.0.attn1.to_{x}"] for x in "qkv"} == {100.0}
    assert table["blocks.1.attn1.to_k"] == amax["blocks.1.attn1.to_k"]


def test_the_file_says_what_it_is(quantized, calibrations):
    report = quantized["int8"]
    metadata = {entry.key: entry.value for entry in load(report.path).metadata_props}
    assert json.loads(metadata["wanlab_format"]) == {"int8": 60}
    assert metadata["wanlab_layers"] == layer_set_key(calibrations["expert_high"].layers) == report.layer_set
    assert metadata["wanlab_calibration"] == calibrations["expert_high"].key == report.calibration
    assert (metadata["component"], metadata["model"]) == ("expert_high", "wan-nano")
    assert read_quantized_report(report.path) == report
    assert len({other.key for other in quantized.values()}) == len(quantized)
    assert quantized["int4-weight"].row()["formats"] == "60 int4-weight"


# ---- arithmetic


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_computes_what_its_format_says(model, recording, quantized, name):
    """Layer by layer, from the input that ONNX Runtime gave it: no error of one layer reaches the next."""
    path = quantized[name].path
    proto = onnx.load(path)
    asked = {layer.layer: layer for layer in quantized[name].layers}
    makers = {output: node for node in proto.graph.node for output in node.output}
    ends = {}
    for node in proto.graph.node:
        layer = node.name.split("/")[0]
        if layer in asked and node.op_type == "MatMul":
            dequantize = makers[node.input[0]]
            source = dequantize
            if dequantize.op_type == "DequantizeLinear":
                source = makers[dequantize.input[0]]
                ends[layer] = (source.input[0], node.output[0])
            else:
                ends[layer] = (node.input[0], node.output[0])
    assert set(ends) == set(asked)
    for value in {value for pair in ends.values() for value in pair}:
        proto.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))
    checked = quantized_copy(path, proto)
    call = recording.of("expert_high")[0]
    engine = session(checked)
    names = [output.name for output in engine.get_outputs()]
    values = dict(zip(names, engine.run(None, feeds(recording, call)), strict=True))
    network, wanted = model.component("expert_high"), get_format(name)
    for layer, (before, after) in ends.items():
        x = torch.from_numpy(values[before])
        if wanted.activation:
            x = fake_quantize(x, torch.tensor(asked[layer].activation_scale), wanted.activation)
        codes, scale = encode_weight(network.get_submodule(layer).weight.data, wanted.weight, torch.float32)
        weight = decode_weight(codes, scale, wanted.weight, torch.float32)
        assert error(values[after], torch.nn.functional.linear(x, weight)) < 1e-5, layer


def quantized_copy(path, proto):
    from pathlib import Path

    copy = Path(path).with_name("layers.onnx")
    onnx.save(proto, copy)
    return copy


@pytest.fixture(scope="module")
def outputs(model, recording, quantized, calibrations):
    """Format -> errors over a few calls: ONNX Runtime against PyTorch's emulation, and each against float32."""
    network = model.component("expert_high")
    calls = recording.of("expert_high")[::3]
    with torch.no_grad():
        exact = [network(**recording.inputs(call), return_dict=False)[0] for call in calls]
        found = {}
        for name, report in quantized.items():
            engine = session(report.path)
            ran = [engine.run(None, feeds(recording, call))[0] for call in calls]
            amax = calibrations["expert_high"].amax
            with precision.fake_quantized(network, dict.fromkeys(amax, name), amax):
                fake = [network(**recording.inputs(call), return_dict=False)[0] for call in calls]
            found[name] = dict(
                parity=max(map(error, ran, fake)),
                engine=np.mean([error(a, b) for a, b in zip(ran, exact, strict=True)]),
                fake=np.mean([error(a, b) for a, b in zip(fake, exact, strict=True)]),
            )
    return found


@pytest.mark.parametrize("name", ["int8-weight", "int4-weight", "int4-weight-32"])
def test_weight_only_graphs_match_the_emulation(outputs, name):
    assert outputs[name]["parity"] < 1e-3


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8-channel"])
def test_graphs_with_rounded_inputs_err_as_the_emulation_does(outputs, name):
    """A last bit that differs moves a value to the next code, and the layers after carry that on."""
    assert outputs[name]["parity"] < 1.1 * outputs[name]["fake"]
    assert outputs[name]["engine"] == pytest.approx(outputs[name]["fake"], rel=0.3)


def test_errors_are_ordered_as_the_bits_are(outputs):
    errors = {name: found["engine"] for name, found in outputs.items()}
    assert 0 < errors["int8-weight"] < errors["int8"] < errors["int4-weight-32"] < errors["int4-weight"] < 0.3
    assert errors["int8-weight"] < errors["fp8"] < errors["int4-weight-32"]


def test_one_layer_matches_the_emulation_end_to_end(model, graphs, recording, calibrations, folder):
    layers = ("blocks.5.ffn.net.2",)
    network, amax = model.component("expert_high"), calibrations["expert_high"].amax
    call = recording.of("expert_high")[0]
    for name in ("int8", "fp8"):
        report = precision.quantize(
            graphs["expert_high"],
            folder / "one.onnx",
            layers=layers,
            format=name,
            calibration=calibrations["expert_high"],
        )
        with torch.no_grad(), precision.fake_quantized(network, dict.fromkeys(layers, name), amax):
            fake = network(**recording.inputs(call), return_dict=False)[0]
        assert error(session(report.path).run(None, feeds(recording, call))[0], fake) < 1e-3


def test_emulation_leaves_the_network_as_it_was(model, calibrations):
    network = model.component("expert_high")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    amax = calibrations["expert_high"].amax
    with precision.fake_quantized(network, {"proj_out": "int8-weight"}):
        assert not torch.equal(network.proj_out.weight, before["proj_out.weight"])
    with (
        pytest.raises((RuntimeError, TypeError)),
        precision.fake_quantized(network, dict.fromkeys(amax, "int8"), amax),
    ):
        network(torch.zeros(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not network.get_submodule("blocks.0.attn1.to_q")._forward_pre_hooks
    with (
        pytest.raises(WanlabError, match="did you mean 'proj_out'"),
        precision.fake_quantized(network, {"proj_ou": "int8"}),
    ):
        pass
    with (
        pytest.raises(WanlabError, match="no range for the input of proj_out"),
        precision.fake_quantized(network, {"proj_out": "int8"}, amax),
    ):
        pass


def test_optimised_by_onnxruntime_int8_stays_the_same(quantized, recording):
    feed = feeds(recording, recording.of("expert_high")[0])
    plain = session(quantized["int8"].path).run(None, feed)[0]
    fast = session(quantized["int8"].path, optimised=True).run(None, feed)[0]
    assert error(fast, plain) < 0.02
    # Fused for integers only, these would refuse FP8, and round the inputs of weight-only layers.
    plain = session(quantized["fp8"].path).run(None, feed)[0]
    fast = session(quantized["fp8"].path, optimised=True, disable_quant_qdq="1").run(None, feed)[0]
    assert error(fast, plain) < 0.03
    plain = session(quantized["int4-weight"].path).run(None, feed)[0]
    fast = session(quantized["int4-weight"].path, optimised=True, qdq_matmulnbits_accuracy_level="1")
    assert error(fast.run(None, feed)[0], plain) < 1e-3


# ---- both experts, mixtures, dtypes


def test_every_expert_takes_its_own_ranges(graphs, calibrations, quantized, folder):
    low = precision.quantize(
        graphs["expert_low"], folder / "low.onnx", format="int8", calibration=calibrations["expert_low"]
    )
    assert low.component == "expert_low"
    scales = [report.frame()["activation_scale"] for report in (low, quantized["int8"])]
    assert (scales[0] != scales[1]).all()
    with pytest.raises(WanlabError, match=r"calibration is of component expert_low, .* of expert_high"):
        precision.quantize(
            graphs["expert_high"], folder / "x.onnx", format="int8", calibration=calibrations["expert_low"]
        )


def test_a_mixture_of_formats(graphs, calibrations, folder):
    plan = {
        "blocks.*.ffn.net.*": "int4-weight",
        "blocks.[0-2].attn1.*": "fp8",
        "blocks.2.attn1.to_k": "int8",
    }
    calibration = calibrations["expert_high"]
    partial = dataclasses.replace(
        calibration, amax={layer: value for layer, value in calibration.amax.items() if "attn1" in layer}
    )
    report = precision.quantize(
        graphs["expert_high"], folder / "mixture.onnx", layers=plan, calibration=partial
    )
    assert report.quantized == {"int4-weight": 12, "fp8": 11, "int8": 1}
    table = report.frame().set_index("layer")
    assert table.loc["blocks.2.attn1.to_k", "format"] == "int8"
    assert table.loc["blocks.2.attn1.to_k", "shared_with"] == ()
    assert set(table.loc["blocks.2.attn1.to_q", "shared_with"]) == {"blocks.2.attn1.to_v"}
    names = [node.name for node in load(report.path).graph.node]
    assert len(set(names)) == len(names)
    assert "blocks.3.attn1.to_q" not in set(table.index)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A one-layer expert of 64 channels, its graph in float16 and bfloat16."""
    folder = tmp_path_factory.mktemp("small")
    built = tiny.pipeline()
    built.register_modules(
        transformer=tiny.expert(2, attention_head_dim=32, ffn_dim=64),
        transformer_2=tiny.expert(3, attention_head_dim=32, ffn_dim=64),
    )
    built.save_pretrained(folder / "model")
    made = models.load(str(folder / "model"), device="cpu")
    reports = {
        dtype: export.export(
            made,
            "expert_low",
            folder / dtype / "expert_low.onnx",
            opset=23,
            dtype=dtype,
            dynamic=False,
            text_tokens=24,
            **SIZE,
        )
        for dtype in ("float16", "bfloat16")
    }
    recorded = precision.record_inputs(
        made, precision.nano_examples(1), folder / "recording", steps=3, progress=False, **SIZE
    )
    calibration = precision.calibrate(made, "expert_low", recorded, progress=False)
    return SimpleNamespace(
        folder=folder, model=made, graphs=reports, recording=recorded, calibration=calibration
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["int8", "fp8", "int8-weight", "int4-weight"])
def test_scales_have_the_type_of_the_graph(small, dtype, name):
    """Strongly typed engines want it so: what a DequantizeLinear gives has the type of its scale."""
    path = small.folder / f"{dtype}-{name}.onnx"
    report = precision.quantize(small.graphs[dtype].path, path, format=name, calibration=small.calibration)
    assert report.dtype == dtype
    assert sum(report.quantized.values()) == 10
    wanted = TensorProto.FLOAT16 if dtype == "float16" else TensorProto.BFLOAT16
    graph = load(path).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert types[node.input[1]] == wanted
    if dtype == "float16":
        call = small.recording.of("expert_low")[0]
        network = small.model.component("expert_low")
        with torch.no_grad():
            exact = network(**small.recording.inputs(call), return_dict=False)[0]
        engine = session(path)
        cast = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}
        feed = {
            value.name: small.recording.inputs(call)[value.name].numpy().astype(cast[value.type])
            for value in engine.get_inputs()
        }
        assert 0 < error(engine.run(None, feed)[0].astype(np.float32), exact) < 0.2


def test_weights_outside_of_the_graph(graphs, quantized, calibrations, recording, folder):
    """As above 2 GB: codes are written one at a time into a file beside the graph."""
    for name in ("int8", "int4-weight"):
        report = precision.quantize(
            graphs["expert_high"],
            folder / f"outside-{name}.onnx",
            format=name,
            calibration=calibrations["expert_high"],
            external_data=True,
            progress=False,
        )
        assert report.weights_file == f"outside-{name}.weights"
        assert report_path(report).stat().st_size < 600_000
        assert report.size_bytes == pytest.approx(quantized[name].size_bytes, rel=0.05)
        feed = feeds(recording, recording.of("expert_high")[0])
        np.testing.assert_array_equal(
            session(report.path).run(None, feed)[0], session(quantized[name].path).run(None, feed)[0]
        )


def test_weights_that_are_read_are_not_written_over(tmp_path):
    source = small_graph(tmp_path / "a.onnx")
    proto = onnx.load(source)
    onnx.save(proto, source, save_as_external_data=True, location="b.weights", size_threshold=0)
    before = (tmp_path / "b.weights").read_bytes()
    for external in (True, False):
        with pytest.raises(WanlabError, match=r"b.weights holds the weights that are read"):
            precision.quantize(
                source, tmp_path / "b.onnx", layers="two", format="int8-weight", external_data=external
            )
    assert (tmp_path / "b.weights").read_bytes() == before


@pytest.mark.parametrize("external", [True, False])
def test_a_quantised_graph_stands_alone(tmp_path, external):
    source = small_graph(tmp_path / "a.onnx")
    proto = onnx.load(source)
    axes = proto.graph.initializer.pop()  # shape inference wants to see it
    onnx.save(proto, source, save_as_external_data=True, location="a.weights", size_threshold=0)
    proto = load(source)
    proto.graph.initializer.append(axes)
    source.write_bytes(proto.SerializeToString())
    feed = {"x": np.ones((2, 3, 8, 8), np.float32)}
    exact = session(source).run(None, feed)[0]
    report = precision.quantize(
        source, tmp_path / "there" / "b.onnx", layers="two", format="int8-weight", external_data=external
    )
    assert report.calibration == ""
    (tmp_path / "a.weights").unlink()
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    assert error(session(tmp_path / "elsewhere" / "b.onnx").run(None, feed)[0], exact) < 0.02


# ---- graphs of other kinds


def small_graph(path, opset: int = 21, cast: bool = False):
    """A convolution, a Gemm either way round, and a product of two computed tensors."""
    rng = np.random.default_rng(0)
    held = {
        "conv.weight": rng.normal(size=(4, 3, 3, 3)),
        "conv.bias": rng.normal(size=4),
        "one.weight": rng.normal(size=(6, 4)),
        "one.bias": rng.normal(size=6),
        "two.weight.T": rng.normal(size=(6, 8)),
    }
    initializers = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in held.items()]
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["a"], "conv/node_conv", pads=[1] * 4),
        helper.make_node("ReduceMean", ["a"], ["b"], "mean", keepdims=0, axes=[2, 3]),
        helper.make_node("Gemm", ["b", "one.weight", "one.bias"], ["c"], "one/node_gemm", transB=1),
        helper.make_node("Gemm", ["c", "two.weight.T"], ["d"], "two/node_gemm"),
        helper.make_node("Transpose", ["d"], ["e"], "turn"),
        helper.make_node("MatMul", ["d", "e"], ["y"], "attention/node_matmul"),
    ]
    if opset >= 18:
        del nodes[1].attribute[:]
        nodes[1].CopyFrom(helper.make_node("ReduceMean", ["a", "axes"], ["b"], "mean", keepdims=0))
        initializers.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    if cast:
        initializers[2] = numpy_helper.from_array(held["one.weight"].astype(np.float16), "one.weight")
        nodes.insert(0, helper.make_node("Cast", ["one.weight"], ["one.weight.float"], "one/cast", to=1))
        nodes[3].input[1] = "one.weight.float"
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "n"])],
        initializers,
        value_info=[
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("a", "b", "c", "d", "e")
        ]
        + ([helper.make_tensor_value_info("one.weight.float", TensorProto.FLOAT, [6, 4])] if cast else []),
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


AMAX = SimpleNamespace(amax={"conv": 4.5, "one": 8.0, "two": 24.0}, key="k", model="", component="")


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("name", ["int8", "fp8", "int8-weight"])
def test_convolutions_and_both_layouts(tmp_path, name, cast):
    source = small_graph(tmp_path / "a.onnx", cast=cast)
    report = precision.quantize(source, tmp_path / "b.onnx", layers="*", format=name, calibration=AMAX)
    assert [layer.layer for layer in report.layers] == ["conv", "one", "two"]
    feed = {"x": np.random.default_rng(1).normal(size=(5, 3, 8, 8)).astype(np.float32)}
    exact, got = (session(path).run(None, feed)[0] for path in (source, report.path))
    assert 0 < error(got, exact) < 0.1
    held = {tensor.name for tensor in load(report.path).graph.initializer}
    assert not held & {"conv.weight", "one.weight", "two.weight.T"}
    assert not [node for node in load(report.path).graph.node if node.op_type == "Cast"]


def test_opsets_are_raised_when_a_format_needs_it(tmp_path):
    source = small_graph(tmp_path / "a.onnx", opset=18)
    made = {}
    for name in ("int8-weight", "fp8"):
        made[name] = precision.quantize(
            source, tmp_path / f"{name}.onnx", layers=["one", "two"], format=name, calibration=AMAX
        )
    assert (made["int8-weight"].opset_before, made["int8-weight"].opset) == (18, 18)
    assert (made["fp8"].opset_before, made["fp8"].opset) == (18, 19)
    feed = {"x": np.ones((2, 3, 8, 8), np.float32)}
    exact = session(source).run(None, feed)[0]
    for report in made.values():
        assert error(session(report.path).run(None, feed)[0], exact) < 0.1
    old = small_graph(tmp_path / "old.onnx", opset=17)
    with pytest.raises(WanlabError, match="has opset 17, this format needs 19; export it with opset=19"):
        precision.quantize(old, tmp_path / "x.onnx", layers="one", format="fp8", calibration=AMAX)
    kept = precision.quantize(old, tmp_path / "x.onnx", layers="one", format="int8", calibration=AMAX)
    assert kept.opset == 17


def test_int4_codes_are_packed_two_to_a_byte(quantized, model):
    report = quantized["int4-weight"]
    proto = onnx.load(report.path)
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    codes = held["blocks.4.ffn.net.2.weight.T.int4"]
    scale = numpy_helper.to_array(held["blocks.4.ffn.net.2.weight.T.int4.scale"])
    assert list(codes.dims) == [512, 192]
    assert len(codes.raw_data) == 512 * 192 // 2
    assert scale.shape == (8, 192)
    values = numpy_helper.to_array(codes).astype(np.float32)
    weight = model.component("expert_high").blocks[4].ffn.net[2].weight.detach().numpy().T
    np.testing.assert_allclose(values * scale.repeat(64, axis=0), weight, atol=float(scale.max()) / 1.99)
    node = next(n for n in proto.graph.node if n.name == "blocks.4.ffn.net.2/weight_dequantize")
    assert {a.name: a.i for a in node.attribute} == {"axis": 0, "block_size": 64}


# ---- refusals


def test_what_cannot_be_done_is_refused(graphs, calibrations, quantized, folder, tmp_path):
    high, calibration = graphs["expert_high"], calibrations["expert_high"]

    def refused(reason, path=high, out=tmp_path / "x.onnx", **more):
        with pytest.raises(WanlabError, match=reason):
            precision.quantize(path, out, **dict(format="int8", calibration=calibration) | more)
        assert not list(tmp_path.iterdir())

    refused("did you mean 'blocks.0.attn1.to_q'", layers="blocks.0.attn1.to_qq")
    refused("no layer matches", layers="blocks.0.attn1")
    refused("did you mean 'fp8'", format="fp88")
    refused("which format", format=None)
    refused("leave format out", layers={"proj_out": "int8"})
    refused("needs their ranges", calibration=None)
    refused("no range for proj_out", layers=["proj_out", "blocks.0.ffn.net.2"])
    refused("192 inputs, which blocks of 128", format="int4-weight-128")
    refused("no ONNX file", path=folder / "none.onnx")
    refused("is the file that is read, or no .onnx file", out=high)
    refused("is the file that is read, or no .onnx file", out=tmp_path / "x.bin")
    refused("quantised already", path=quantized["fp8"].path)
    assert load(high)


def test_a_layer_that_did_not_come_out_as_asked_is_an_error(quantized):
    from wanlab.precision.qdq import verify

    path = report_path(quantized["int8-weight"])
    layers = [layer.layer for layer in quantized["int8-weight"].layers]
    assert verify(path, dict.fromkeys(layers, get_format("int8-weight"))) == {"int8-weight": 60}
    with pytest.raises(
        InternalError, match=r"input of blocks.0.attn1.to_. came out as not quantised, requested was int8"
    ):
        verify(path, dict.fromkeys(layers, get_format("int8")))
    with pytest.raises(
        InternalError, match=r"weight of blocks.0.attn1.to_. came out as int8, requested was int4"
    ):
        verify(path, dict.fromkeys(layers, get_format("int4-weight")))
    with pytest.raises(InternalError, match="written without blocks"):
        verify(path, {"blocks.9": get_format("int8-weight")})
