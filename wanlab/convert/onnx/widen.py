"""Operators that engines have no bfloat16 kernel for, in float32 between two casts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir

WITHOUT_BFLOAT16 = ("Clip", "Cos", "Pad", "Reciprocal", "Resize", "Sin")
"""Of those that Wan's networks become: ONNX Runtime has them on no device (its OperatorKernels.md). Clip, Pad and Resize to
the nearest only move or choose values, so they give the same ones; the others are rounded once, after computing."""


def widen_bfloat16(model: onnx_ir.Model) -> int:
    """Let these operators read and write float32 where the graph gives them bfloat16.

    Types of values have to be known. A graph without bfloat16 stays as it is.

    Returns:
        How many nodes were changed.
    """
    import onnx_ir

    narrow, wide = onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT
    graph, changed = model.graph, 0
    for node in list(graph):
        if node.domain or node.op_type not in WITHOUT_BFLOAT16 or node.outputs[0].dtype != narrow:
            continue
        changed += 1
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != narrow:
                continue
            name = f"{node.name}_widened_{index}"
            if value.const_value is not None:  # a bound or a filling: no cast at every run
                held = onnx_ir.Value(name=name, shape=value.shape, type=onnx_ir.TensorType(wide))
                held.const_value = onnx_ir.tensor(value.const_value.numpy().astype("float32"), name=name)
                graph.register_initializer(held)
                node.replace_input_with(index, held)
                continue
            cast = _cast(value, wide, name)
            graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
        made = node.outputs[0]
        readers = list(made.uses())
        back = _cast(made, narrow, f"{node.name}_narrowed")
        graph.insert_after(node, back)
        made.dtype = wide
        for use in readers:
            use.node.replace_input_with(use.idx, back.outputs[0])
        for index, output in enumerate(graph.outputs):
            if output is made:  # an output keeps its name
                graph.outputs[index] = back.outputs[0]
                back.outputs[0].name, made.name = made.name, f"{made.name}_wide"
    return changed


def _cast(value: onnx_ir.Value, kind: onnx_ir.DataType, name: str) -> onnx_ir.Node:
    import onnx_ir

    node = onnx_ir.node("Cast", [value], {"to": kind}, name=name)
    node.outputs[0].name, node.outputs[0].shape = name, value.shape
    node.outputs[0].dtype = kind
    return node
