"""In which order an engine may compute what does not depend on the hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanlab.convert.onnx.pieces import BEFORE, places

if TYPE_CHECKING:
    import onnx_ir


def order_modulation(model: onnx_ir.Model) -> int:
    """Make the modulation of every block wait for the block, where there is one for every token.

    It does not depend on the hidden states, so ONNX Runtime computes that of all blocks before the first one: at
    704x1280x121 that is 30 times two tensors of 2 GB. Here its input is reshaped to the size it has, taken from the
    hidden states: nothing is computed or copied for that, but it cannot happen before they are there. Only where
    batch and tokens are free, as fixed ones are folded away.

    Returns:
        How many blocks were ordered.
    """
    import numpy as np
    import onnx_ir

    place, stream, after = places(model)
    if not after:
        return 0
    graph, ordered = model.graph, 0
    states: dict[int, onnx_ir.Value] = {}
    for node in stream:
        for value in node.inputs:
            before = place.get(value.producer(), place[node]) if value else place[node]
            if value and value.producer() in stream and before < place[node]:
                states[place[node]] = value
    for node in list(graph):
        block = place[node]
        if node in stream or block not in states or block == after:
            continue
        for index, value in enumerate(node.inputs):
            shared = (
                value is not None and not value.is_initializer() and place.get(value.producer()) == BEFORE
            )
            if not shared or value.shape is None or len(value.shape) != 4 or isinstance(value.shape[1], int):
                continue
            rest = [size for size in list(value.shape)[2:] if isinstance(size, int)]
            if len(rest) != 2:
                continue
            name = f"blocks.{block}/modulation_after_state"
            counts = onnx_ir.node("Shape", [states[block]], {"start": 0, "end": 2}, name=f"{name}_shape")
            tail = onnx_ir.Value(
                name=f"{name}_tail",
                const_value=onnx_ir.tensor(np.array(rest, np.int64)),
                shape=onnx_ir.Shape([2]),
            )
            tail.type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
            graph.register_initializer(tail)
            size = onnx_ir.node("Concat", [counts.outputs[0], tail], {"axis": 0}, name=f"{name}_size")
            late = onnx_ir.node("Reshape", [value, size.outputs[0]], name=name)
            for made in (counts, size, late):
                made.outputs[0].name = f"{made.name}_{index}"
            late.outputs[0].type, late.outputs[0].shape = value.type, value.shape
            graph.insert_before(node, [counts, size, late])
            node.replace_input_with(index, late.outputs[0])
            ordered += 1
    if ordered:
        graph.sort()
    return ordered
