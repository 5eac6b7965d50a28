"""Makes an ONNX file of a traced program: weights, constant folding, names, simplification, check; facts of such files."""

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
    """A part of a graph that can run alone.

    Attributes:
        name: `"before"`, `"blocks.7"`, `"after"`.
        inputs, outputs: names of the values that it reads from other parts, and of those that other parts read.
        state: name of the input with the hidden states; empty before the first block.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    state: str


def cut(model: onnx_ir.Model) -> list[Piece]:
    """The pieces of an expert's graph, in order.

    A node that depends on the hidden states belongs to the block in its name, or, without one, to the block of its
    inputs. Other nodes (modulation, keys and values of the text) belong to the only block that uses them, else to the part
    before all blocks.

    Raises:
        WanlabError: no node has the name of a block, or a block passes on more than one value.
    """
    place, stream, after = places(model)
    if not after:
        raise WanlabError("no node of the graph is named blocks.N: export it with wanlab.export.export")
    return [_piece(model, index, after, place, stream) for index in range(BEFORE, after + 1)]


def places(model: onnx_ir.Model) -> tuple[dict[onnx_ir.Node, int], set[onnx_ir.Node], int]:
    """Node -> block, the nodes that depend on the hidden states, and the number of blocks."""
    nodes = list(model.graph)
    blocks = [int(match[1]) for node in nodes if (match := _BLOCK.match(node.name or ""))]
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
    """Node -> block, for the nodes that depend on the hidden states."""
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
            f"{name} of the graph reads {len(states)} hidden states ({', '.join(states)}), not one"
        )
    return Piece(name, tuple(inputs), tuple(outputs), states[0] if states else "")


@contextmanager
def piece_file(model: onnx_ir.Model, piece: Piece, folder: Path) -> Iterator[Path]:
    """The piece as a separate ONNX file inside the block; weights in other files are not copied.

    Args:
        model: the whole graph.
        piece: the piece.
        folder: folder of the whole graph, to which paths of weights are relative.
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
    """Make the modulation of every block depend on its hidden states, for models with modulation per token.

    Modulation does not depend on the hidden states, so ONNX Runtime computes that of all blocks before the first block: at
    704x1280x121 these are 30 times two tensors of 2 GB. Here its input is reshaped to its own size, which is read from the
    hidden states: this neither computes nor copies anything, but cannot run before them. It is done only if batch and
    tokens are free, because the reshape would be folded otherwise.

    Returns:
        Number of blocks that were ordered.
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
            for added in (counts, size, late):
                added.outputs[0].name = f"{added.name}_{index}"
            late.outputs[0].type, late.outputs[0].shape = value.type, value.shape
            graph.insert_before(node, [counts, size, late])
            node.replace_input_with(index, late.outputs[0])
            ordered += 1
    if ordered:
        graph.sort()
    return ordered


WITHOUT_BFLOAT16 = ("Clip", "Cos", "Pad", "Reciprocal", "Resize", "Sin")
"""Operators of Wan's networks that ONNX Runtime has in bfloat16 on no device (its OperatorKernels.md). Clip, Pad and nearest
Resize only move or select values, so their results are equal; results of the others are rounded once."""


def widen_bfloat16(model: onnx_ir.Model) -> int:
    """Change operators of `WITHOUT_BFLOAT16` that read and write bfloat16 to float32, with casts.

    Types of values have to be known. A graph without bfloat16 is not changed.

    Returns:
        Number of changed nodes.
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
            if value.const_value is not None:  # a constant is converted here, not at every run
                constant = onnx_ir.Value(name=name, shape=value.shape, type=onnx_ir.TensorType(wide))
                constant.const_value = onnx_ir.tensor(value.const_value.numpy().astype("float32"), name=name)
                graph.register_initializer(constant)
                node.replace_input_with(index, constant)
                continue
            cast = _cast(value, wide, name)
            graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
        result = node.outputs[0]
        readers = list(result.uses())
        back = _cast(result, narrow, f"{node.name}_narrowed")
        graph.insert_after(node, back)
        result.dtype = wide
        for use in readers:
            use.node.replace_input_with(use.idx, back.outputs[0])
        for index, output in enumerate(graph.outputs):
            if output is result:  # an output keeps its name
                graph.outputs[index] = back.outputs[0]
                back.outputs[0].name, result.name = result.name, f"{result.name}_wide"
    return changed


def select_booleans(model: onnx_ir.Model) -> int:
    """Change every Where of truth values to `condition and a or not condition and b`: ONNX Runtime selects numbers only.

    Returns:
        Number of changed nodes.
    """
    graph, changed = model.graph, 0
    for node in list(graph):
        if node.domain or node.op_type != "Where" or node.outputs[0].dtype != onnx_ir.DataType.BOOL:
            continue
        changed += 1
        condition, chosen, other = node.inputs
        opposite = _logical("Not", [condition], f"{node.name}_not")
        first = _logical("And", [condition, chosen], f"{node.name}_chosen")
        second = _logical("And", [opposite.outputs[0], other], f"{node.name}_other")
        both = _logical("Or", [first.outputs[0], second.outputs[0]], f"{node.name}_selected")
        both.outputs[0].shape = node.outputs[0].shape
        graph.insert_before(node, [opposite, first, second, both])
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], both.outputs[0])
        graph.remove(node, safe=True)
    return changed


def _logical(kind: str, inputs: list, name: str) -> onnx_ir.Node:
    node = onnx_ir.node(kind, inputs, name=name)
    node.outputs[0].name, node.outputs[0].dtype = name, onnx_ir.DataType.BOOL
    return node


def _cast(value: onnx_ir.Value, kind: onnx_ir.DataType, name: str) -> onnx_ir.Node:
    node = onnx_ir.node("Cast", [value], {"to": kind}, name=name)
    node.outputs[0].name, node.outputs[0].shape = name, value.shape
    node.outputs[0].dtype = kind
    return node


EXTERNAL_ABOVE_BYTES = 1536 * 2**20  # the limit of protobuf is 2 GiB


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
    """Fold, name, simplify, write and check a graph; the file at `path` is written only after a successful check.

    Args:
        traced: model of a `wanlab.export.trace.Trace`, before constant folding; it is not changed.
        network: network with the weights.
        path: path of the file.
        axis_names: input -> {axis: name}; traced symbols are renamed to these.
        simplify: whether onnxsim simplifies the graph.
        weights: file for weights outside the graph.
        external_data: whether weights are in that file; None decides by size (see `EXTERNAL_ABOVE_BYTES`).
        stored: dtype of the weights in the file, see `fill`.
        metadata: metadata of the file.

    Raises:
        WanlabError: onnx.checker refuses the graph.
    """
    model = traced.clone()
    nodes_before = sum(1 for _ in model.graph.all_nodes())
    large = fill(model.graph, network, stored)
    lift(model.graph, large)
    # onnxsim does the work of a second iteration; with both the graphs were the same, but it took longer.
    with quiet():
        onnxscript.optimizer.optimize(model, num_iterations=1 if simplify else 2)
    name_nodes(model)
    name_axes(model, axis_names)
    widen_bfloat16(model)  # before onnxsim, which may remove the types of values
    select_booleans(model)
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
    """Write a graph into the folder of its weights; the file is kept only if onnx.checker accepts it.

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
    """All nodes, including those of subgraphs and functions."""
    stack = [model.graph, *model.functions]
    while stack:
        for node in stack.pop().node:
            yield node
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    stack.append(attribute.g)
                stack.extend(attribute.graphs)


def lint(model: onnx.ModelProto) -> list[str]:
    """Operators and types that engines run slowly or refuse, one line each: ScatterND, sequences, float64, complex."""
    counts = Counter(node.op_type for node in nodes(model))
    findings = [
        f"{counts[name]} {name} nodes"
        for name in ("ScatterND", "SequenceAt", "SplitToSequence")
        if counts[name]
    ]
    kinds = Counter(_element_types(model))
    numbers = onnx.TensorProto
    for name, count in (
        ("float64", kinds[numbers.DOUBLE]),
        ("complex", kinds[numbers.COMPLEX64] + kinds[numbers.COMPLEX128]),
    ):
        if count:
            findings.append(f"{count} {name} tensors")
    return findings


def _element_types(model: onnx.ModelProto) -> Iterator[int]:
    """Element types in the graph: of weights, values, casts and constants."""
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
    """Size of an ONNX file and its weights in other files; 0 if any of them is missing or damaged."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError):
        return 0
    size, file_sizes = path.stat().st_size, {}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        file, length = path.parent / place["location"], int(place.get("length", 0))
        if file not in file_sizes:
            file_sizes[file] = file.stat().st_size if file.exists() else 0
        if file_sizes[file] < int(place.get("offset", 0)) + length:
            return 0
        size += length
    return size


def formats_of(path: Path) -> str:
    """Formats of quantised layers in the metadata of a graph; empty if there are none or the file cannot be read."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError):
        return ""
    return next((entry.value for entry in model.metadata_props if entry.key == "wanlab_format"), "")


def _simplified(model: onnx_ir.Model) -> onnx_ir.Model:
    """A graph, whose large weights are inputs, simplified by onnxsim."""
    simplified, _ = onnxsim.simplify(onnx_ir.to_proto(model))
    return onnx_ir.from_proto(simplified)
