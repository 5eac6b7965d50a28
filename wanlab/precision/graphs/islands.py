"""Float islands in a graph: layers that compute in another float than what is around them, between two Casts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from wanlab.precision.graphs.rewrite import Rewriter, common_module
from wanlab.precision.graphs.sites import Site
from wanlab.precision.plans.plan import FLOATS

if TYPE_CHECKING:
    import onnx_ir
    import torch

BFLOAT16_CONV_OPSET = 22
"""The first whose Conv takes bfloat16."""


def islands_among(sites: Mapping[str, Sequence[Site]], floats: Mapping[str, str]) -> dict[str, str]:
    """The layers of `floats` (layer -> `"fp32"`, `"fp16"` or `"bf16"`) that compute in another float now."""
    return {
        layer: name
        for layer, name in floats.items()
        if any(site.dtype != float_dtype(name) for site in sites[layer])
    }


def needed_opset(sites: Mapping[str, Sequence[Site]], islands: Mapping[str, str]) -> int:
    """The first opset whose operators take these layers in these floats."""
    narrow = any(
        site.node.op_type == "Conv"
        for layer, name in islands.items()
        if name == "bf16"
        for site in sites[layer]
    )
    return BFLOAT16_CONV_OPSET if narrow else 13


def compute_in(rewriter: Rewriter, sites: Mapping[str, Sequence[Site]], islands: Mapping[str, str]) -> None:
    """Let layers compute in the floats given: weight and bias in that dtype, input and output cast.

    Layers that read one tensor in one float share the Cast.
    """
    groups: dict[tuple[int, str], list[Site]] = {}
    for layer, name in islands.items():
        for site in sites[layer]:
            groups.setdefault((id(site.activation), name), []).append(site)
    order = {id(node): index for index, node in enumerate(rewriter.graph)}
    weights: dict[tuple[str, str], onnx_ir.Value] = {}
    for (_, name), group in groups.items():
        group.sort(key=lambda site: order[id(site.node)])
        kind = float_dtype(name)
        module = common_module([site.layer for site in group])
        source = group[0].activation
        given = _cast(rewriter, source, kind, f"{module}/input_cast", f"{source.name}.{name}", group[0].node)
        for site in group:
            _narrow(rewriter, site, kind, name, given, weights)


def float_dtype(name: str) -> torch.dtype:
    """`"bf16"` as PyTorch knows it."""
    import torch

    return getattr(torch, FLOATS[name])


def _narrow(rewriter: Rewriter, site: Site, kind, name: str, given, weights) -> None:
    import onnx_ir

    around, node = site.dtype, site.node
    key = (site.stored.name, name)
    if key not in weights:
        weights[key] = _weight(rewriter, site, kind, name)
    rewriter.weight_bytes[site.layer] = weights[key].const_value.nbytes
    bias_node, index = _bias_of(site)
    node.replace_input_with(0, given)
    node.replace_input_with(1, weights[key])
    rewriter.replaced(site.stored)
    if bias_node is not None:
        bias = bias_node.inputs[index]
        bias_node.replace_input_with(index, _bias(rewriter, bias, kind, name))
        rewriter.replaced(bias)
    last = bias_node or node
    for changed in dict.fromkeys((node, last)):
        changed.outputs[0].type = onnx_ir.TensorType(_onnx_type(kind))
    _cast_back(rewriter, last, around, f"{site.layer}/output_cast")


def _weight(rewriter: Rewriter, site: Site, kind, name: str) -> onnx_ir.Value:
    """The weight in another float, cast when it is written."""
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor

    called = f"{site.stored.name}.{name}"

    def read():
        value = site.weight()
        return TorchTensor((value.t() if site.transposed else value).to(kind).contiguous(), name=called)

    shape = onnx_ir.Shape(site.shape[::-1] if site.transposed else site.shape)
    return rewriter.initializer(onnx_ir.LazyTensor(read, _onnx_type(kind), shape, name=called))


def _bias(rewriter: Rewriter, bias: onnx_ir.Value, kind, name: str) -> onnx_ir.Value:
    import numpy as np
    import torch
    from onnx_ir.tensor_adapters import TorchTensor

    values = torch.from_numpy(np.array(bias.const_value.numpy(), dtype=np.float32)).to(kind)
    return rewriter.initializer(TorchTensor(values, name=f"{bias.name}.{name}"))


def _bias_of(site: Site) -> tuple[onnx_ir.Node | None, int]:
    """The node that adds a layer's bias, and which of its inputs that is; (None, 0) without one."""
    node = site.node
    if len(node.inputs) > 2 and node.inputs[2] is not None and node.inputs[2].const_value is not None:
        return node, 2
    uses = list(node.outputs[0].uses())
    if node.op_type != "MatMul" or len(uses) != 1:
        return None, 0
    add = uses[0].node
    if add.op_type != "Add" or (add.name or "").partition("/")[0] != site.layer:
        return None, 0
    other = 1 - uses[0].idx
    return (add, other) if add.inputs[other].const_value is not None else (None, 0)


def _cast_back(rewriter: Rewriter, last: onnx_ir.Node, kind, name: str) -> None:
    import onnx_ir

    value = last.outputs[0]
    after = onnx_ir.node("Cast", [value], {"to": int(_onnx_type(kind))}, name=rewriter.name(name))
    rewriter.finish(after, f"{value.name}.back", kind, value.shape)
    made = after.outputs[0]
    for use in list(value.uses()):
        if use.node is not after:
            use.node.replace_input_with(use.idx, made)
    if value.is_graph_output():  # which keeps its name
        outputs = rewriter.graph.outputs
        outputs[[output is value for output in outputs].index(True)] = made
        value.name, made.name = f"{value.name}.{_onnx_type(kind).name.lower()}", value.name
    rewriter.graph.insert_after(last, after)


def _cast(rewriter: Rewriter, value: onnx_ir.Value, kind, name: str, called: str, before: onnx_ir.Node):
    import onnx_ir

    node = onnx_ir.node("Cast", [value], {"to": int(_onnx_type(kind))}, name=rewriter.name(name))
    rewriter.finish(node, called, kind, value.shape)
    rewriter.graph.insert_before(before, node)
    return node.outputs[0]


def _onnx_type(kind: torch.dtype) -> onnx_ir.DataType:
    from onnx_ir.tensor_adapters import from_torch_dtype

    return from_torch_dtype(kind)
