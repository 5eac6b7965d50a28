"""Modules for layers whose names have none, from their weights, neighbours and place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from wanlab.convert.card.layers import Edges, Layer
from wanlab.convert.card.names import modules_in

_NEXT = ("cast", "quantize", "reformat", "copy")
_ROUNDS = 8  # a chain of nameless layers is seldom longer


def join(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers with modules, where they can be known.

    In this order: the layer's own name and the ONNX nodes it says it was made from; its weights; a neighbour in the
    graph (a conversion belongs to what reads it, anything else to what wrote its input); a neighbour in the order of
    execution, where the graph is not known.
    """
    joined = [layer if layer.modules else _by_itself(layer) for layer in layers]
    edges = Edges(joined)
    for _ in range(_ROUNDS):
        changed = False
        for place, layer in enumerate(joined):
            if not layer.modules and (found := _by_graph(joined, edges, place)):
                joined[place] = replace(layer, modules=found, joined_by="graph")
                changed = True
        if not changed:
            break
    if not any(edges.before):
        joined = _by_order(joined)
    return tuple(joined)


def _by_itself(layer: Layer) -> Layer:
    found = modules_in((*layer.nodes, layer.name))
    if found:
        return replace(layer, modules=found, joined_by="name")
    # `blocks.0.attn1.to_q.weight`; a constant that folding made (`velocity/shape`) is named after a tensor.
    found = modules_in(tensor.name for tensor in layer.inputs if tensor.constant and "/" not in tensor.name)
    return replace(layer, modules=found, joined_by="weight" if found else "")


def _by_graph(layers: list[Layer], edges: Edges, place: int) -> tuple[str, ...]:
    layer = layers[place]
    before = [layers[i].modules for i in edges.before[place] if layers[i].modules]
    after = {layers[i].modules for i in edges.after[place]}
    only = next(iter(after)) if len(after) == 1 else ()
    if layer.kind in _NEXT or layer.name.startswith("gemm_input"):
        return only or next(iter(before), ())
    return next(iter(before), ()) or only


def _by_order(layers: list[Layer]) -> list[Layer]:
    """Without a graph: the layer just before that wrote a tensor of a shape that this one reads, else the next one."""
    made = list(layers)
    for place, layer in enumerate(layers):
        if layer.modules:
            continue
        follows = next((other.modules for other in layers[place + 1 : place + 3] if other.modules), ())
        shapes = {tensor.shape for tensor in layer.inputs if not tensor.constant}
        leads = next(
            (
                other.modules
                for other in reversed(made[max(place - 4, 0) : place])
                if other.modules and shapes & {tensor.shape for tensor in other.outputs}
            ),
            (),
        )
        found = follows if layer.name.startswith("gemm_input") or layer.kind in _NEXT else leads or follows
        if found := found or leads:
            made[place] = replace(layer, modules=found, joined_by="order")
    return made
