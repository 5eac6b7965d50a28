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
from wanlab.core.errors import WanlabError
from wanlab.core.formats import ITEM_BYTES, element_name
from wanlab.engine_report.layers import PRODUCTS, EngineLayers, Layer, Tensor, join, onnx_kind, precision_of
from wanlab.export.components import AXES
from wanlab.models.shapes import latent_shape

_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,  # of sizes, which divide
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def traced_sizes(metadata: Mapping[str, str]) -> dict[str, int]:
    """Sizes of the axes as wanlab names them, of the clip that a graph was traced with, at batch 1."""
    try:
        clip = json.loads(metadata["shape"])
        latent = latent_shape(models.get(metadata["model"]), clip["height"], clip["width"], clip["frames"])
    except (KeyError, ValueError, WanlabError):
        return {}
    return clip | {
        "batch": 1, "tokens": latent.tokens, "latent_frames": latent.frames, "latent_height": latent.height,
        "latent_width": latent.width,
    }  # fmt: skip


def with_sizes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """The graph with its free axes set and shapes inferred again; as it is where nothing is free or known.

    Axes of inputs are known by name (`text_tokens`) or place (axis 2 of `hidden_states` is `latent_frames`); where one
    is an expression (`2*latent_height_units`), its symbol follows, and with it every other expression of it.
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
                found = evaluated(dim.dim_param, symbols)
                # An unnamed axis is filled in by inference; a name would stay.
                dim.ClearField("dim_param")
                if found is not None:
                    dim.dim_value = found
    try:
        return onnx.shape_inference.infer_shapes(copy, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return copy


def evaluated(text: str, symbols: Mapping[str, int]) -> int | None:
    """Value of `2*latent_height_units + 1`; None where a symbol is not known."""

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
        return walk(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError, ZeroDivisionError, ValueError):
        return None


def _solved(text: str, size: int) -> dict[str, int]:
    """The one symbol of a linear expression that has this value."""
    try:
        names = {node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)}
    except SyntaxError:
        return {}
    if len(names) != 1:
        return {}
    name = names.pop()
    none, one = evaluated(text, {name: 0}), evaluated(text, {name: 1})
    if none is None or one is None or one == none or (size - none) % (one - none):
        return {}
    return {name: (size - none) // (one - none)}


_PASSING = ("Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Identity", "Flatten")
"""Operators behind which a weight is still the same weight."""


def read_onnx(
    path: str | os.PathLike, *, name: str = "", sizes: Mapping[str, int] | None = None, source: str = "onnx"
) -> EngineLayers:
    """Layers of an ONNX graph; weights outside of the file are not read.

    Args:
        path: the `.onnx` file.
        sizes: axis name (`"latent_frames"`) -> size, for graphs with free axes; by default those of the clip that
            wanlab traced it with, at batch 1. Axes that stay free leave sizes in bytes unknown.
        source: `"onnxruntime"` for a graph that ONNX Runtime has optimised.

    Raises:
        WanlabError: no such file, or no ONNX graph.
    """
    model = _load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    sizes = dict(sizes) if sizes is not None else traced_sizes(metadata)
    tensors = _tensors(with_sizes(model, sizes))
    nested = sum(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute)
    notes = [f"{nested} subgraphs are not looked into"] if nested else []
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
        notes.append(f"{free} tensors have sizes that are not known: activation bytes are a lower bound")
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
        raise WanlabError(f"no ONNX file at {path}; make it with wanlab.export.export")
    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise WanlabError(f"{path} is no ONNX graph: {error}") from error


def _tensors(model: onnx.ModelProto) -> dict[str, Tensor]:
    graph = model.graph
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shape = tuple(_size(dim) for dim in kind.shape.dim) if kind.HasField("shape") else None
        found[value.name] = Tensor(value.name, _dtype(kind.elem_type), shape)
    for constant in graph.initializer:
        found[constant.name] = Tensor(
            constant.name, _dtype(constant.data_type), tuple(constant.dims), constant=True
        )
    for node in graph.node:
        value = next((a.t for a in node.attribute if node.op_type == "Constant" and a.name == "value"), None)
        if value is not None:
            found[node.output[0]] = Tensor(
                node.output[0], _dtype(value.data_type), tuple(value.dims), constant=True
            )
    return found


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"


def _dtype(number: int) -> str:
    name = onnx.TensorProto.DataType.Name(number)
    return element_name(name) or (name.lower() if number else "")


def _weights_of(layers: list[Layer] | tuple[Layer, ...]) -> list[Layer]:
    """The dtype that the weights of products are stored in, through casts and dequantising."""
    made = list(layers)
    edges = EngineLayers("", "", tuple(layers)).edges
    for place, layer in enumerate(made):
        if layer.kind not in PRODUCTS or layer.kind == "attention":
            continue
        constants = [tensor for tensor in layer.inputs if tensor.constant]
        todo = [i for i in edges.before[place] if layers[i].type in (*_PASSING, "DequantizeLinear")]
        while todo:
            i = todo.pop()
            constants += [tensor for tensor in layers[i].inputs[:1] if tensor.constant]
            todo += [j for j in edges.before[i] if layers[j].type in _PASSING]
        constants = [tensor for tensor in constants if tensor.dtype in ITEM_BYTES and _elements(tensor) > 1]
        if constants:
            largest = max(constants, key=_elements)
            made[place] = replace(layer, weight_dtype=largest.dtype)
    return made


def _codes_of(layers: list[Layer]) -> list[Layer]:
    """Products between DequantizeLinear nodes, as an engine is meant to compute them: on the codes."""
    made = list(layers)
    edges = EngineLayers("", "", tuple(layers)).edges
    for place, layer in enumerate(made):
        if layer.kind not in PRODUCTS:
            continue
        read = [layers[i] for i in edges.before[place]]
        codes = [other for other in read if other.type == "DequantizeLinear"]
        activations = [other for other in codes if other.inputs and not other.inputs[0].constant]
        if codes and activations:
            made[place] = replace(layer, precision=activations[0].inputs[0].dtype or layer.precision)
    return made


def _elements(tensor: Tensor) -> float:
    return math.prod(size for size in tensor.shape or () if isinstance(size, int))
