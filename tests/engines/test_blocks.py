"""Parity block by block, and the ranges of tensors: what is wrong is found where it is."""

from __future__ import annotations

import math

import onnx
import pandas as pd
import pytest
import torch
from onnx import numpy_helper
from support import convert_tiny as tiny

from wanlab import engines, export
from wanlab.core.errors import WanlabError
from wanlab.export.components import component_spec
from wanlab.export.graph import cut

pytestmark = pytest.mark.slow

BLOCKS = ["before", "blocks.0", "blocks.1", "after"]


@pytest.fixture(scope="module")
def model():
    built = tiny.pipeline()
    built.register_modules(transformer=tiny.expert(2, num_layers=2))
    return tiny.bare(built)


@pytest.fixture(scope="module", params=[20, 23])
def path(model, request, tmp_path_factory):
    path = tmp_path_factory.mktemp("blocks") / "expert.onnx"
    export.export(model, "expert_high", path, opset=request.param)
    return path


def compare(model, path, **how):
    return engines.blockwise_parity(
        model, "expert_high", path, provider="cpu", progress=False, **how
    ).set_index("piece")


def change(path, name, edit):
    """Edit a weight of a graph in place; takes part of the name."""
    written = onnx.load(path)
    [tensor] = [tensor for tensor in written.graph.initializer if name in tensor.name]
    tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(written, path)


def test_every_block_is_compared_on_its_own(model, path):
    table = compare(model, path)
    assert list(table.index) == BLOCKS
    assert (table["relative_l2"] < 1e-5).all(), table
    assert (table.loc["blocks.0":"blocks.1", "update_relative_l2"] < 1e-4).all()
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".json", ".onnx"]  # no piece is left


def test_the_pieces_take_one_hidden_state_each_and_hold_their_own_weights(path):
    import onnx_ir

    graph = onnx_ir.load(path)
    before, first, second, after = cut(graph)
    assert (before.state, first.state in before.outputs, second.state in first.outputs) == ("", True, True)
    assert after.outputs == ("velocity",)
    owners = {value.name: name for name, value in graph.graph.initializers.items()}
    for piece in (before, first, second, after):
        inside = onnx_ir.convenience.extract(graph.graph, list(piece.inputs), list(piece.outputs))
        blocks = {name.split(".")[1] for name in inside.initializers if name.startswith("blocks.")}
        assert blocks <= {piece.name.removeprefix("blocks.")}, piece.name
    assert len(owners) > 40


def test_a_wrong_weight_shows_in_its_block_only(model, path, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes())
    change(broken, "blocks.1.ffn.net.2.weight", lambda weight: weight * 1.5)
    table = compare(model, broken)
    assert table.loc["blocks.1", "relative_l2"] > 1e-3
    assert (table.drop("blocks.1")["relative_l2"] < 1e-5).all(), table


def test_a_graph_in_half_precision_with_weights_outside(model, tmp_path):
    path = tmp_path / "half.onnx"
    report = export.export(model, "expert_high", path, dtype="float16", external_data=True)
    table = compare(model, path)
    assert (table["relative_l2"] < 5e-3).all(), table
    assert (table["relative_l2"] > 1e-6).all(), "nothing was rounded"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        [path.name, "half.json", report.weights_file, f"{report.weights_file}.json"]
    )


def test_what_has_no_blocks_is_refused(model, path):
    with pytest.raises(WanlabError, match="vae_decoder has no transformer blocks; compare it whole"):
        engines.blockwise_parity(model, "vae_decoder", path)


def test_ranges_name_the_tensor_that_half_precision_would_not_hold(model, path, tmp_path):
    plan = component_spec(model, "expert_high")
    shape = export.ClipShape(1, 32, 48, 9, 24)
    inputs = dict(zip(plan.inputs, plan.inputs_for(shape, torch.Generator().manual_seed(0)), strict=True))
    healthy = engines.value_ranges(path, [inputs], provider="cpu", progress=False)
    assert set(healthy["state"]) == {"fits"}
    assert healthy["max_abs"].is_monotonic_decreasing
    assert len(healthy) > 60

    loud = tmp_path / "loud.onnx"
    loud.write_bytes(path.read_bytes())
    change(loud, "blocks.1.ffn.net.0.proj.weight", lambda weight: weight * 1e6)
    table = engines.value_ranges(loud, [inputs], provider="cpu", progress=False)
    first = table[table["state"] == "overflows"]
    assert len(first)
    assert any(node.startswith("blocks.1.ffn.net.0") for node in first["node"])
    assert not any(node.startswith("blocks.0") for node in first["node"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loud.onnx"]


def test_ranges_of_a_graph_in_half_precision_show_where_it_does_overflow(model, tmp_path):
    path = tmp_path / "half.onnx"
    export.export(model, "expert_high", path, dtype="float16")
    change(path, "blocks.0.attn1.to_v.weight", lambda weight: weight * 6e4)
    plan = component_spec(model, "expert_high")
    shape = export.ClipShape(1, 32, 48, 9, 24)
    inputs = dict(zip(plan.inputs, plan.inputs_for(shape, torch.Generator().manual_seed(0)), strict=True))
    table = engines.value_ranges(path, [inputs], provider="cpu", progress=False)
    assert math.isinf(table["max_abs"].iloc[0])
    assert table["state"].iloc[0] == "overflows"


def test_ranges_want_inputs(path):
    with pytest.raises(WanlabError, match="no inputs to measure ranges with"):
        engines.value_ranges(path, [], provider="cpu", progress=False)


def test_ranges_leave_out_a_tensor_that_stays_empty(tmp_path):
    """A mask that picks no token: the maximum of nothing is no number."""
    floats, picked = onnx.TensorProto.FLOAT, ["x", "mask"]
    nodes = [
        onnx.helper.make_node("Compress", picked, ["kept"], name="kept", axis=0),
        onnx.helper.make_node("Neg", ["kept"], ["turned"], name="turned"),
        onnx.helper.make_node("ReduceSum", ["turned"], ["kept_sum"], name="kept_sum", keepdims=0),
        onnx.helper.make_node("Mul", ["x", "x"], ["square"], name="square"),
        onnx.helper.make_node("Add", ["square", "kept_sum"], ["sum"], name="sum"),
    ]
    inputs = [("x", floats, [3]), ("mask", onnx.TensorProto.BOOL, [3])]
    graph = onnx.helper.make_graph(
        nodes,
        "picks",
        [onnx.helper.make_tensor_value_info(*each) for each in inputs],
        [onnx.helper.make_tensor_value_info("sum", floats, [3])],
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    path = tmp_path / "picks.onnx"
    onnx.save(
        onnx.shape_inference.infer_shapes(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)),
        path,
    )
    nothing = {"x": torch.tensor([1.0, -2.0, 3.0]), "mask": torch.zeros(3, dtype=torch.bool)}
    table = engines.value_ranges(path, [nothing], provider="cpu", progress=False)
    assert dict(zip(table["tensor"], table["max_abs"], strict=True)) == {"square": 9.0, "kept_sum": 0.0}
    some = nothing | {"mask": torch.tensor([False, True, False])}
    table = engines.value_ranges(path, [nothing, some], provider="cpu", progress=False)
    assert table.set_index("tensor").loc["kept", "max_abs"] == 2.0


def test_forms_are_compared_with_the_network_as_it_is(model, tmp_path):
    table = engines.compare_forms(
        model, "expert_high", tmp_path, provider="cpu", rounds=2, progress=False
    ).set_index("form")
    assert list(table.index) == ["original", "friendly", "fused", "eager"]
    assert table.loc["original", "ScatterND"] == 8
    assert table.loc["friendly", "ScatterND"] == table.loc["fused", "ScatterND"] == 0
    assert table.loc["fused", "Attention"] == 4
    assert table.loc["original", "nodes"] > table.loc["friendly", "nodes"] > table.loc["fused", "nodes"]
    assert (table["relative_l2"].dropna() < 1e-5).all()
    assert table.loc["original", "verdict"] == "baseline"
    assert all(len(samples) == 4 for samples in table["samples_ms"])


@pytest.mark.parametrize(
    ("dtype", "tolerance", "agree"),
    [(torch.float32, 1e-3, 0), (torch.float16, 1e-2, 0), (torch.bfloat16, 3e-2, 1)],
)
def test_the_tolerance_of_a_parity_is_that_of_its_number_format(dtype, tolerance, agree):
    table = pd.DataFrame([{"component": "expert_high", "relative_l2": 1.2e-2, "shape": "x"}])
    summary = engines.parity_summary(table, dtype=dtype)
    assert (summary.tolerance, summary.agree) == (tolerance, agree)
    assert f"distance of {tolerance:g} (that of {str(dtype)[6:]})" in str(summary)
    assert "distance of 0.5, at worst" in str(engines.parity_summary(table, 0.5, dtype=dtype))
