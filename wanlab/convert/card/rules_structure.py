"""Lint of an engine's structure: what should be one kernel, and what should not be there."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from wanlab.convert.card.findings import Finding, counted, mib, total_ms
from wanlab.convert.card.kinds import PRODUCTS
from wanlab.convert.card.layers import ITEM_BYTES, EngineLayers, Layer
from wanlab.convert.ort.nodes import SHAPE_OPERATORS

_HOPS = 3  # between a product and the softmax: scale, mask, cast
_CHAIN = {"Pow", "Mul", "Add", "Sub", "Sqrt", "Rsqrt", "Reciprocal", "Div", "Cast", "Clip", "Max", "Expand"}
_REDUCTIONS = {"ReduceMean", "ReduceL2", "ReduceSumSquare", "ReduceSum"}
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "NoOp")
_BAD = {
    "ScatterND": "write whole tensors (concatenate, stack) instead of parts; wanlab's friendly forms do for rotary tables",
    "ScatterElements": "write whole tensors (concatenate, stack) instead of parts",
    "NonZero": "select by a mask instead; its size is known only when it has run",
    "Loop": "unroll it",
    "SequenceAt": "index tensors instead of lists",
    "SplitToSequence": "split into tensors instead of a list",
}


def unfused_attention(layers: EngineLayers) -> Iterator[Finding]:
    """A softmax of its own between two products: the scores of all tokens against all are written and read."""
    found: dict[int, Layer] = {}
    scores: list[Layer] = []
    for place, layer in enumerate(layers.layers):
        if layer.kind != "softmax":
            continue
        around = _products_around(layers, place)
        if around or layer.role in ("attn1", "attn2"):
            scores.append(layer)
            found |= {place: layer} | around
    if not scores:
        return
    size = sum(layer.activation_bytes for layer in scores)
    largest = max(scores, key=lambda layer: layer.activation_bytes)
    shape = next((tensor.shape for tensor in largest.outputs if tensor.shape), None)
    written = "the scores of all queries against all keys are written and read again"
    if size and shape is not None and len(shape) > 1:
        written = (
            f"scores of {shape[-2]} x {shape[-1]} tokens are {mib(largest.activation_bytes)} in one attention,"
            f" {mib(size)} in all"
        )
    if layers.source == "onnx":
        hazard = f"attention is MatMul, Softmax, MatMul in {len(scores)} places: unless the engine fuses them, {written}"
    else:
        hazard = f"attention is not fused in {len(scores)} places: {written}"
    yield Finding(
        "attention not fused",
        hazard,
        "export at opset 23 or later, where attention is one operator, and use an engine with a kernel for its head size",
        "a fused kernel never writes the scores, whose size grows with the square of the tokens (Dao et al. 2022)",
        tuple(found[place] for place in sorted(found)),
        size,
    )


def norm_chains(layers: EngineLayers) -> Iterator[Finding]:
    """A norm as single operators: Pow, ReduceMean, Add, Sqrt, Div, Mul."""
    modules: dict[tuple[str, ...], list[Layer]] = defaultdict(list)
    for layer in layers.layers:
        modules[layer.modules].append(layer)
    chains = []
    for names, members in modules.items():
        kinds = {layer.type for layer in members}
        if names and kinds & _REDUCTIONS and kinds & {"Sqrt", "Rsqrt", "Reciprocal", "Div"}:
            chains.append([layer for layer in members if layer.type in _CHAIN | _REDUCTIONS])
    if not chains:
        return
    parts = tuple(layer for chain in chains for layer in chain)
    yield Finding(
        "norm not fused",
        f"norms are chains of single operators in {len(chains)} places: {counted(parts)}",
        "export at opset 23 or later, where root-mean-square normalisation is one operator",
        "each operator reads and writes the whole activation; one kernel does it once",
        parts,
        sum(layer.activation_bytes for layer in parts),
    )


def weight_transposes(layers: EngineLayers) -> Iterator[Finding]:
    """Weights that are turned round at every run."""
    found = tuple(
        layer
        for layer in layers.layers
        if layer.type in ("Transpose", "Shuffle")
        and (
            (layer.inputs and layer.inputs[0].constant)
            or 0 < layer.activation_bytes == layer.weight_bytes  # a profile without its graph
        )
    )
    if found:
        size = sum(layer.activation_bytes for layer in found)
        yield Finding(
            "weights transposed at run time",
            f"weights are transposed at every run: {len(found)}, {mib(size)}",
            "fold them when exporting, or store the weight as its product reads it",
            "constant folding skips large weights, to keep files small",
            found,
            size,
        )


def bad_operators(layers: EngineLayers) -> Iterator[Finding]:
    """Operators and number formats that engines run badly or refuse."""
    for name, mitigation in _BAD.items():
        found = tuple(layer for layer in layers.layers if layer.type == name)
        if found:
            yield Finding(
                f"{name} in the graph",
                f"{len(found)} {name}",
                mitigation,
                "engines run it one element at a time, or not at all",
                found,
                sum(layer.activation_bytes for layer in found),
            )
    double = tuple(
        layer for layer in layers.layers if any(t.dtype == "fp64" for t in (*layer.inputs, *layer.outputs))
    )
    if double:
        yield Finding(
            "float64 in the graph",
            f"float64 is read or written: {counted(double)}",
            "compute tables in float64 when exporting and store them in float32",
            "TensorRT has no float64; GPUs run it at 1/32 of float32 or less",
            double,
        )


def moved(layers: EngineLayers, minimum_percent: float) -> Iterator[Finding]:
    """Layers that only move activations: transposed, sliced, concatenated, padded."""
    if layers.source == "onnx":
        return  # an engine may still take them into other layers
    found = tuple(
        layer
        for layer in layers.layers
        if layer.kind in ("layout", "gather")
        and layer.type not in _VIEWS
        and not (layer.inputs and layer.inputs[0].constant)
        and layer.precision in ITEM_BYTES
        and not layer.precision.startswith(("int", "bool"))
    )
    share = 100 * total_ms(found) / layers.total_ms if layers.timed else math.nan
    if not found or (layers.timed and not share >= minimum_percent):
        return
    taken = f", which takes {share:.1f} % of the time" if layers.timed else ""
    yield Finding(
        "activations moved",
        f"activations are only moved{taken}: {counted(found)}",
        "write rotary embedding and head splitting so that an engine can take them into the products beside them",
        "a move computes nothing; it reads and writes an activation",
        found,
        sum(layer.activation_bytes for layer in found),
    )


def off_device(layers: EngineLayers) -> Iterator[Finding]:
    """Nodes of a GPU session that run on the CPU, and the copies between."""
    if not any(layer.provider not in ("", "CPUExecutionProvider") for layer in layers.layers):
        return
    copies = tuple(layer for layer in layers.layers if layer.type.startswith("Memcpy"))
    if copies:
        yield Finding(
            "copies between host and GPU",
            f"activations are copied inside the graph: {counted(copies)}",
            "give the operators around them a form that the GPU provider has",
            "each copy waits for the GPU, and forbids capturing the graph",
            copies,
            sum(layer.activation_bytes for layer in copies),
        )
    lost = tuple(
        layer
        for layer in layers.layers
        if layer.provider == "CPUExecutionProvider"
        and (layer.type not in SHAPE_OPERATORS or layer.precision.startswith(("fp", "bf")))
    )
    if lost:
        yield Finding(
            "computed on the CPU",
            f"a GPU session computes on the CPU: {counted(lost)}",
            "export them in another dtype or opset, or use a provider that has them",
            "their inputs and outputs cross the bus at every run",
            lost,
        )


def _products_around(layers: EngineLayers, place: int) -> dict[int, Layer]:
    """The products whose result a softmax reads and that read its result."""
    table, edges = layers.layers, layers.edges
    found = {}
    if any(edges.before):
        for neighbours in (edges.before, edges.after):
            near = {place}
            for _ in range(_HOPS):
                near = {j for i in near for j in neighbours[i]}
                found |= {i: table[i] for i in near if table[i].kind in PRODUCTS}
                near = {i for i in near if table[i].kind not in (*PRODUCTS, "softmax")}
        return found
    softmax = table[place]
    shapes = {tensor.shape for tensor in (*softmax.inputs, *softmax.outputs)}
    for i, layer in enumerate(table):
        touched = {tensor.shape for tensor in (*layer.inputs, *layer.outputs)}
        if layer.kind in PRODUCTS and layer.modules == softmax.modules and shapes & touched:
            found[i] = layer
    return found
