"""Where a layer is computed in an ONNX graph: the node, its input and its weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError, did_you_mean

if TYPE_CHECKING:
    import onnx_ir
    import torch

OPERATORS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True, eq=False)
class Site:
    """One node that computes a layer.

    Attributes:
        layer: module path, which the node's name begins with.
        node: MatMul, Gemm or Conv; its input 0 is the activation, input 1 the weight.
        stored: initializer that holds the weight; a Cast may lead from it to the node.
        transposed: the weight lies inputs first, as in `x @ w`.
    """

    layer: str
    node: onnx_ir.Node
    stored: onnx_ir.Value
    transposed: bool

    @property
    def activation(self) -> onnx_ir.Value:
        return self.node.inputs[0]

    @property
    def dtype(self) -> torch.dtype:
        """That the node computes in."""
        from onnx_ir.tensor_adapters import to_torch_dtype

        return to_torch_dtype(self.node.inputs[1].dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, outputs first."""
        shape = tuple(self.stored.const_value.shape.numpy())
        return shape[::-1] if self.transposed else shape

    def weight(self) -> torch.Tensor:
        """The weight as the node sees it, in float32, outputs first; read from the file now."""
        import numpy as np
        import torch

        tensor = self.stored.const_value
        value = torch.from_numpy(np.array(tensor.numpy(), dtype=np.float32)).to(self.dtype).float()
        if hasattr(tensor, "release"):
            tensor.release()  # the mapping of the file, which would add up over a large graph
        return value.t() if self.transposed else value


def find_sites(graph: onnx_ir.Graph) -> dict[str, list[Site]]:
    """Layer -> the nodes that compute it with a constant weight, in the order of the graph."""
    found: dict[str, list[Site]] = {}
    for node in graph:
        layer, slash, _ = (node.name or "").partition("/")
        if node.op_type not in OPERATORS or not slash or len(node.inputs) < 2:
            continue
        stored = _initializer(node.inputs[1])
        if stored is None or len(stored.const_value.shape) < 2:
            continue
        transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _flag(node, "transB"))
        found.setdefault(layer, []).append(Site(layer, node, stored, transposed))
    return found


def sites_of(found: dict[str, list[Site]], layers: Iterable[str], where: str) -> dict[str, list[Site]]:
    """The sites of these layers.

    Raises:
        WanlabError: a layer that the graph does not compute with a constant weight.
    """
    for layer in layers:
        if layer not in found:
            raise WanlabError(f"{where} has no layer {layer!r} to quantise{did_you_mean(layer, found)}")
    return {layer: found[layer] for layer in layers}


def _initializer(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """The initializer behind a weight, through a Cast; None when it is computed or quantised already."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type != "Cast":
            return None
        value = node.inputs[0]
    return value if value is not None and value.const_value is not None else None


def _flag(node: onnx_ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return bool(attribute.as_int()) if attribute is not None else False
