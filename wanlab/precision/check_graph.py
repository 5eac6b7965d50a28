"""Effect check of a graph: whether it computes an expert by a plan, read from its nodes and initializers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pandas as pd
import torch

from wanlab.core.errors import WanlabError
from wanlab.core.formats import ELEMENT_TYPES
from wanlab.core.words import component_text
from wanlab.precision.apply import AS_LOADED, requested_formats
from wanlab.precision.assignment import Assignment
from wanlab.precision.check_torch import Effect, Fault, at_step, changes, counts, near, raise_weights, summary
from wanlab.precision.formats import CODES_OF_ONNX, QuantFormat, decode_weight, encode_weight, get_format
from wanlab.precision.linear_nodes import OPERATORS, find_linear_nodes, nodes_of_layers
from wanlab.precision.plan import FLOATS, is_float

NAMES = {ELEMENT_TYPES[name].onnx[0]: dtype for name, dtype in FLOATS.items()}
"""Floats in ONNX -> in PyTorch."""
PASSING = ("Cast", "Transpose", "Reshape", "Identity")


@dataclass(frozen=True, eq=False)
class Operand:
    """An input of a node.

    Attributes:
        kind: `"int8"`, `"int4"`, `"fp8"` behind a DequantizeLinear; empty for a float.
        dtype: float that it is multiplied in, by its name in PyTorch; empty where the graph does not state it.
        stored: initializer of the codes or of the float; None where it is computed.
        scale: initializer; None of a float.
        late: whether it is a float initializer that is rounded at every run.
    """

    kind: str
    dtype: str
    stored: onnx_ir.Value | None = None
    scale: onnx_ir.Value | None = None
    late: bool = False


def graph_effect_check(
    assignment: Assignment,
    component: str,
    onnx_path: str | os.PathLike,
    *,
    step: int | None = None,
    source: str | os.PathLike | None = None,
) -> Effect:
    """Prove that a graph computes an expert by a plan, or fail.

    Every node of every layer is read: the type of its weight's initializer, whether its input is rounded to codes, and
    the float that it computes in. Engines that are built strongly typed (TensorRT) and ONNX Runtime take these types as
    they are.

    Args:
        assignment: assignment of the plan on the model that the graph was exported from.
        component: expert that the graph computes.
        onnx_path: graph of `wanlab.precision.quantize`, or one whose nodes' names also begin with their layer's.
        step: step that the graph is for, of a plan that changes with the step.
        source: float graph that it was made from; with it codes are compared with the weights.

    Returns:
        As `effect_check`; products are nodes with the types of their operands, and there are no kernels.

    Raises:
        WanlabError: a graph of another component; as `effect_check`.
    """
    path = Path(onnx_path)
    if not path.is_file():
        raise WanlabError(f"no ONNX file at {path}; write it with wanlab.precision.quantize")
    model = onnx_ir.load(path)
    named = model.metadata_props.get("component", component)
    if named != component:
        raise WanlabError(f"{path.name} is a graph of {named}, not of {component}; give its own graph")
    if step is None:
        assignment.formats(component)  # fails where the formats need a step
    layers_of_plan = requested_formats(assignment, component)
    layers_of_plan = layers_of_plan if step is None else layers_of_plan[at_step(layers_of_plan, step)]
    nodes: dict[str, list] = {}
    for node in model.graph:
        if node.op_type in OPERATORS and "/" in (node.name or ""):
            nodes.setdefault(node.name.partition("/")[0], []).append(node)
    missing = [
        r.layer for r in layers_of_plan.itertuples() if r.requested != AS_LOADED and r.layer not in nodes
    ]
    if missing:
        raise WanlabError(
            f"plan {assignment.plan.name}: {path.name} has no node of {missing[0]}"
            f"{f' and of {len(missing) - 1} more layers' if missing[1:] else ''}: the name matches none of its layers;"
            " export the graph again"
        )
    weights = _weights_of(source, [r.layer for r in layers_of_plan.itertuples() if r.requested != AS_LOADED])
    rows: list[dict[str, Any]] = []
    faults: list[Fault] = []
    for row in layers_of_plan.itertuples():
        if row.layer not in nodes:
            continue  # as loaded: folded away, or without a constant weight
        facts, wrong = _read(nodes[row.layer], row, assignment, weights)
        rows.append(
            {
                "component": component,
                "layer": row.layer,
                "format": row.requested,
                "found": wrong is None,
                **facts,
            }
        )
        if wrong is not None:
            faults.append(Fault(component, row.layer, *wrong))
    raise_weights(assignment, rows, faults, "write the graph again with precision.quantize by this plan")
    layers = pd.DataFrame([row | {"changed": changes(row, assignment.default)} for row in rows])
    frame = summary(layers)
    kernels = pd.DataFrame(columns=["component", "operator", "kernel", "calls", "share_percent"])
    parts = "; ".join(text.replace(f" of {component} in", " in") for text in counts(frame)) or "all floats"
    lines = "".join(f" {line}." for line in assignment.without_effect([component]))
    verdict = (
        f"The graph of the {component_text(component)} follows plan {assignment.plan.name}: {parts}.{lines}"
    )
    return Effect(verdict, frame, layers, kernels)


def _read(nodes: list, row, assignment: Assignment, weights: Mapping) -> tuple[dict, tuple[str, str] | None]:
    """Operands of a layer's nodes; and kind and message of a fault, None without one."""
    name = (
        FLOATS[row.format]
        if is_float(row.format) and row.requested != AS_LOADED
        else FLOATS[assignment.default]
    )
    kinds, products, size, wrong = [], [], 0, None
    for node in nodes:
        left, right = operand(node.inputs[0]), operand(node.inputs[1])
        for value in (right.stored, right.scale):
            size += value.const_value.nbytes if value is not None else 0
        kinds.append(right.kind or right.dtype)
        products.append(f"{node.op_type} {left.kind or left.dtype or 'float'} x {right.kind or right.dtype}")
        wrong = wrong or _fault(node, left, right, row, name, weights.get(row.layer))
    facts = {
        "held": ", ".join(dict.fromkeys(kinds)),
        "weight_before_bytes": None,
        "weight_bytes": size,
        "product": ", ".join(dict.fromkeys(products)),
    }
    return facts, wrong


def _fault(node, left: Operand, right: Operand, row, dtype: str, weight) -> tuple[str, str] | None:
    quantised = row.requested != AS_LOADED and not is_float(row.requested)
    # diffusers keeps the timestep's embedder in float32 whatever the rest is in.
    kept = "time_embedder" in row.layer and (row.requested == AS_LOADED or quantised)
    if right.dtype and right.dtype != dtype and not (kept and right.dtype == "float32"):
        message = (
            f"computes in {right.dtype}, where the plan asks for {row.requested if not quantised else dtype}"
        )
        return ("fp32", f"{message}: FP32 fallback") if right.dtype == "float32" else ("wrong", message)
    if not quantised:
        for which, side in (("weight", right), ("input", left)):
            if side.kind:
                return "wrong", f"has its {which} in {side.kind}, though the plan asks for {row.requested}"
        return None
    format = get_format(row.requested)
    if right.late:
        return (
            "dequantised",
            f"holds its weight in {right.dtype} and rounds it at every run, instead of codes",
        )
    if not right.kind:
        return _float_fault(node, right, format, weight)
    activation = format.activation.kind if format.activation else ""
    if right.kind != format.weight.kind:
        return "wrong", f"has its weight in {right.kind}, where the plan asks for {format.name}"
    if left.kind != activation:
        if not left.kind:
            return "no-op", f"takes its input as it comes, where {format.name} rounds it to codes"
        return "wrong", f"has its input in {left.kind}, where the plan asks for {format.name}"
    return None if weight is None else _codes_fault(node, right, format, weight)


def _float_fault(node, right: Operand, format: QuantFormat, weight) -> tuple[str, str]:
    """Fault of a layer whose weight is a float where the plan asks for codes."""
    if right.stored is None:
        return "wrong", f"computes its weight, where the plan asks for {format.name}"
    values = _values(node, right)
    if weight is None or not torch.equal(values, weight):
        fresh = decode_weight(
            *encode_weight(values, format.weight, values.dtype), format.weight, values.dtype
        )
        if near(fresh, values):
            return (
                "dequantised",
                f"holds {right.dtype}, though its values are those of {format.name}: it was dequantised once",
            )
    return "unquantised", f"holds its weight in {right.dtype}, where the plan asks for {format.name}"


def _codes_fault(node, right: Operand, format: QuantFormat, weight) -> tuple[str, str] | None:
    codes, scale = encode_weight(weight, format.weight, getattr(torch, right.dtype or "float32"))
    codes_values = _values(node, right)
    steps = torch.from_numpy(np.array(right.scale.const_value.numpy(), dtype=np.float32))
    # Sorted, as scales of blocks lie transposed in some nodes.
    alike = torch.equal(steps.flatten().sort().values, scale.float().flatten().sort().values)
    if alike and torch.equal(codes_values, codes.float()):
        return None
    if steps.numel() == 1 and torch.equal(codes_values * steps, weight.float()):
        return (
            "no-op",
            f"has the format {format.name}, but its weight is bitwise the original's: nothing was rounded",
        )
    return "wrong", f"holds codes that are not the original's weight in {format.name}"


def operand(value: onnx_ir.Value | None) -> Operand:
    """The operand that a value is, behind casts and changes of form."""
    dtype = ""
    while value is not None:
        node = value.producer()
        dtype = dtype or _name(value.dtype)
        if node is None:
            return Operand("", dtype, value if value.const_value is not None else None)
        if node.op_type == "DequantizeLinear":
            codes, scale = node.inputs[0], node.inputs[1]
            before = codes.producer()
            kind = CODES_OF_ONNX.get(codes.dtype.name, "") if codes.dtype is not None else ""
            dtype = dtype or _name(scale.dtype)
            if before is None:
                return Operand(kind, dtype, codes, scale)
            if before.op_type == "QuantizeLinear":
                first = before.inputs[0]
                if first.producer() is None and first.const_value is not None:
                    return Operand("", dtype, first, late=True)
                return Operand(kind or _zero_kind(before), dtype, scale=scale)
            return Operand(kind, dtype, scale=scale)
        if node.op_type not in PASSING:
            return Operand("", dtype)
        value = node.inputs[0]
    return Operand("", dtype)


def _zero_kind(quantize) -> str:
    zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    return CODES_OF_ONNX.get(zero.dtype.name, "") if zero is not None and zero.dtype is not None else ""


def _name(dtype) -> str:
    return NAMES.get(dtype.name, "") if dtype is not None else ""


def _values(node, right: Operand) -> torch.Tensor:
    """Stored values of a weight in float32, outputs first."""
    tensor = right.stored.const_value
    value = torch.from_numpy(np.array(tensor.numpy(), dtype=np.float32))
    if hasattr(tensor, "release"):
        tensor.release()  # the mapping of the file, which would add up over a large graph
    flag = node.attributes.get("transB")
    transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not (flag and flag.as_int()))
    turned = node.inputs[1].producer()
    if turned is not None and turned.op_type == "Transpose":
        transposed = not transposed
    return value.t() if transposed else value


def _weights_of(source, layers: list[str]) -> dict[str, torch.Tensor]:
    """Layer -> weight of the float graph, in float32, outputs first; read one by one when used."""
    if source is None:
        return {}
    linears = nodes_of_layers(find_linear_nodes(onnx_ir.load(source).graph), layers, Path(source).name)
    return _Lazy(linears)


class _Lazy(dict):
    """Weights that are read at each access, so that a large graph is never in memory as a whole."""

    def get(self, layer, default=None):
        return self[layer][0].weight() if layer in self else default
