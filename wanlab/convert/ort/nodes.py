"""Where the nodes of a session run, and which of them are not where they should be."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# ONNX Runtime keeps arithmetic on sizes on the CPU on purpose: its results are needed there.
SHAPE_OPERATORS = frozenset(
    {
        "Shape",
        "Size",
        "Gather",
        "Squeeze",
        "Unsqueeze",
        "Concat",
        "Slice",
        "Cast",
        "Mul",
        "Add",
        "Sub",
        "Div",
        "Mod",
    }
    | {
        "Range",
        "Equal",
        "Where",
        "Reshape",
        "Min",
        "Max",
        "ConstantOfShape",
        "Expand",
        "Less",
        "Greater",
        "And",
        "Or",
    }
    | {"Not", "ReduceProd", "Neg", "Floor", "Ceil", "Identity"}
)


def assigned_nodes(session) -> pd.DataFrame:
    """Where each node of a session runs, as ONNX Runtime recorded it when it divided the graph.

    Returns:
        node (wanlab's name), operator, provider (`"CUDAExecutionProvider"`, ...).
    """
    import pandas as pd

    rows = [
        {"node": node.name, "operator": node.op_type, "provider": part.ep_name}
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    return pd.DataFrame(rows, columns=["node", "operator", "provider"])


def fallen_back(nodes: pd.DataFrame, tensor_kinds: dict[str, bool]) -> pd.DataFrame:
    """Nodes of a CUDA session that compute on the CPU.

    A node that only handles sizes is none of them: an operator of `SHAPE_OPERATORS` none of whose outputs is a
    floating-point tensor.

    Args:
        nodes: of `assigned_nodes`.
        tensor_kinds: node -> whether it makes a floating-point tensor, as far as the graph says.
    """
    on_cpu = nodes[nodes["provider"] == "CPUExecutionProvider"]
    makes_floats = on_cpu["node"].map(lambda name: tensor_kinds.get(name, False)).astype(bool)
    return on_cpu[makes_floats | ~on_cpu["operator"].isin(SHAPE_OPERATORS)]


def floating_nodes(path) -> dict[str, bool]:
    """Node -> whether it makes a floating-point tensor, from the types that a graph carries."""
    import onnx_ir

    def floats(node) -> bool:
        return any(value.dtype is not None and value.dtype.is_floating_point() for value in node.outputs)

    return {node.name: floats(node) for node in onnx_ir.load(path).graph.all_nodes() if node.name}
