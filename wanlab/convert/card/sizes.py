"""Sizes of a graph's free axes, from those of its inputs."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING

from wanlab.convert.clip import AXES
from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import onnx

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
    from wanlab import models
    from wanlab.models.shapes import latent_shape

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
    import onnx

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
