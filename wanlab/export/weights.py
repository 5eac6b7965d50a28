"""The weights of a graph: removed from it during its rewriting, written one at a time, shared between graphs."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import onnx_ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype, to_torch_dtype
from tqdm.auto import tqdm

from wanlab.core.contents import content_digest
from wanlab.core.errors import WanlabError
from wanlab.core.manifest import Manifest, file_damage
from wanlab.models.networks import stored_dtype

WRAPPER = "network."  # attribute of the traced wrapper with the network
_SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes(model: onnx_ir.Model) -> None:
    """Put the module path before each node's name, and remove metadata with paths of the machine."""
    for node in model.graph.all_nodes():
        scopes = (
            json.loads(node.metadata_props[_SCOPES].replace("'", '"'))
            if _SCOPES in node.metadata_props
            else []
        )
        # [..., innermost module, node]; the wrapper's own attribute comes first
        module = f"{scopes[-2]}.".removeprefix(WRAPPER).strip(".") if len(scopes) > 1 else ""
        module = (
            "" if module.startswith("_empty_nn_module") else module
        )  # a node of the exporter, without a module
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


def name_fused(model: onnx_ir.Model, weights: Collection[str]) -> None:
    """Put the module path before the names of nodes of onnxsim, if the name of a weight contains the module."""
    for node in model.graph:
        weight = next((v.name for v in node.inputs if v and v.name in weights and "." in v.name), "")
        if weight and "/" not in (node.name or ""):
            node.name = f"{weight.rpartition('.')[0]}/{node.name or node.op_type}"


def name_weights(model: onnx_ir.Model) -> None:
    """Give small weights, which stayed in the graph, their names in the network's state dict."""
    for value in list(model.graph.initializers.values()):
        value.name = value.name.removeprefix(WRAPPER)


def name_axes(model: onnx_ir.Model, axis_names: dict[str, dict[int, str]]) -> None:
    """Rename traced symbols (`s53`) to names of axes (`latent_frames`), in every shape of the graph."""
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


LIFT_BYTES = 1024


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight of a network as a graph uses it.

    Attributes:
        tensor: the tensor of the network.
        dtype: dtype of the computation.
        stored: dtype in the file; if they differ, the graph has a Cast.
        transposed: whether the graph has the transposed matrix.
    """

    tensor: torch.Tensor
    dtype: onnx_ir.DataType
    stored: onnx_ir.DataType
    transposed: bool = False

    @property
    def shape(self) -> list[int]:
        return list(self.tensor.shape[::-1] if self.transposed else self.tensor.shape)

    def lazy(self, name: str) -> onnx_ir.LazyTensor:
        """A tensor that is cast, transposed and copied to the host only when it is read, and freed afterwards."""

        def read():
            value = self.tensor.t() if self.transposed else self.tensor
            value = value.to(dtype=onnx_ir.tensor_adapters.to_torch_dtype(self.stored)).cpu().contiguous()
            return onnx_ir.tensor_adapters.TorchTensor(value, name=name)

        return onnx_ir.LazyTensor(read, self.stored, onnx_ir.Shape(self.shape), name=name)


def fill(graph: onnx_ir.Graph, network: torch.nn.Module, stored: torch.dtype | None) -> dict[str, Weight]:
    """Give the initializers of a traced graph the values of `network`, in the graph's dtypes.

    Args:
        graph: traced graph.
        network: network with the weights.
        stored: dtype of large weights in the file; None is the graph's. Weights that the library keeps in float32 stay
            in float32.

    Returns:
        Name in the network -> weight, for `lift` and `restore`: matrices and larger tensors of the graph of at least
        `LIFT_BYTES`. Vectors stay in the graph, so that scales are folded into constants.

    Raises:
        WanlabError: a weight of the graph is missing in `network` or has another shape.
    """
    tensors = dict(network.named_buffers()) | network.state_dict()
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    large = {}
    # After a conversion to an older opset weights without memory are inputs.
    values = [value for value in graph.inputs if value.name.startswith(WRAPPER)]
    for value in values:
        graph.inputs.remove(value)
    values += [value for key, value in graph.initializers.items() if key.startswith(WRAPPER)]
    for value in dict.fromkeys(values):
        name = value.name.removeprefix(WRAPPER)
        if name not in tensors:
            raise WanlabError(f"the graph uses {name}, which this network does not have")
        tensor, shape = tensors[name].detach(), tuple(value.shape.numpy())
        if tuple(tensor.shape) != shape:
            raise WanlabError(f"weight {name} is {tuple(tensor.shape)}, the shared graph has {shape}")
        weight = Weight(tensor, value.dtype, value.dtype)
        value.const_value = weight.lazy(value.name)
        graph.register_initializer(value)
        matrix = tensor.numel() > max(shape, default=1)
        if name in parameters and matrix and value.const_value.nbytes >= LIFT_BYTES:
            if stored is not None and value.dtype.is_floating_point():
                weight = replace(weight, stored=from_torch_dtype(stored_dtype(network, name, stored)))
            large[name] = weight
    return large


def lift(graph: onnx_ir.Graph, names) -> None:
    """Change initializers to inputs of the graph, with their names in the network."""
    for name in names:
        value = graph.initializers.pop(f"{WRAPPER}{name}")
        value.const_value = None
        value.name = name
        graph.inputs.append(value)


def restore(graph: onnx_ir.Graph, weights: dict[str, Weight]) -> dict[str, Weight]:
    """Change inputs of `lift` back to initializers, transposed if the graph only uses the transposed matrix.

    Returns:
        Name in the graph (with `.T` if transposed) -> weight, for the weights that the graph uses.
    """
    used = {}
    for value in [value for value in graph.inputs if value.name in weights]:
        graph.inputs.remove(value)
        name, weight = value.name, weights[value.name]
        flips = [use.node for use in value.uses() if _is_transpose(use.node)]
        if flips and len(flips) == len(value.uses()):
            name, weight = f"{name}.T", replace(weight, transposed=True)
            transposed = _value(name, weight.shape, weight.dtype)
            for node in flips:
                onnx_ir.convenience.replace_all_uses_with(node.outputs[0], transposed)
            graph.remove(flips, safe=True)
            value = transposed
        if not value.uses():
            continue
        if weight.stored != weight.dtype:
            value = _stored_narrower(graph, value, weight)
        value.const_value = weight.lazy(name)
        graph.register_initializer(value)
        used[name] = weight
    return used


def _stored_narrower(graph: onnx_ir.Graph, value: onnx_ir.Value, weight: Weight) -> onnx_ir.Value:
    """The value in the file, with a Cast to the dtype of the computation."""
    stored = _value(value.name, weight.shape, weight.stored)
    module = value.name.removesuffix(".T").rpartition(".")[0]
    cast = onnx_ir.node("Cast", [stored], {"to": int(weight.dtype)}, name=f"{module}/weight_cast")
    wide = cast.outputs[0]
    wide.name = f"{value.name}.{weight.dtype.name.lower()}"
    wide.type, wide.shape = onnx_ir.TensorType(weight.dtype), onnx_ir.Shape(weight.shape)
    onnx_ir.convenience.replace_all_uses_with(value, wide)
    graph.insert_before(graph[0], cast)
    return stored


def _value(name: str, shape: list[int], dtype: onnx_ir.DataType) -> onnx_ir.Value:
    return onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(dtype))


def _is_transpose(node) -> bool:
    permutation = node.attributes.get("perm")
    return node.op_type == "Transpose" and permutation is not None and list(permutation.value) == [1, 0]


ALIGNMENT_BYTES = 4096  # size of a page, because engines map the file into memory


class _Places(Manifest, frozen=True, kw_only=True):
    """Positions of the weights in a file of weights.

    Attributes:
        facts: key of the weights.
        tensors: name -> start and length in bytes, dtype, shape.
        file_sha256, size_bytes: hash and size of the file.
    """

    KIND: ClassVar[str] = "table of weights"
    FORMAT: ClassVar[int] = 3
    AGAIN: ClassVar[str] = "export the graph again"

    tensors: dict[str, tuple[int, int, str, list[int]]]
    file_sha256: str
    size_bytes: int

    def damage(self) -> str:
        return file_damage(Path(self.path), self.file_sha256, self.size_bytes)


class Storable(Protocol):
    """A tensor that a `WeightsFile` writes: its shape, and its values when they are read."""

    @property
    def shape(self) -> list[int]: ...

    def lazy(self, name: str) -> onnx_ir.LazyTensor: ...


@dataclass(frozen=True)
class WeightsFile:
    """Weights of one network in one dtype, for any number of graphs in the same folder.

    Graphs of other sizes, opsets and forms refer to the same file, and so do graphs that compute in another dtype and
    cast. `<name>.json` beside it has the position of each weight.

    Attributes:
        path: file of the raw tensors, each aligned to a page.
        key: hash of the network's weights; a file with another key is replaced.
    """

    path: Path
    key: str

    def add(self, weights: Mapping[str, Storable], *, progress: bool = True) -> int:
        """Write the weights that are not in the file yet, one at a time; returns the bytes written."""
        places = self.places()
        missing = {name: weight for name, weight in weights.items() if name not in places}
        end = max((start + length for start, length, *_ in places.values()), default=0)
        written = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "r+b" if places else "wb") as file:
            bar = tqdm(missing.items(), desc="weights", unit="tensor", leave=False, disable=not progress)
            for name, weight in bar:
                tensor = weight.lazy(name)
                start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                file.seek(start)
                tensor.tofile(file)
                places[name] = (start, tensor.nbytes, tensor.dtype.name, weight.shape)
                end = start + tensor.nbytes
                written += tensor.nbytes
        _Places(
            path=str(self.path),
            facts={"weights": self.key},
            tensors=places,
            file_sha256=content_digest(self.path),
            size_bytes=self.path.stat().st_size,
        ).write()
        return written

    def places(self) -> dict[str, tuple[int, int, str, list[int]]]:
        """Name -> start and length in bytes, dtype, shape; empty when the file is damaged or has another key."""
        known, _ = _Places.current(self.path, {"weights": self.key})
        return {} if known is None else known.tensors

    def refer(self, graph: onnx_ir.Graph) -> None:
        """Make the initializers of `graph` that are in the file refer to it."""
        for name, (start, length, kind, shape) in self.places().items():
            value = graph.initializers.get(name)
            if value is not None:
                value.const_value = onnx_ir.ExternalTensor(
                    self.path.name,
                    start,
                    length,
                    onnx_ir.DataType[kind],
                    shape=onnx_ir.Shape(shape),
                    name=name,
                    base_dir=self.path.parent,
                )


COMPARED, COMPARED_VALUES = 16, 4096


def other_weight(path: str | os.PathLike, network: torch.nn.Module) -> str:
    """A weight of a graph that has other values than in a network; empty if those that are compared are equal.

    Compared are the first values of up to 16 small and 16 large weights that have the name, shape and values of a
    parameter, in the dtype of the graph. Quantized weights have other names, so that of them only biases and norms count.

    Args:
        path: ONNX file; weights in other files are read in part.
    """
    tensors = network.state_dict()
    named = []
    for value in onnx_ir.load(path).graph.initializers.values():
        stored, name = value.const_value, value.name.removesuffix(".T")
        tensor = tensors.get(name)
        if stored is None or tensor is None or tensor.is_meta or not tensor.is_floating_point():
            continue
        weight = Weight(tensor, stored.dtype, stored.dtype, transposed=name != value.name)
        if stored.dtype.is_floating_point() and list(stored.shape.numpy()) == weight.shape:
            named.append((tensor.numel(), value.name, stored, weight))
    named.sort(key=lambda entry: entry[:2])
    for _, name, stored, weight in dict.fromkeys((*named[:COMPARED], *named[-COMPARED:])):
        rows = max(1, COMPARED_VALUES // max(1, math.prod(weight.shape[1:])))
        tensor = weight.tensor.detach()
        part = (tensor[:, :rows].t() if weight.transposed else tensor[:rows]) if tensor.ndim else tensor
        expected = part.to(to_torch_dtype(stored.dtype)).float().cpu().numpy()
        actual = stored.numpy()[:rows] if tensor.ndim else stored.numpy()
        if not np.array_equal(actual.astype(np.float32), expected):
            return name
    return ""
