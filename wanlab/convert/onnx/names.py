"""Names a reader knows: nodes by their module, weights as in the state dict, axes by what they are."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir

WRAPPER = "network."  # attribute of the traced wrapper that holds the network
_SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes(model: onnx_ir.Model) -> None:
    """Put the module path before each node's name, and drop the traces of the machine it was made on."""
    for node in model.graph.all_nodes():
        scopes = (
            json.loads(node.metadata_props[_SCOPES].replace("'", '"'))
            if _SCOPES in node.metadata_props
            else []
        )
        # [..., innermost module, node]; the wrapper's own attribute comes first
        module = f"{scopes[-2]}.".removeprefix(WRAPPER).strip(".") if len(scopes) > 1 else ""
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


def name_fused(model: onnx_ir.Model, weights: Collection[str]) -> None:
    """Put the module path before the names of nodes that onnxsim made, where a weight tells the module."""
    for node in model.graph:
        weight = next((v.name for v in node.inputs if v and v.name in weights and "." in v.name), "")
        if weight and "/" not in (node.name or ""):
            node.name = f"{weight.rpartition('.')[0]}/{node.name or node.op_type}"


def name_weights(model: onnx_ir.Model) -> None:
    """Small weights, which stayed in the graph, by their names in the network's own state dict."""
    for value in list(model.graph.initializers.values()):
        value.name = value.name.removeprefix(WRAPPER)


def name_axes(model: onnx_ir.Model, axis_names: dict[str, dict[int, str]]) -> None:
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
