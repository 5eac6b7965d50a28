"""Whether a written graph computes its layers as it was asked to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from wanlab.errors import WanlabError
from wanlab.precision.formats import Format
from wanlab.precision.graphs.sites import OPERATORS


def verify(
    path: Path, asked: Mapping[str, Format], islands: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Read a graph back, without its weights, and count the layers of each format.

    Args:
        islands: layers that compute in another float, by its name in plans.

    Raises:
        WanlabError: a layer is missing, or its weight or input is not quantised, or cast, as asked.
    """
    import onnx

    islands = islands or {}
    model = onnx.load(path, load_external_data=False)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    counts: Counter[str] = Counter()
    seen = set()
    for node in model.graph.node:
        layer = node.name.partition("/")[0]
        if node.op_type not in OPERATORS or (layer not in asked and layer not in islands):
            continue
        if layer in islands:
            wanted_float = islands[layer]
            _compare(path, layer, "weight", _KINDS.get(kinds.get(node.input[1], 0), ""), wanted_float)
            _compare(path, layer, "input", _cast_kind(makers.get(node.input[0])), wanted_float)
            if layer not in seen:
                counts[wanted_float] += 1
            seen.add(layer)
            continue
        wanted = asked[layer]
        weight = _weight_kind(makers.get(node.input[1]), kinds)
        taken = _input_kind(makers.get(node.input[0]), makers, kinds)
        _compare(path, layer, "weight", weight, wanted.weight.kind)
        _compare(path, layer, "input", taken, wanted.activation.kind if wanted.activation else "")
        if layer not in seen:
            counts[wanted.name] += 1
        seen.add(layer)
    missing = [layer for layer in (*asked, *islands) if layer not in seen]
    if missing:
        raise WanlabError(f"{path.name} was written without {missing[0]}; this is a mistake of wanlab")
    return dict(counts)


def _weight_kind(maker, kinds: dict[str, int]) -> str:
    if maker is None or maker.op_type != "DequantizeLinear":
        return ""
    return _KINDS.get(kinds.get(maker.input[0], 0), "")


def _input_kind(maker, makers, kinds: dict[str, int]) -> str:
    if maker is None or maker.op_type != "DequantizeLinear":
        return ""
    before = makers.get(maker.input[0])
    if before is None or before.op_type != "QuantizeLinear" or before.input[1] != maker.input[1]:
        return ""
    return _KINDS.get(kinds.get(before.input[2], 0), "")


def _cast_kind(maker) -> str:
    if maker is None or maker.op_type != "Cast":
        return ""
    return _KINDS.get(next(attribute.i for attribute in maker.attribute if attribute.name == "to"), "")


def _compare(path: Path, layer: str, what: str, got: str, wanted: str) -> None:
    if got != wanted:
        raise WanlabError(
            f"{path.name}: the {what} of {layer} came out as {got or 'not quantised'}, asked was"
            f" {wanted or 'not quantised'}; this is a mistake of wanlab"
        )


_KINDS = {3: "int8", 22: "int4", 17: "fp8", 1: "fp32", 10: "fp16", 16: "bf16"}  # onnx.TensorProto data types
