"""From a traced program to a finished ONNX file: weights, folding, names, simplification, check."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import onnx
    import onnx_ir

# Protobuf ends at 2 GiB; onnxsim holds several copies of the graph, so it is left out above this too.
EXTERNAL_ABOVE_BYTES = 1536 * 2**20
_WRAPPER = "network."  # attribute of the traced wrapper that holds the network
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Finished:
    """Facts of a written file; field names as in `ExportReport`."""

    nodes_before: int
    nodes_after: int
    operators: dict[str, int]
    sizes: dict[str, tuple[int | str, ...]]
    free_axes: dict[str, tuple[int, ...]]
    size_bytes: int
    external_data: bool
    simplified: bool
    notes: tuple[str, ...]


def with_weights(program, network, *, shared: bool) -> onnx_ir.Model:
    """A graph of its own from a traced program, filled with the weights of `network`.

    Args:
        program: what torch.onnx.export gave, unfolded, so that every weight is still an initializer
            under its own name.
        network: the traced network, or one of the same architecture when `shared`.

    Raises:
        WanlabError: a weight of the graph is missing in `network` or has another shape.
    """
    import onnx_ir

    model = program.model.clone()
    if not shared:
        return model
    weights = {f"{_WRAPPER}{name}": tensor for name, tensor in network.state_dict().items()}
    parameters = {f"{_WRAPPER}{name}" for name, _ in network.named_parameters()}
    for name, value in model.graph.initializers.items():
        if name in weights:
            tensor = weights[name].detach()
            if tuple(tensor.shape) != tuple(value.shape.numpy()):
                raise WanlabError(
                    f"weight {name} is {tuple(tensor.shape)}, the shared graph wants {value.shape}"
                )
            value.const_value = onnx_ir.tensor_adapters.TorchTensor(tensor, name=name)
    missing = parameters & set(program.model.graph.initializers) - set(weights)
    if missing:
        raise WanlabError(
            f"the shared graph has no weights for {sorted(missing)[0]} and {len(missing) - 1} more"
        )
    return model


def finish(
    model: onnx_ir.Model,
    path: Path,
    *,
    axis_names: dict[str, dict[int, str]],
    simplify: bool,
    external_data: bool | None,
    metadata: dict[str, str],
) -> Finished:
    """Fold, name, simplify, write and check; the file appears under `path` only when all went well.

    Args:
        axis_names: input -> {axis: name}; traced symbols are renamed to these.
        external_data: None decides by size (see `EXTERNAL_ABOVE_BYTES`).

    Raises:
        WanlabError: onnx.checker refuses the graph.
    """
    import onnx
    import onnx_ir
    import onnxscript.optimizer

    nodes_before = sum(1 for _ in model.graph.all_nodes())
    # onnxsim finds what a second round would; both together gave the same graphs, more slowly.
    onnxscript.optimizer.optimize(model, num_iterations=1 if simplify else 2)
    _name_nodes(model)
    _name_weights(model)
    _name_axes(model, axis_names)
    model.producer_name, model.producer_version = "wanlab", metadata["wanlab_version"]
    model.metadata_props.clear()
    model.metadata_props.update(metadata)

    notes = []
    weight_bytes = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value
    )
    large = weight_bytes > EXTERNAL_ABOVE_BYTES
    external = large if external_data is None else external_data
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written to a folder of its own first: the name of the external file is part of the graph.
    temporary = path.parent / f".{path.stem}.{os.getpid()}"
    temporary.mkdir(exist_ok=True)
    try:
        draft = temporary / path.name
        data_name = f"{path.name}.data"
        if large:
            if simplify:
                notes.append(f"not simplified: onnxsim would copy {weight_bytes / 2**30:.1f} GiB of weights")
            onnx_ir.save(model, draft, external_data=data_name)
        else:
            proto = onnx_ir.to_proto(model)
            if simplify:
                proto = _simplified(proto)
                _name_fused(proto, set(model.graph.initializers))
            if external:
                onnx.save(proto, draft, save_as_external_data=True, location=data_name, size_threshold=1024)
            else:
                onnx.save(proto, draft)
        try:
            onnx.checker.check_model(str(draft), full_check=not large)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise WanlabError(f"onnx.checker refuses {path.name}: {str(error).splitlines()[0]}") from error
        if (temporary / data_name).exists():
            os.replace(temporary / data_name, path.with_name(data_name))
        else:
            path.with_name(data_name).unlink(missing_ok=True)  # of an earlier export of this file
        os.replace(draft, path)
    finally:
        for leftover in temporary.iterdir():
            leftover.unlink()
        temporary.rmdir()

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
        size_bytes=file_bytes(path),
        external_data=path.with_name(data_name).exists(),
        simplified=simplify and not large,
        notes=(*notes, *lint(written)),
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
    """What engines run badly or refuse, one line each: ScatterND, float64, sequences."""
    import onnx

    counts = Counter(node.op_type for node in nodes(model))
    found = [
        f"{counts[name]} {name} nodes"
        for name in ("ScatterND", "SequenceAt", "SplitToSequence")
        if counts[name]
    ]
    double = onnx.TensorProto.DOUBLE
    tensors = sum(tensor.data_type == double for tensor in model.graph.initializer)
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    tensors += sum(value.type.tensor_type.elem_type == double for value in values)
    for node in nodes(model):
        for attribute in node.attribute:
            tensors += attribute.name == "to" and attribute.i == double
            tensors += attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == double
    if tensors:
        found.append(f"{tensors} float64 tensors")
    return found


def file_bytes(path: Path) -> int:
    """Size of an ONNX file and its external data; 0 when it is not there."""
    files = (path, path.with_name(f"{path.name}.data"))
    return sum(file.stat().st_size for file in files if file.exists()) if path.exists() else 0


def _simplified(proto: onnx.ModelProto) -> onnx.ModelProto:
    import onnxsim

    metadata = list(proto.metadata_props)
    simplified, _ = onnxsim.simplify(proto)
    del simplified.metadata_props[:]  # a log of what was simplified
    simplified.metadata_props.extend(metadata)
    return simplified


def _name_nodes(model: onnx_ir.Model) -> None:
    """Put the module path before each node's name, and drop the traces of the machine it was made on."""
    for node in model.graph.all_nodes():
        scopes = (
            json.loads(node.metadata_props[_SCOPES].replace("'", '"'))
            if _SCOPES in node.metadata_props
            else []
        )
        # [..., innermost module, node]; the wrapper's own attribute comes first
        module = f"{scopes[-2]}.".removeprefix(_WRAPPER).strip(".") if len(scopes) > 1 else ""
        module = "" if module.startswith("_empty_nn_module") else module  # made by the exporter, of no module
        node.metadata_props.clear()  # stack traces with file names
        if module and node.name:
            node.name = f"{module}/{node.name}"
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def _name_weights(model: onnx_ir.Model) -> None:
    """Weights by their names in the network's own state dict; `.T` where folding transposed one."""
    taken = {value.name for value in model.graph.initializers.values()}
    for value in list(model.graph.initializers.values()):
        name = value.name.removeprefix(_WRAPPER)
        users = [use.node for use in value.uses()]
        if name == value.name and len(users) == 1 and users[0].op_type in ("MatMul", "Gemm"):
            transposed = f"{users[0].name.rpartition('/')[0]}.weight.T"
            if not transposed.startswith(".") and transposed not in taken:
                name = transposed
        taken.add(name)
        value.name = name


def _name_fused(proto: onnx.ModelProto, weights: set[str]) -> None:
    """Put the module path before the names of nodes that onnxsim made, where a weight tells the module."""
    for node in proto.graph.node:
        weight = next((name for name in node.input if name in weights and "." in name), "")
        if weight and "/" not in node.name:
            node.name = f"{weight.removesuffix('.T').rpartition('.')[0]}/{node.name}"


def _name_axes(model: onnx_ir.Model, axis_names: dict[str, dict[int, str]]) -> None:
    """Rename traced symbols (`s53`) to what they are (`latent_frames`), in every shape of the graph."""
    import onnx_ir

    symbols: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in axis_names.get(value.name, {}).items():
            text = getattr(value.shape[axis], "value", None)
            # In `8*s3 + 1` the symbol is not the axis itself.
            symbol = re.search(r"[A-Za-z_]\w*", text) if isinstance(text, str) else None
            if symbol:
                symbols.setdefault(symbol[0], name if symbol[0] == text else f"{name}_units")

    def renamed(dim):
        text = getattr(dim, "value", None)
        if not isinstance(text, str):
            return dim
        return onnx_ir.SymbolicDim(
            re.sub(r"[A-Za-z_]\w*", lambda match: symbols.get(match[0], match[0]), text)
        )

    values = [*model.graph.inputs]
    for node in model.graph.all_nodes():
        values.extend(node.outputs)
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([renamed(dim) for dim in value.shape])
