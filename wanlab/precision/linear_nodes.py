"""Linear layers in an ONNX graph: their nodes, and how these are rewritten with Q/DQ nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype, to_torch_dtype
from onnxscript.version_converter import convert_version

from wanlab.core.errors import WanlabError, did_you_mean, first_line
from wanlab.export.trace import quiet
from wanlab.precision.formats import NumericType, encode_weight

OPERATORS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True, eq=False)
class LinearNode:
    """One node that computes a layer.

    Attributes:
        layer: module path, with which the node's name begins.
        node: MatMul, Gemm or Conv; its input 0 is the activation, input 1 the weight.
        stored: initializer that holds the weight; a Cast may stand between it and the node.
        transposed: whether the weight is stored inputs first, as in `x @ w`.
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
        """Dtype that the node computes in."""
        return to_torch_dtype(self.node.inputs[1].dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, outputs first."""
        shape = tuple(self.stored.const_value.shape.numpy())
        return shape[::-1] if self.transposed else shape

    def weight(self) -> torch.Tensor:
        """The weight in the values that the node multiplies, in float32, outputs first; each call reads the file."""
        tensor = self.stored.const_value
        value = torch.from_numpy(np.array(tensor.numpy(), dtype=np.float32)).to(self.dtype).float()
        if hasattr(tensor, "release"):
            tensor.release()  # the mapping of the file, which would add up over a large graph
        return value.t() if self.transposed else value


def find_linear_nodes(graph: onnx_ir.Graph) -> dict[str, list[LinearNode]]:
    """Layer -> the nodes that compute it with a constant weight, in the order of the graph."""
    nodes: dict[str, list[LinearNode]] = {}
    for node in graph:
        layer, slash, _ = (node.name or "").partition("/")
        if node.op_type not in OPERATORS or not slash or len(node.inputs) < 2:
            continue
        stored = _initializer(node.inputs[1])
        if stored is None or len(stored.const_value.shape) < 2:
            continue
        transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _flag(node, "transB"))
        nodes.setdefault(layer, []).append(LinearNode(layer, node, stored, transposed))
    return nodes


def nodes_of_layers(
    nodes: dict[str, list[LinearNode]], layers: Iterable[str], where: str
) -> dict[str, list[LinearNode]]:
    """The nodes of these layers.

    Raises:
        WanlabError: a layer that the graph does not compute with a constant weight.
    """
    for layer in layers:
        if layer not in nodes:
            raise WanlabError(f"{where} has no layer {layer!r} to quantise{did_you_mean(layer, nodes)}")
    return {layer: nodes[layer] for layer in layers}


def _initializer(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """The initializer behind a weight, through a Cast; None where it is computed or quantised already."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type != "Cast":
            return None
        value = node.inputs[0]
    return value if value is not None and value.const_value is not None else None


def _flag(node: onnx_ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return bool(attribute.as_int()) if attribute is not None else False


OLDEST_TO_RAISE = 18
"""First opset that the converter can raise; below it the converter changes nothing and raises no error."""


@dataclass(frozen=True)
class ActivationScale:
    """Range and scale of a layer's input, and the other layers that read the same codes."""

    amax: float
    scale: float
    shared_with: tuple[str, ...]


class Rewriter:
    """Replaces weights and inputs of layers in one graph.

    Attributes:
        graph: graph that is changed. opset: its opset.
        weight_bytes: layer -> size of its new weight, scales included.
    """

    def __init__(self, graph: onnx_ir.Graph, opset: int) -> None:
        self.graph = graph
        self.opset = opset
        self.weight_bytes: dict[str, int] = {}
        self._stored: dict[tuple[str, NumericType, torch.dtype], onnx_ir.Value] = {}
        self._replaced: dict[str, onnx_ir.Value] = {}
        self._names: set[str] = {node.name for node in graph if node.name}

    def weight(self, linear: LinearNode, numbers: NumericType) -> None:
        """Replace the weight of a node by codes and scales."""
        key = (linear.stored.name, numbers, linear.dtype)
        if key not in self._stored:
            self._stored[key] = self._codes(linear, numbers)
        codes, scale = self._stored[key]
        self.weight_bytes[linear.layer] = codes.const_value.nbytes + scale.const_value.nbytes
        attributes: dict[str, int] = {}
        if numbers.granularity == "channel":
            attributes = {"axis": 1 if linear.transposed else 0}
        elif numbers.granularity == "block":
            attributes = {"axis": 0 if linear.transposed else 1, "block_size": numbers.block}
        node = onnx_ir.node(
            "DequantizeLinear",
            [codes, scale],
            attributes,
            name=self.name(f"{linear.layer}/weight_dequantize"),
        )
        self.finish(node, f"{linear.layer}.weight.{len(self._names)}.dequantized", linear.dtype, codes.shape)
        self.graph.insert_before(linear.node, node)
        linear.node.replace_input_with(1, node.outputs[0])
        self.replaced(linear.stored)

    def activations(
        self, linears: Sequence[tuple[LinearNode, NumericType]], amax: dict[str, float]
    ) -> dict[str, ActivationScale]:
        """Round the inputs of nodes to codes; nodes that read one tensor in one format share its codes.

        Returns:
            Layer -> scale.
        """
        groups: dict[tuple[int, NumericType], list[LinearNode]] = {}
        for linear, numbers in linears:
            groups.setdefault((id(linear.activation), numbers), []).append(linear)
        order = {id(node): index for index, node in enumerate(self.graph)}
        scales_by_layer: dict[str, ActivationScale] = {}
        for (_, numbers), group in groups.items():
            largest = max(amax[linear.layer] for linear in group)
            scale = numbers.scale(torch.tensor(largest), group[0].dtype)
            group.sort(key=lambda linear: order[id(linear.node)])
            self._quantize_input(group, numbers, scale)
            layers = tuple(dict.fromkeys(linear.layer for linear in group))
            for layer in layers:
                others = tuple(other for other in layers if other != layer)
                scales_by_layer[layer] = ActivationScale(largest, float(scale), others)
        return scales_by_layer

    def replaced(self, stored: onnx_ir.Value) -> None:
        """Record that a weight was replaced in one of its nodes."""
        self._replaced[stored.name] = stored

    def clear(self) -> None:
        """Remove the weights, and the Casts after them, that nothing reads any more."""
        for name, value in self._replaced.items():
            for use in list(value.uses()):
                node = use.node
                if node.op_type == "Cast" and not node.outputs[0].uses():
                    self.graph.remove(node, safe=True)
            if not value.uses() and not value.is_graph_output():
                self.graph.initializers.pop(name, None)

    def _codes(self, linear: LinearNode, numbers: NumericType) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """Codes, which are computed when they are written, and scales, which are computed now."""
        kind = _code_type(numbers)
        # Graphs of one component share a file of weights, where a name must mean one content.
        name = ".".join([linear.stored.name, numbers.kind, *_sharing(numbers)])
        _, scale = encode_weight(linear.weight(), numbers, linear.dtype)
        if numbers.granularity == "block" and linear.transposed:
            scale = scale.t().contiguous()

        def read():
            codes, _ = encode_weight(linear.weight(), numbers, linear.dtype)
            codes = (codes.t() if linear.transposed else codes).contiguous()
            if numbers.kind == "int4":
                return onnx_ir.PackedTensor(_packed(codes), kind, shape=codes.shape, name=name)
            return TorchTensor(codes, name=name)

        shape = onnx_ir.Shape(linear.shape[::-1] if linear.transposed else linear.shape)
        codes_value = self.initializer(onnx_ir.LazyTensor(read, kind, shape, name=name))
        return codes_value, self.initializer(TorchTensor(scale, name=f"{name}.scale"))

    def _quantize_input(self, group: list[LinearNode], numbers: NumericType, scale: torch.Tensor) -> None:
        first, value = group[0], group[0].activation
        kind, name = _code_type(numbers), f"{value.name}.{numbers.kind}"
        step = self.initializer(TorchTensor(scale, name=f"{name}.scale"))
        zero = self._zero_point(numbers)
        module = common_module([linear.layer for linear in group])
        quantize = onnx_ir.node(
            "QuantizeLinear", [value, step, zero], name=self.name(f"{module}/input_quantize")
        )
        self.finish(quantize, name, None, value.shape, kind)
        # ONNX Runtime (1.31) copies such a pair past a Reshape. Up to opset 20 the copy of one without zero point is
        # uint8, in which negative values become 0; from 21 on it fails on one with a zero point of int8.
        given = [quantize.outputs[0], step, *([zero] if self.opset < 21 else [])]
        dequantize = onnx_ir.node("DequantizeLinear", given, name=self.name(f"{module}/input_dequantize"))
        self.finish(dequantize, f"{name}.dequantized", first.dtype, value.shape)
        self.graph.insert_before(first.node, [quantize, dequantize])
        for linear in group:
            linear.node.replace_input_with(0, dequantize.outputs[0])

    def _zero_point(self, numbers: NumericType) -> onnx_ir.Value:
        """Zero of the codes' type: without it QuantizeLinear makes uint8."""
        name = f"zero_point.{numbers.kind}"
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        zero = torch.zeros((), dtype=numbers.codes.encoded_dtype)
        return self.initializer(TorchTensor(zero, name=name))

    def initializer(self, tensor) -> onnx_ir.Value:
        """A new constant of the graph, by the tensor's name or with a number at its end."""
        name, count = tensor.name, 1
        while tensor.name in self.graph.initializers:
            count += 1
            tensor.name = f"{name}.{count}"
        value = onnx_ir.Value(
            name=tensor.name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def finish(self, node, name: str, dtype: torch.dtype | None, shape, kind=None) -> None:
        """Set name, shape and type of a new node's output."""
        output = node.outputs[0]
        output.name, output.shape = name, shape
        output.type = onnx_ir.TensorType(from_torch_dtype(dtype) if kind is None else kind)

    def name(self, name: str) -> str:
        """A free name for a new node: this one, or with a number at its end."""
        unique, count = name, 1
        while unique in self._names:
            count += 1
            unique = f"{name}_{count}"
        self._names.add(unique)
        return unique


def raise_opset(model: onnx_ir.Model, opset: int, name: str) -> onnx_ir.Model:
    """The same graph in a newer opset; operators whose definition changed are rewritten.

    Raises:
        WanlabError: the opset cannot be raised.
    """
    before = model.opset_imports[""]
    if before < OLDEST_TO_RAISE:
        raise WanlabError(
            f"{name} has opset {before}, this format needs {opset}; export it with opset={opset}"
        )
    with quiet():
        try:
            convert_version(model, opset)
        except Exception as error:  # the converter has one exception class per operator
            raise WanlabError(
                f"{name} cannot be raised to opset {opset} ({first_line(error)}); export it with opset={opset}"
            ) from error
    if model.opset_imports[""] != opset:
        raise WanlabError(f"{name} cannot be raised from opset {before}; export it with opset={opset}")
    return model


def common_module(layers: list[str]) -> str:
    """The innermost module that holds all of the layers; the first layer where there is none."""
    common = []
    for pieces in zip(*(layer.split(".") for layer in layers), strict=False):
        if len(set(pieces)) > 1:
            break
        common.append(pieces[0])
    return ".".join(common) or layers[0]


def _packed(codes: torch.Tensor):
    """4-bit codes two to a byte, the first in the low half, as ONNX stores them."""
    flat = torch.nn.functional.pad(codes.flatten(), (0, codes.numel() % 2))
    return ((flat[0::2] & 15) | (flat[1::2] << 4)).view(torch.uint8).numpy()


def _sharing(numbers: NumericType) -> list[str]:
    """Part of a name that tells codes apart from the usual ones of their kind."""
    same = numbers.codes.usual == (numbers.granularity, numbers.block)
    return [] if same else [str(numbers.block or numbers.granularity)]


def _code_type(numbers: NumericType) -> onnx_ir.DataType:
    return onnx_ir.DataType[numbers.codes.onnx]
