"""The weights of a graph: kept out of it while it is worked on, and written one at a time.

Simplifiers copy what they are given, several times over. Here they never see a large weight: each becomes an
input of the graph, and comes back as a tensor that is read from the network only while it is written. So a graph
of any size needs, beside the network itself, room for its largest weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from wanlab.convert.onnx.names import WRAPPER
from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import onnx_ir
    import torch

LIFT_BYTES = 1024


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight of a network as a graph uses it.

    Attributes:
        tensor: where it lies now.
        dtype: that the graph computes with.
        stored: that the file holds; a Cast leads from one to the other where they differ.
        transposed: the graph holds it the other way round.
    """

    tensor: torch.Tensor
    dtype: onnx_ir.DataType
    stored: onnx_ir.DataType
    transposed: bool = False

    @property
    def shape(self) -> list[int]:
        return list(self.tensor.shape[::-1] if self.transposed else self.tensor.shape)

    def lazy(self, name: str) -> onnx_ir.LazyTensor:
        """Cast, turned and brought to the host when it is read, and then let go."""
        import onnx_ir

        def read():
            value = self.tensor.t() if self.transposed else self.tensor
            value = value.to(dtype=onnx_ir.tensor_adapters.to_torch_dtype(self.stored)).cpu().contiguous()
            return onnx_ir.tensor_adapters.TorchTensor(value, name=name)

        return onnx_ir.LazyTensor(read, self.stored, onnx_ir.Shape(self.shape), name=name)


def fill(graph: onnx_ir.Graph, network: torch.nn.Module, stored: torch.dtype | None) -> dict[str, Weight]:
    """Give the initializers of a traced graph the values of `network`, in the graph's dtypes.

    Args:
        stored: dtype that large weights have in the file; None takes the graph's. Weights that the library
            keeps in float32 stay so.

    Returns:
        Matrices and larger of at least `LIFT_BYTES` that the graph uses, by their name in the network, for
        `lift` and `restore`. Vectors stay, so that scales fold into constants.

    Raises:
        WanlabError: a weight of the graph is missing in `network` or has another shape.
    """
    from onnx_ir.tensor_adapters import from_torch_dtype

    from wanlab.models.networks import stored_dtype

    tensors = dict(network.named_buffers()) | network.state_dict()
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    large = {}
    # A conversion to an older opset leaves weights without memory behind as inputs.
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
            raise WanlabError(f"weight {name} is {tuple(tensor.shape)}, the shared graph wants {shape}")
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
    """Turn initializers into inputs of the graph, under their name in the network."""
    for name in names:
        value = graph.initializers.pop(f"{WRAPPER}{name}")
        value.const_value = None
        value.name = name
        graph.inputs.append(value)


def restore(graph: onnx_ir.Graph, weights: dict[str, Weight]) -> dict[str, Weight]:
    """Turn the inputs that `lift` made back into initializers, transposed where the graph wants them so.

    Returns:
        The weights that the graph uses, under their names in it (`.T` where transposed).
    """
    import onnx_ir

    used = {}
    for value in [value for value in graph.inputs if value.name in weights]:
        graph.inputs.remove(value)
        name, weight = value.name, weights[value.name]
        flips = [use.node for use in value.uses() if _is_transpose(use.node)]
        if flips and len(flips) == len(value.uses()):
            name, weight = f"{name}.T", replace(weight, transposed=True)
            turned = _value(name, weight.shape, weight.dtype)
            for node in flips:
                onnx_ir.convenience.replace_all_uses_with(node.outputs[0], turned)
            graph.remove(flips, safe=True)
            value = turned
        if not value.uses():
            continue
        if weight.stored != weight.dtype:
            value = _stored_narrower(graph, value, weight)
        value.const_value = weight.lazy(name)
        graph.register_initializer(value)
        used[name] = weight
    return used


def _stored_narrower(graph: onnx_ir.Graph, value: onnx_ir.Value, weight: Weight) -> onnx_ir.Value:
    """The value that the file holds, with a Cast to the one that the graph computes with."""
    import onnx_ir

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
    import onnx_ir

    return onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(dtype))


def _is_transpose(node) -> bool:
    permutation = node.attributes.get("perm")
    return node.op_type == "Transpose" and permutation is not None and list(permutation.value) == [1, 0]
