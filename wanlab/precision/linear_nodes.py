"""Linear layers in an ONNX graph: found, and rewritten with Q/DQ nodes."""

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
        return to_torch_dtype(self.node.inputs[1].dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, outputs first."""
        shape = tuple(self.stored.const_value.shape.numpy())
        return shape[::-1] if self.transposed else shape

    def weight(self) -> torch.Tensor:
        """The weight as the node sees it, in float32, outputs first; read from the file now."""
        tensor = self.stored.const_value
        value = torch.from_numpy(np.array(tensor.numpy(), dtype=np.float32)).to(self.dtype).float()
        if hasattr(tensor, "release"):
            tensor.release()  # the mapping of the file, which would add up over a large graph
        return value.t() if self.transposed else value


def find_sites(graph: onnx_ir.Graph) -> dict[str, list[LinearNode]]:
    """Layer -> the nodes that compute it with a constant weight, in the order of the graph."""
    found: dict[str, list[LinearNode]] = {}
    for node in graph:
        layer, slash, _ = (node.name or "").partition("/")
        if node.op_type not in OPERATORS or not slash or len(node.inputs) < 2:
            continue
        stored = _initializer(node.inputs[1])
        if stored is None or len(stored.const_value.shape) < 2:
            continue
        transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _flag(node, "transB"))
        found.setdefault(layer, []).append(LinearNode(layer, node, stored, transposed))
    return found


def sites_of(
    found: dict[str, list[LinearNode]], layers: Iterable[str], where: str
) -> dict[str, list[LinearNode]]:
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


OLDEST_TO_RAISE = 18
"""The converter knows no change before it, and says nothing."""


@dataclass(frozen=True)
class ActivationScale:
    """Range and scale of a layer's input, and the other layers that read the same codes."""

    amax: float
    scale: float
    shared_with: tuple[str, ...]


class Rewriter:
    """Replaces weights and inputs of layers in one graph, and remembers what they take."""

    def __init__(self, graph: onnx_ir.Graph, opset: int) -> None:
        self.graph = graph
        self.opset = opset
        self.weight_bytes: dict[str, int] = {}
        self._stored: dict[tuple[str, NumericType, torch.dtype], onnx_ir.Value] = {}
        self._replaced: dict[str, onnx_ir.Value] = {}
        self._names: set[str] = {node.name for node in graph if node.name}

    def weight(self, site: LinearNode, numbers: NumericType) -> None:
        """Let a site take its weight from codes and scales."""
        key = (site.stored.name, numbers, site.dtype)
        if key not in self._stored:
            self._stored[key] = self._codes(site, numbers)
        codes, scale = self._stored[key]
        self.weight_bytes[site.layer] = codes.const_value.nbytes + scale.const_value.nbytes
        attributes: dict[str, int] = {}
        if numbers.granularity == "channel":
            attributes = {"axis": 1 if site.transposed else 0}
        elif numbers.granularity == "block":
            attributes = {"axis": 0 if site.transposed else 1, "block_size": numbers.block}
        node = onnx_ir.node(
            "DequantizeLinear", [codes, scale], attributes, name=self.name(f"{site.layer}/weight_dequantize")
        )
        self.finish(node, f"{site.layer}.weight.{len(self._names)}.dequantized", site.dtype, codes.shape)
        self.graph.insert_before(site.node, node)
        site.node.replace_input_with(1, node.outputs[0])
        self.replaced(site.stored)

    def activations(
        self, sites: Sequence[tuple[LinearNode, NumericType]], amax: dict[str, float]
    ) -> dict[str, ActivationScale]:
        """Let sites take their inputs through codes; those of one tensor in one format share them.

        Returns:
            Layer -> scale.
        """
        groups: dict[tuple[int, NumericType], list[LinearNode]] = {}
        for site, numbers in sites:
            groups.setdefault((id(site.activation), numbers), []).append(site)
        order = {id(node): index for index, node in enumerate(self.graph)}
        made: dict[str, ActivationScale] = {}
        for (_, numbers), group in groups.items():
            largest = max(amax[site.layer] for site in group)
            scale = numbers.scale(torch.tensor(largest), group[0].dtype)
            group.sort(key=lambda site: order[id(site.node)])
            self._quantize_input(group, numbers, scale)
            layers = tuple(dict.fromkeys(site.layer for site in group))
            for layer in layers:
                others = tuple(other for other in layers if other != layer)
                made[layer] = ActivationScale(largest, float(scale), others)
        return made

    def replaced(self, stored: onnx_ir.Value) -> None:
        """Note that something else stands in for a weight, at some of its sites."""
        self._replaced[stored.name] = stored

    def clear(self) -> None:
        """Take out the weights, and the Casts after them, that nothing reads any more."""
        for name, value in self._replaced.items():
            for use in list(value.uses()):
                node = use.node
                if node.op_type == "Cast" and not node.outputs[0].uses():
                    self.graph.remove(node, safe=True)
            if not value.uses() and not value.is_graph_output():
                self.graph.initializers.pop(name, None)

    def _codes(self, site: LinearNode, numbers: NumericType) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """Codes, rounded when they are written, and scales, now."""
        kind = _code_type(numbers)
        # Graphs of one component share a file of weights, where a name must mean one content.
        name = ".".join([site.stored.name, numbers.kind, *_sharing(numbers)])
        _, scale = encode_weight(site.weight(), numbers, site.dtype)
        if numbers.granularity == "block" and site.transposed:
            scale = scale.t().contiguous()

        def read():
            codes, _ = encode_weight(site.weight(), numbers, site.dtype)
            codes = (codes.t() if site.transposed else codes).contiguous()
            if numbers.kind == "int4":
                return onnx_ir.PackedTensor(_packed(codes), kind, shape=codes.shape, name=name)
            return TorchTensor(codes, name=name)

        shape = onnx_ir.Shape(site.shape[::-1] if site.transposed else site.shape)
        codes_value = self.initializer(onnx_ir.LazyTensor(read, kind, shape, name=name))
        return codes_value, self.initializer(TorchTensor(scale, name=f"{name}.scale"))

    def _quantize_input(self, group: list[LinearNode], numbers: NumericType, scale: torch.Tensor) -> None:
        first, value = group[0], group[0].activation
        kind, name = _code_type(numbers), f"{value.name}.{numbers.kind}"
        step = self.initializer(TorchTensor(scale, name=f"{name}.scale"))
        zero = self._zero_point(numbers)
        module = common_module([site.layer for site in group])
        quantize = onnx_ir.node(
            "QuantizeLinear", [value, step, zero], name=self.name(f"{module}/input_quantize")
        )
        self.finish(quantize, name, None, value.shape, kind)
        # ONNX Runtime (1.31) copies such a pair past a Reshape. Up to opset 20 the copy of one without zero point is
        # uint8, which cuts all that is negative; from 21 on it fails on one with a zero point of int8.
        given = [quantize.outputs[0], step, *([zero] if self.opset < 21 else [])]
        dequantize = onnx_ir.node("DequantizeLinear", given, name=self.name(f"{module}/input_dequantize"))
        self.finish(dequantize, f"{name}.dequantized", first.dtype, value.shape)
        self.graph.insert_before(first.node, [quantize, dequantize])
        for site in group:
            site.node.replace_input_with(0, dequantize.outputs[0])

    def _zero_point(self, numbers: NumericType) -> onnx_ir.Value:
        """Zero of the codes' type: without it QuantizeLinear makes uint8."""
        name = f"zero_point.{numbers.kind}"
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        zero = torch.zeros((), dtype=numbers.codes.encoded_dtype)
        return self.initializer(TorchTensor(zero, name=name))

    def initializer(self, tensor) -> onnx_ir.Value:
        """A new constant of the graph, under the tensor's name or one like it."""
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
        """Name, shape and type of a new node's output."""
        output = node.outputs[0]
        output.name, output.shape = name, shape
        output.type = onnx_ir.TensorType(from_torch_dtype(dtype) if kind is None else kind)

    def name(self, name: str) -> str:
        """A name for a new node: this one, or one like it that is free."""
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
    """What tells codes from others of their kind, where they are not the usual ones."""
    same = numbers.codes.usual == (numbers.granularity, numbers.block)
    return [] if same else [str(numbers.block or numbers.granularity)]


def _code_type(numbers: NumericType) -> onnx_ir.DataType:
    return onnx_ir.DataType[numbers.codes.onnx]
