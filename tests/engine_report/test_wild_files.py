"""Damaged, hostile and odd files of engines: one line that names the field, whatever is in them."""

from __future__ import annotations

import gzip
import itertools
import json

import onnx
import pytest
from onnx import TensorProto, helper
from support.fuzz_traces import FIXTURES, PARSERS

from wanlab import engine_report
from wanlab.core.errors import WanlabError
from wanlab.engine_report.from_onnx import evaluated
from wanlab.engine_report.layers import modules_in

ODD = [None, -1, 10**30, 1e300, "x", [], {}, [[1]], True, "\u0000"]


def refused(path, complaint: str) -> None:
    with pytest.raises(WanlabError, match=complaint) as error:
        engine_report.read_layers(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[" * 100_000, "too deep"),
        (b"\x1f\x8b" + bytes(50), "cut off or damaged"),
        (gzip.compress(b'{"Layers": []}')[:-9], "cut off or damaged"),
        (b"\xff{", "not JSON"),
        (b'{"Layers": [' + b"9" * 5000 + b"]}", "cannot read"),
        (b'{"Layers": [{"Name": 5, "Outputs": []}]}', r"Layers\[0\].Name: Expected `str`"),
        (
            b'[{"cat": "Node", "name": "a_kernel_time", "dur": -5}]',
            "1 of 1 events have an impossible duration",
        ),
        (
            b'[{"cat": "Node", "name": "a_kernel_time", "dur": NaN}]',
            "1 of 1 events have an impossible duration",
        ),
        (b'[{"cat": "Node", "name": "a_kernel_time", "args": {"op_name": []}}]', r"args.op_name"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_the_field(tmp_path, content, complaint):
    path = tmp_path / "engine.json"
    path.write_bytes(content)
    refused(path, complaint)


def test_a_report_that_unpacks_to_gibibytes_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("wanlab.core.packed.SUSPECT", 1 << 20)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b"[" + b" " * (8 << 20)))
    refused(path, "WANLAB_LIMITS='packed_ratio=")


@pytest.mark.parametrize("name", ["inspector", "ONNX Runtime profile", "times of layers", "planned formats"])
def test_fields_of_other_types_are_read_or_refused_in_one_line(tmp_path, name):
    parser = PARSERS[name]
    path = tmp_path / "engine.json"
    whole = json.loads(parser.seeds[0])
    path.write_text(json.dumps(whole))
    parser.read(path)  # the file itself can be read
    messages = []
    for odd, change in zip(itertools.cycle(ODD), _changes(whole), strict=False):
        path.write_text(json.dumps(change(odd)))
        try:
            parser.read(path)
        except WanlabError as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


def _changes(value):
    """Functions of a new item to the value with one item replaced: the first of each list, all of each record."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    )
    for key, item in items:
        for change in (lambda odd: odd, *_changes(item)):
            if isinstance(value, dict):
                yield lambda odd, key=key, change=change: value | {key: change(odd)}
            else:
                yield lambda odd, change=change: [change(odd), *value[1:]]


def test_numbers_as_text_are_read(tmp_path):
    path = tmp_path / "profile.json"
    path.write_bytes(PARSERS["ONNX Runtime profile"].seeds[0])
    layer = engine_report.read_ort_profile(path).layers[0]
    assert (layer.weight_bytes, layer.inputs[0].shape, layer.time_ms) == (1024, (1, 24), 0.005)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2*a + 1", 7), ("a**2", 9), ("9**9**9**9", None), ("a**a**a**a", None), ("(" * 300 + "a" + ")" * 300, None),
        ("1//0", None), ("Max()", None), ("a.b", None), ("-a", None), ("a" * 10_000, None),
    ],
)  # fmt: skip
def test_expressions_of_axes_end(text, value):
    assert evaluated(text, {"a": 3}) == value


def test_graphs_with_cycles_and_unknown_types_are_read(tmp_path):
    nodes = [
        helper.make_node("Reshape", ["y"], ["x"], name="a"),
        helper.make_node("Reshape", ["x"], ["y"], name="b"),
        helper.make_node("MatMul", ["y", "w"], ["z"], name="blocks.0.attn1.to_q/m"),
        helper.make_node("Constant", [], []),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n*2"]) for name in ("i", "z")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]))
    model.graph.initializer.append(TensorProto(name="w", data_type=999, dims=[2, 2]))
    onnx.save(model, tmp_path / "cycle.onnx")
    layers = engine_report.read_layers(tmp_path / "cycle.onnx")
    assert [layer.type for layer in layers.layers][:3] == ["Reshape", "Reshape", "MatMul"]
    (tmp_path / "empty.onnx").write_bytes(b"")
    refused(tmp_path / "empty.onnx", "no ONNX graph")


def test_names_of_a_megabyte_are_read():
    assert modules_in(["blocks.0.attn1.to_q/x + " * 50_000]) == ("blocks.0.attn1.to_q",)


def test_an_engine_whose_times_are_all_zero_has_no_times():
    content = json.loads(PARSERS["ONNX Runtime profile"].seeds[0])
    layers = engine_report.read_ort_profile([event | {"dur": 0} for event in content])
    assert not layers.timed
    assert "none of them timed" in engine_report.summarize(layers).answer().headline


def test_the_seeds_of_the_parsers_can_be_read(tmp_path):
    for parser in PARSERS.values():
        path = tmp_path / f"seed{parser.suffix}"
        read = 0
        for seed in parser.seeds:
            path.write_bytes(seed)
            try:
                parser.read(path)
                read += 1
            except WanlabError:
                pass
        assert read, parser
    assert FIXTURES.is_dir()


def test_layers_that_do_not_add_up_to_the_engine_are_said_below_the_headline():
    content = json.loads(PARSERS["ONNX Runtime profile"].seeds[0])
    layers = engine_report.read_ort_profile(content)
    apart = " ".join(engine_report.summarize(layers.with_latency(2 * layers.total_ms)).answer().details)
    assert "The layers add up to 5 µs, the whole engine took" in apart
    near = engine_report.summarize(layers.with_latency(1.05 * layers.total_ms)).answer()
    assert not any("add up" in detail for detail in near.details)
