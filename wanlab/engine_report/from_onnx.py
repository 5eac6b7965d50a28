"""The nodes of an ONNX graph as layers, without times."""

from __future__ import annotations

import ast
import json
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from wanlab import models
from wanlab.core.errors import WanlabError, first_line
from wanlab.core.formats import ITEM_BYTES, element_name
from wanlab.engine_report.layers import PRODUCTS, EngineLayers, Layer, Tensor, join, onnx_kind, precision_of
from wanlab.export.components import AXES, ClipShape, axis_sizes

_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,  # sizes divide without a remainder
    ast.Mod: operator.mod,
    ast.Pow: lambda base, power: operator.pow(base, power) if 0 <= power <= 8 else 0 // 0,
}
LONGEST_EXPRESSION = 500


def traced_sizes(metadata: Mapping[str, str]) -> dict[str, int]:
    """Axis name -> size for the clip of the export, at batch 1; empty if the metadata has no clip."""
    try:
        clip = ClipShape(**json.loads(metadata["shape"]) | {"batch": 1})
        return axis_sizes(models.get(metadata["model"]), clip)
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError, WanlabError):
        return {}


def with_sizes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """The graph with sizes for its free axes and shapes inferred again; unchanged if no axis is free or no size is known.

    Axes of inputs are known by name (`text_tokens`) or position (axis 2 of `hidden_states` is `latent_frames`). If an axis
    is an expression (`2*latent_height_units`), its symbol is solved and used in all other expressions.
    """
    symbols = dict(sizes)
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            known = AXES.get(value.name, {}).get(axis, dim.dim_param)
            if dim.dim_param and known in sizes:
                symbols |= _solved(dim.dim_param, sizes[known])
    if (
        not any(d.dim_param for value in model.graph.input for d in value.type.tensor_type.shape.dim)
        or not sizes
    ):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in (*copy.graph.input, *copy.graph.value_info, *copy.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                size = evaluated(dim.dim_param, symbols)
                # Inference sets the size of an unnamed axis, but not of a named one.
                dim.ClearField("dim_param")
                if size is not None:
                    dim.dim_value = size
    try:
        return onnx.shape_inference.infer_shapes(copy, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return copy


def evaluated(text: str, symbols: Mapping[str, int]) -> int | None:
    """Value of an expression such as `2*latent_height_units + 1`; None if a symbol is unknown or it is no size."""

    def walk(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return symbols[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return _BINARY[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Max", "Min"):
            return {"Max": max, "Min": min}[node.func.id](map(walk, node.args))
        raise KeyError(text)

    try:
        value = walk(_expression(text))
    except (SyntaxError, KeyError, ArithmeticError, TypeError, ValueError, RecursionError, MemoryError):
        return None
    return value if 0 <= value < 2**63 else None


def _expression(text: str) -> ast.expr:
    if len(text) > LONGEST_EXPRESSION:
        raise ValueError(text)
    return ast.parse(text, mode="eval").body


def _solved(text: str, size: int) -> dict[str, int]:
    """Symbol -> value for a linear expression of one symbol that is equal to `size`; empty for others."""
    try:
        names = {node.id for node in ast.walk(_expression(text)) if isinstance(node, ast.Name)}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    if len(names) != 1:
        return {}
    name = names.pop()
    at_0, at_1 = evaluated(text, {name: 0}), evaluated(text, {name: 1})
    if at_0 is None or at_1 is None or at_1 == at_0 or (size - at_0) % (at_1 - at_0):
        return {}
    return {name: (size - at_0) // (at_1 - at_0)}


_PASSING = ("Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Identity", "Flatten")
"""Operators that do not change the values of a weight."""


def read_onnx(
    path: str | os.PathLike, *, name: str = "", sizes: Mapping[str, int] | None = None, source: str = "onnx"
) -> EngineLayers:
    """Layers of an ONNX graph; weights outside of the file are not read.

    Args:
        path: the `.onnx` file.
        name: name for headings; the file name by default.
        sizes: axis name (`"latent_frames"`) -> size, for graphs with free axes; by default those of the clip of the
            export, at batch 1. With free axes sizes in bytes are unknown.
        source: `"onnxruntime"` for a graph that ONNX Runtime optimised.

    Raises:
        WanlabError: no such file, or another kind of file.
    """
    model = _load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    sizes = dict(sizes) if sizes is not None else traced_sizes(metadata)
    tensors = _tensors(with_sizes(model, sizes))
    nested = sum(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute)
    notes = [f"{nested} subgraphs are not read"] if nested else []
    layers: list[Layer] = []
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        inputs = tuple(tensors.get(tensor, Tensor(tensor)) for tensor in node.input if tensor)
        outputs = tuple(tensors.get(tensor, Tensor(tensor)) for tensor in node.output if tensor)
        kind = onnx_kind(node.op_type)
        fresh = [tensor for tensor in inputs if tensor.constant and tensor.name not in seen]
        seen.update(tensor.name for tensor in fresh)
        layers.append(
            Layer(
                index=index,
                name=node.name or f"{node.op_type}_{index}",
                type=node.op_type,
                kind=kind,
                subtype=node.domain,
                inputs=inputs,
                outputs=outputs,
                precision=precision_of(kind, inputs, outputs),
                weight_bytes=sum(tensor.size_bytes for tensor in fresh),
            )
        )
    layers = _weights_of(join(layers))
    if source == "onnx":
        layers = _codes_of(layers)
    sizes_of = [tensor.shape for layer in layers for tensor in layer.outputs]
    free = sum(shape is None or any(isinstance(size, str) for size in shape) for shape in sizes_of)
    if free:
        notes.append(f"{free} tensors have unknown sizes: activation bytes are a lower bound")
    return EngineLayers(
        name or Path(path).name,
        source,
        tuple(layers),
        inputs=tuple(tensors[value.name] for value in model.graph.input if not tensors[value.name].constant),
        outputs=tuple(tensors[value.name] for value in model.graph.output),
        metadata=metadata,
        notes=tuple(notes),
    )


def _load(path: str | os.PathLike) -> onnx.ModelProto:
    path = Path(path)
    if not path.is_file():
        raise WanlabError(f"no ONNX file at {path}; export it with wanlab.export.export")
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise WanlabError(f"{path} is no ONNX graph: {first_line(error)}") from error
    if not model.graph.node:
        raise WanlabError(f"{path} is no ONNX graph: it has no nodes")
    for node in model.graph.node:
        names = (node.name, node.op_type, node.domain, *node.input, *node.output)
        if broken := next((name for name in names if isinstance(name, bytes)), None):
            raise WanlabError(
                f"{path} is no ONNX graph: the name {broken[:60]!r} is not UTF-8; copy it again"
            )
    return model


def _tensors(model: onnx.ModelProto) -> dict[str, Tensor]:
    graph = model.graph
    tensors = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shape = tuple(_size(dim) for dim in kind.shape.dim) if kind.HasField("shape") else None
        tensors[value.name] = Tensor(value.name, _dtype(kind.elem_type), shape)
    for constant in graph.initializer:
        tensors[constant.name] = Tensor(
            constant.name, _dtype(constant.data_type), tuple(constant.dims), constant=True
        )
    for node in graph.node:
        value = next((a.t for a in node.attribute if node.op_type == "Constant" and a.name == "value"), None)
        if value is not None and node.output:
            tensors[node.output[0]] = Tensor(
                node.output[0], _dtype(value.data_type), tuple(value.dims), constant=True
            )
    return tensors


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"


def _dtype(number: int) -> str:
    if number not in onnx.TensorProto.DataType.values():  # of a later ONNX
        return ""
    name = onnx.TensorProto.DataType.Name(number)
    return element_name(name) or (name.lower() if number else "")


def _weights_of(layers: list[Layer] | tuple[Layer, ...]) -> list[Layer]:
    """The layers with the stored dtype of the weights of products, also behind casts and dequantising."""
    result = list(layers)
    edges = EngineLayers("", "", tuple(layers)).edges
    for place, layer in enumerate(result):
        if layer.kind not in PRODUCTS or layer.kind == "attention":
            continue
        constants = [tensor for tensor in layer.inputs if tensor.constant]
        pending = [i for i in edges.before[place] if layers[i].type in (*_PASSING, "DequantizeLinear")]
        visited: set[int] = set()
        while pending:
            i = pending.pop()
            visited.add(i)
            constants += [tensor for tensor in layers[i].inputs[:1] if tensor.constant]
            pending += [j for j in edges.before[i] if layers[j].type in _PASSING and j not in visited]
        constants = [tensor for tensor in constants if tensor.dtype in ITEM_BYTES and _elements(tensor) > 1]
        if constants:
            largest = max(constants, key=_elements)
            result[place] = replace(layer, weight_dtype=largest.dtype)
    return result


def _codes_of(layers: list[Layer]) -> list[Layer]:
    """The layers with the planned precision of products after DequantizeLinear: the dtype of the quantised values."""
    result = list(layers)
    edges = EngineLayers("", "", tuple(layers)).edges
    for place, layer in enumerate(result):
        if layer.kind not in PRODUCTS:
            continue
        read = [layers[i] for i in edges.before[place]]
        codes = [other for other in read if other.type == "DequantizeLinear"]
        activations = [other for other in codes if other.inputs and not other.inputs[0].constant]
        if codes and activations:
            result[place] = replace(layer, precision=activations[0].inputs[0].dtype or layer.precision)
    return result


def _elements(tensor: Tensor) -> float:
    return math.prod(size for size in tensor.shape or () if isinstance(size, int) and size >= 0)
