"""From a traced program to a finished ONNX file: weights, folding, names, simplification, check."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab.convert.onnx import names
from wanlab.convert.onnx.order import order_modulation
from wanlab.convert.onnx.trace import quiet
from wanlab.convert.onnx.weights import fill, lift, restore
from wanlab.convert.onnx.weights_file import WeightsFile
from wanlab.convert.onnx.widen import widen_bfloat16
from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    import torch

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
    program,
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
        program: what torch.onnx.export gave, unfolded; it may be used again.
        network: whose weights fill it.
        axis_names: input -> {axis: name}; traced symbols are renamed to these.
        weights: where they go when they are not kept inside the graph.
        external_data: whether they go there; None decides by size (see `EXTERNAL_ABOVE_BYTES`).
        stored: dtype of the weights in the file, see `fill`.

    Raises:
        WanlabError: onnx.checker refuses the graph.
    """
    import onnx
    import onnx_ir
    import onnxscript.optimizer

    model = program.model.clone()
    nodes_before = sum(1 for _ in model.graph.all_nodes())
    large = fill(model.graph, network, stored)
    lift(model.graph, large)
    # onnxsim finds what a second round would; both together gave the same graphs, more slowly.
    with quiet():
        onnxscript.optimizer.optimize(model, num_iterations=1 if simplify else 2)
    names.name_nodes(model)
    names.name_axes(model, axis_names)
    widen_bfloat16(model)  # before a simplifier may drop the types of values
    if simplify:
        model = _simplified(model)
        names.name_fused(model, large)
    names.name_weights(model)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(
        f".{path.stem}.{os.getpid()}.onnx"
    )  # in its folder, as the weights are found from there
    try:
        onnx.save(onnx_ir.to_proto(model), draft)
        try:
            onnx.checker.check_model(str(draft), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise WanlabError(f"onnx.checker refuses {path.name}: {str(error).splitlines()[0]}") from error
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)

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


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those inside of subgraphs and functions too."""
    import onnx

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
    import onnx

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
    import onnx

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
    import onnx
    from google.protobuf.message import DecodeError

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
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError):
        return ""
    return next((entry.value for entry in model.metadata_props if entry.key == "wanlab_format"), "")


def _simplified(model: onnx_ir.Model) -> onnx_ir.Model:
    """What onnxsim makes of a graph whose large weights are inputs."""
    import onnx_ir
    import onnxsim

    simplified, _ = onnxsim.simplify(onnx_ir.to_proto(model))
    return onnx_ir.from_proto(simplified)
