"""An expert's graph cut into pieces: what comes before the blocks, each block, what comes after."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import onnx_ir

_BLOCK = re.compile(r"^blocks\.(\d+)[./]")
BEFORE = -1


@dataclass(frozen=True)
class Piece:
    """A part of a graph that runs on its own.

    Attributes:
        name: `"before"`, `"blocks.7"`, `"after"`.
        inputs, outputs: names of the values it takes from outside, and of those that others need.
        state: the input that carries the hidden states; empty before the first block.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    state: str


def cut(model: onnx_ir.Model) -> list[Piece]:
    """The pieces of an expert's graph, in order.

    What depends on the hidden states belongs to the block that its name says, or, without a name, to the one
    that made its input. What does not (modulation, keys and values of the text) belongs to the block that alone
    uses it, and otherwise before all blocks.

    Raises:
        WanlabError: no node carries the name of a block, or the blocks hand on more than one value.
    """
    place, stream, after = places(model)
    if not after:
        raise WanlabError("no node of the graph is named blocks.N: export it with wanlab.convert.export")
    return [_piece(model, index, after, place, stream) for index in range(BEFORE, after + 1)]


def places(model: onnx_ir.Model) -> tuple[dict[onnx_ir.Node, int], set[onnx_ir.Node], int]:
    """Node -> block, the nodes that the hidden states run through, and the number of blocks."""
    nodes = list(model.graph)
    blocks = [int(found[1]) for node in nodes if (found := _BLOCK.match(node.name or ""))]
    if not blocks:
        return {}, set(), 0
    after = max(blocks) + 1
    place = _stream(nodes, after)
    stream = set(place)
    outputs = set(model.graph.outputs)
    for node in reversed(nodes):
        if node in stream:
            continue
        users = {place[use.node] for value in node.outputs for use in value.uses() if use.node in place}
        if any(value in outputs for value in node.outputs):
            users.add(BEFORE)
        place[node] = users.pop() if len(users) == 1 else BEFORE
    return place, stream, after


def _stream(nodes, after: int) -> dict[onnx_ir.Node, int]:
    """Node -> block, for the nodes that the hidden states run through."""
    place: dict[onnx_ir.Node, int] = {}
    for node in nodes:
        module = (node.name or "").rpartition("/")[0]
        before = [place[value.producer()] for value in node.inputs if value and value.producer() in place]
        if not before and module != "patch_embedding":
            continue
        named = _BLOCK.match(node.name or "")
        own = int(named[1]) if named else after if module in ("norm_out", "proj_out") else BEFORE
        place[node] = max([own, *before])
    return place


def _piece(model, index: int, after: int, place, stream) -> Piece:
    graph_outputs = set(model.graph.outputs)
    inputs, outputs = {}, {}
    for node in model.graph:
        if place[node] != index:
            continue
        for value in node.inputs:
            inside = value is None or value.is_initializer() or place.get(value.producer()) == index
            if not inside:
                inputs[value.name] = value
        for value in node.outputs:
            if value in graph_outputs or any(place[use.node] != index for use in value.uses()):
                outputs[value.name] = value
    states = [name for name, value in inputs.items() if value.producer() in stream]
    name = "before" if index == BEFORE else "after" if index == after else f"blocks.{index}"
    if len(states) != (index != BEFORE):
        raise WanlabError(
            f"{name} of the graph takes {len(states)} hidden states ({', '.join(states)}), not one"
        )
    return Piece(name, tuple(inputs), tuple(outputs), states[0] if states else "")


@contextmanager
def piece_file(model: onnx_ir.Model, piece: Piece, folder: Path) -> Iterator[Path]:
    """The piece as an ONNX file of its own while the context lasts; weights outside stay where they are.

    Args:
        folder: of the whole graph, as weights are found from there.
    """
    import onnx
    import onnx_ir

    graph = onnx_ir.convenience.extract(model.graph, list(piece.inputs), list(piece.outputs))
    part = onnx_ir.Model(graph, ir_version=model.ir_version)
    path = folder / f".{piece.name}.{os.getpid()}.onnx"
    try:
        onnx.save(onnx_ir.to_proto(part), path)
        yield path
    finally:
        path.unlink(missing_ok=True)
