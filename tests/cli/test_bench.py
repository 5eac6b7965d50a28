"""`wanlab bench` of graphs that other programs made."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from wanlab.cli import bench
from wanlab.cli import main as cli
from wanlab.core.errors import WanlabError
from wanlab.engines.registry import open_engine
from wanlab.export.components import random_feeds

QUICK = ["--iterations", "2", "--duration-s", "0", "--warmup-ms", "0", "--provider", "cpu"]


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """An embedding, a mask and a picture of free sizes, without wanlab's metadata; its ending is in capitals."""
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 4]),
        helper.make_tensor_value_info("picture", TensorProto.FLOAT, ["batch", 3, None, None]),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
    ]
    table = helper.make_tensor("table", TensorProto.FLOAT, [2, 3], [1.0] * 6)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["words"]),
        helper.make_node("ReduceSum", ["words"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["picture", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "sum"], ["y"]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, [output], [table]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    path = tmp_path_factory.mktemp("graph") / "OTHER.ONNX"
    onnx.save(model, path)
    return path


def test_any_graph_is_timed_on_made_up_inputs(graph, capsys):
    assert cli.main(["bench", str(graph), *QUICK]) == 0
    said = capsys.readouterr().out
    assert "a graph without wanlab's metadata" in said
    assert "picture float32 [1, 3, 1, 1]" in said
    assert "throughput" in said


@pytest.mark.parametrize(
    "given",
    [
        ["--shape", "picture=2x3x8x16", "--shape", "ids=2x4"],
        ["--shapes=picture:2x3x8x16,ids:2x4"],
        ["--shapes", "picture:2x3x8x16, ids=2x4"],
    ],
)
def test_shapes_are_given_as_other_tools_spell_them(graph, capsys, given):
    assert cli.main(["bench", str(graph), *given, *QUICK]) == 0
    said = capsys.readouterr().out
    assert "ids int64 [2, 4], picture float32 [2, 3, 8, 16], scale float32 []" in said


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--shape", "image=1x3x8x8"], "has no input 'image'"),
        (["--shape", "picture=1x4x8x8"], "takes picture=batchx3x?x?, not 1x4x8x8"),
        (["--shape", "picture=8x8"], "takes picture=batchx3x?x?, not 8x8"),
        (["--shape", "picture"], "--shape 'picture' cannot be read"),
        (["--shape", "picture=1x3x400000x400000"], "GiB are free; give a smaller size"),
        (["--height", "480"], "takes shapes of its inputs"),
    ],
)
def test_shapes_that_cannot_be_are_refused_in_one_line(graph, capsys, given, says):
    assert cli.main(["bench", str(graph), *given, *QUICK]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_names_with_colons_are_read():
    assert bench.read_shapes(["input:0:1x3", "b=7"]) == {"input:0": (1, 3), "b": (7,)}


def test_whole_numbers_are_made_up_as_indices_that_every_table_has(graph):
    feeds = random_feeds(open_engine(graph, provider="cpu"), shapes={"ids": (50, 4)})
    assert set(feeds["ids"].flatten().tolist()) == {0, 1}
    with pytest.raises(WanlabError, match="has no input"):
        random_feeds(open_engine(graph, provider="cpu"), shapes={"x": (1,)})


def test_a_seed_beyond_64_bits_is_one_line(capsys, tmp_path):
    assert cli.main(["bench", str(tmp_path / "none.onnx"), "--seed", str(2**64)]) == 2
    assert "seed 18446744073709551616 is beyond 64 bits" in capsys.readouterr().err
