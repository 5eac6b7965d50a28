"""From a traced program to a finished ONNX file: weights, folding, names, simplification, check."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxscript.optimizer
import onnxsim
import torch
from google.protobuf.message import DecodeError

from wanlab.core.errors import WanlabError, first_line
from wanlab.core.files import atomic_path
from wanlab.export.trace import quiet
from wanlab.export.weights import (
    WeightsFile,
    fill,
    lift,
    name_axes,
    name_fused,
    name_nodes,
    name_weights,
    restore,
)

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
        raise WanlabError("no node of the graph is named blocks.N: export it with wanlab.export.export")
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
    graph = onnx_ir.convenience.extract(model.graph, list(piece.inputs), list(piece.outputs))
    part = onnx_ir.Model(graph, ir_version=model.ir_version)
    path = folder / f".{piece.name}.{os.getpid()}.onnx"
    try:
        onnx.save(onnx_ir.to_proto(part), path)
        yield path
    finally:
        path.unlink(missing_ok=True)


def order_modulation(model: onnx_ir.Model) -> int:
    """Make the modulation of every block wait for the block, where there is one for every token.

    It does not depend on the hidden states, so ONNX Runtime computes that of all blocks before the first one: at
    704x1280x121 that is 30 times two tensors of 2 GB. Here its input is reshaped to the size it has, taken from the
    hidden states: nothing is computed or copied for that, but it cannot happen before they are there. Only where
    batch and tokens are free, as fixed ones are folded away.

    Returns:
        How many blocks were ordered.
    """
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


WITHOUT_BFLOAT16 = ("Clip", "Cos", "Pad", "Reciprocal", "Resize", "Sin")
"""Of those that Wan's networks become: ONNX Runtime has them on no device (its OperatorKernels.md). Clip, Pad and Resize to
the nearest only move or choose values, so they give the same ones; the others are rounded once, after computing."""


def widen_bfloat16(model: onnx_ir.Model) -> int:
    """Let these operators read and write float32 where the graph gives them bfloat16.

    Types of values have to be known. A graph without bfloat16 stays as it is.

    Returns:
        How many nodes were changed.
    """
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
    node = onnx_ir.node("Cast", [value], {"to": kind}, name=name)
    node.outputs[0].name, node.outputs[0].shape = name, value.shape
    node.outputs[0].dtype = kind
    return node


EXTERNAL_ABOVE_BYTES = 1536 * 2**20  # protobuf ends at 2 GiB


@dataclass(frozen=True)
class Finished:
    """Facts of a written file; field names as in `ExportReport`."""

    nodes_before: int
    nodes_after: int
    operators: dict[str, int]
    sizes: dict[str, tuple[int | str, ...]]
    free_axes: dict[str, tuple[int, ...]]
    size_bytes: int
    weights_file: str
    weights_written_bytes: int
    simplified: bool
    notes: tuple[str, ...]


def finish(
    traced: onnx_ir.Model,
    network: torch.nn.Module,
    path: Path,
    *,
    axis_names: dict[str, dict[int, str]],
    simplify: bool,
    weights: WeightsFile,
    external_data: bool | None,
    stored: torch.dtype | None,
    metadata: dict[str, str],
) -> Finished:
    """Fold, name, simplify, write and check; the file appears under `path` only when all went well.

    Args:
        traced: of `wanlab.export.trace.Trace`, unfolded; it stays as it is.
        network: whose weights fill it.
        axis_names: input -> {axis: name}; traced symbols are renamed to these.
        weights: where they go when they are not kept inside the graph.
        external_data: whether they go there; None decides by size (see `EXTERNAL_ABOVE_BYTES`).
        stored: dtype of the weights in the file, see `fill`.

    Raises:
        WanlabError: onnx.checker refuses the graph.
    """
    model = traced.clone()
    nodes_before = sum(1 for _ in model.graph.all_nodes())
    large = fill(model.graph, network, stored)
    lift(model.graph, large)
    # onnxsim finds what a second round would; both together gave the same graphs, more slowly.
    with quiet():
        onnxscript.optimizer.optimize(model, num_iterations=1 if simplify else 2)
    name_nodes(model)
    name_axes(model, axis_names)
    widen_bfloat16(model)  # before a simplifier may drop the types of values
    if simplify:
        model = _simplified(model)
        name_fused(model, large)
    name_weights(model)
    used = restore(model.graph, large)
    order_modulation(model)
    model.producer_name, model.producer_version = "wanlab", metadata["wanlab_version"]
    model.metadata_props.clear()
    model.metadata_props.update(metadata)

    weight_bytes = sum(weight.lazy(name).nbytes for name, weight in used.items())
    external = weight_bytes > EXTERNAL_ABOVE_BYTES if external_data is None else external_data
    written_bytes = weights.add(used) if external else 0
    if external:
        weights.refer(model.graph)
    save_checked(model, path)

    written = onnx.load(path, load_external_data=False)
    sizes = {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in written.graph.input
    }
    operators = Counter(node.op_type for node in nodes(written))
    return Finished(
        nodes_before=nodes_before,
        nodes_after=operators.total(),
        operators=dict(operators.most_common()),
        sizes=sizes,
        free_axes={
            name: tuple(i for i, s in enumerate(dims) if isinstance(s, str)) for name, dims in sizes.items()
        },
        size_bytes=path.stat().st_size + (weight_bytes if external else 0),
        weights_file=weights.path.name if external else "",
        weights_written_bytes=written_bytes,
        simplified=simplify,
        notes=tuple(lint(written)),
    )


def save_checked(model: onnx_ir.Model, path: Path) -> None:
    """Write a graph, by name in the folder where its weights lie; it appears when onnx.checker has accepted it.

    Raises:
        WanlabError: onnx.checker refuses the graph.
    """
    with atomic_path(path, ".onnx") as draft:
        onnx.save(onnx_ir.to_proto(model), draft)
        try:
            onnx.checker.check_model(str(draft), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise WanlabError(f"onnx.checker refuses {path.name}: {first_line(error)}") from error


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those inside of subgraphs and functions too."""
    stack = [model.graph, *model.functions]
    while stack:
        for node in stack.pop().node:
            yield node
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    stack.append(attribute.g)
                stack.extend(attribute.graphs)


def lint(model: onnx.ModelProto) -> list[str]:
    """What engines run badly or refuse, one line each: ScatterND, sequences, float64, complex numbers."""
    counts = Counter(node.op_type for node in nodes(model))
    found = [
        f"{counts[name]} {name} nodes"
        for name in ("ScatterND", "SequenceAt", "SplitToSequence")
        if counts[name]
    ]
    kinds = Counter(_element_types(model))
    numbers = onnx.TensorProto
    for word, count in (
        ("float64", kinds[numbers.DOUBLE]),
        ("complex", kinds[numbers.COMPLEX64] + kinds[numbers.COMPLEX128]),
    ):
        if count:
            found.append(f"{count} {word} tensors")
    return found


def _element_types(model: onnx.ModelProto) -> Iterator[int]:
    """Element types of all that the graph says the type of: weights, values, casts, constants."""
    yield from (tensor.data_type for tensor in model.graph.initializer)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        yield value.type.tensor_type.elem_type
    for node in nodes(model):
        for attribute in node.attribute:
            if attribute.name == "to":
                yield attribute.i
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t.data_type


def file_bytes(path: Path) -> int:
    """Size of an ONNX file and of the weights outside that it uses; 0 when any of it is missing or broken."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError):
        return 0
    size, held = path.stat().st_size, {}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        file, length = path.parent / place["location"], int(place.get("length", 0))
        if file not in held:
            held[file] = file.stat().st_size if file.exists() else 0
        if held[file] < int(place.get("offset", 0)) + length:
            return 0
        size += length
    return size


def formats_of(path: Path) -> str:
    """What a graph is quantised in, as its metadata says; empty when in nothing, or when it cannot be read."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError):
        return ""
    return next((entry.value for entry in model.metadata_props if entry.key == "wanlab_format"), "")


def _simplified(model: onnx_ir.Model) -> onnx_ir.Model:
    """What onnxsim makes of a graph whose large weights are inputs."""
    simplified, _ = onnxsim.simplify(onnx_ir.to_proto(model))
    return onnx_ir.from_proto(simplified)
