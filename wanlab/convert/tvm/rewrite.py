"""Small exact rewrites of an ONNX graph of fixed sizes, before TVM reads it.

TVM makes a loop nest of its own of every operator. Three that the exporter writes give slow nests, and have an equal
form that TVM does well:

- a convolution whose stride is its kernel (the patch embedding): a matrix product over the patches;
- `Gelu` with `approximate="tanh"`: written out, so that its tanh can be vectorised;
- `Pow` with 2: a product.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


def rewrite(model: onnx.ModelProto) -> dict[str, int]:
    """Rewrite `model` in place; new nodes begin with the name of the node that they stand for.

    Args:
        model: of fixed sizes, weights loaded.

    Returns:
        How often each rewrite was made: `"patch convolution"`, `"tanh Gelu"`, `"square"`.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    shapes = {v.name: [dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in values}
    kinds = {v.name: v.type.tensor_type.elem_type for v in values}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {"patch convolution": 0, "tanh Gelu": 0, "square": 0}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        found = _replacement(model.graph, node, shapes, kinds, weights)
        if found is None:
            nodes.append(node)
            continue
        kind, new = found
        made[kind] += 1
        nodes.extend(new)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return made


def _replacement(graph, node, shapes, kinds, weights) -> tuple[str, list[onnx.NodeProto]] | None:
    import onnx

    if node.op_type == "Conv" and _is_patch_convolution(node, shapes, weights):
        return "patch convolution", _patch_product(graph, node, shapes, weights)
    if node.op_type == "Gelu" and _attributes(node).get("approximate") == b"tanh":
        return "tanh Gelu", _tanh_gelu(graph, node, kinds)
    if node.op_type == "Pow" and node.input[1] in weights:
        exponent = onnx.numpy_helper.to_array(weights[node.input[1]])
        if exponent.size == 1 and float(exponent.ravel()[0]) == 2.0:
            square = onnx.helper.make_node("Mul", [node.input[0]] * 2, [node.output[0]], name=node.name)
            return "square", [square]
    return None


class _Writer:
    """Nodes and constants that stand for one node."""

    def __init__(self, graph, node) -> None:
        self.graph, self.node, self.made = graph, node, []
        self.prefix = node.name or node.output[0]

    def constant(self, name: str, value: np.ndarray) -> str:
        import onnx

        tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(value), f"{self.prefix}/{name}")
        self.graph.initializer.append(tensor)
        return tensor.name

    def add(self, operator: str, inputs: list[str], output: str = "", **attributes) -> str:
        import onnx

        name = f"{self.prefix}/{operator}_{len(self.made)}"
        output = output or name
        self.made.append(onnx.helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output


def _is_patch_convolution(node, shapes, weights) -> bool:
    has = _attributes(node)
    size = shapes.get(node.input[0], [])[2:]
    kernel = list(has.get("kernel_shape", ()))
    return (
        node.input[1] in weights
        and bool(kernel)
        and kernel == list(has.get("strides", ()))
        and not any(has.get("pads", ()))
        and has.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        and all(step == 1 for step in has.get("dilations", ()))
        and has.get("group", 1) == 1
        and len(size) == len(kernel)
        and all(have > 0 and have % k == 0 for have, k in zip(size, kernel, strict=True))
    )


def _patch_product(graph, node, shapes, weights) -> list[onnx.NodeProto]:
    """`[B, C, t*kt, h*kh, w*kw]` as `[B, t*h*w, C*kt*kh*kw]` times the flattened kernel."""
    import onnx

    write = _Writer(graph, node)
    kernel = list(_attributes(node)["kernel_shape"])
    batch, channels, *size = shapes[node.input[0]]
    grid = [have // k for have, k in zip(size, kernel, strict=True)]
    weight = onnx.numpy_helper.to_array(weights[node.input[1]])
    split = [batch, channels, *(n for pair in zip(grid, kernel, strict=True) for n in pair)]
    axes = range(len(kernel))
    order = [0, *(2 + 2 * axis for axis in axes), 1, *(3 + 2 * axis for axis in axes)]
    rows = [batch, math.prod(grid), channels * math.prod(kernel)]
    cut = write.add("Reshape", [node.input[0], write.constant("split", np.array(split, np.int64))])
    cut = write.add("Transpose", [cut], perm=order)
    cut = write.add("Reshape", [cut, write.constant("rows", np.array(rows, np.int64))])
    out = write.add("MatMul", [cut, write.constant("weight", weight.reshape(len(weight), -1).T)])
    if len(node.input) > 2 and node.input[2]:
        out = write.add("Add", [out, node.input[2]])
    out = write.add("Transpose", [out], perm=[0, 2, 1])
    grid = write.constant("grid", np.array([batch, len(weight), *grid], np.int64))
    write.add("Reshape", [out, grid], node.output[0])
    return write.made


def _tanh_gelu(graph, node, kinds) -> list[onnx.NodeProto]:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as the ONNX operator defines it."""
    import onnx

    write = _Writer(graph, node)
    x = node.input[0]
    kind = onnx.helper.tensor_dtype_to_np_dtype(kinds.get(x, onnx.TensorProto.FLOAT))
    scale = math.sqrt(2 / math.pi)
    square = write.add("Mul", [x, x])
    inner = write.add("Mul", [square, write.constant("cubic", np.array(0.044715 * scale, kind))])
    inner = write.add("Add", [inner, write.constant("linear", np.array(scale, kind))])
    inner = write.add("Tanh", [write.add("Mul", [inner, x])])
    inner = write.add("Add", [inner, write.constant("one", np.array(1, kind))])
    half = write.add("Mul", [x, write.constant("half", np.array(0.5, kind))])
    write.add("Mul", [half, inner], node.output[0])
    return write.made


def _attributes(node) -> dict:
    import onnx

    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
