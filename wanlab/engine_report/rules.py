"""Rules that find problems of an engine in its layers."""

from __future__ import annotations

import fnmatch
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.formats import CODES, FLOATS, ITEM_BYTES, element_name
from wanlab.engine_report.layers import CONVERSIONS, PRODUCTS, EngineLayers, Layer
from wanlab.engines.onnxruntime import SHAPE_OPERATORS


@dataclass(frozen=True)
class Finding:
    """One problem and its layers.

    Attributes:
        rule: name of the rule, the same for every engine.
        hazard: the problem, with its number.
        mitigation: what to do about it.
        help: why it matters, or where to read more.
        layers: layers that it concerns.
        size_bytes: bytes that it costs; 0 if it is not about bytes.
    """

    rule: str
    hazard: str
    mitigation: str
    help: str
    layers: tuple[Layer, ...]
    size_bytes: int = 0

    @property
    def time_ms(self) -> float:
        """Time of its layers; NaN without times."""
        return total_ms(self.layers)

    def row(self) -> dict[str, Any]:
        """One flat row of a table."""
        return {
            "hazard": self.hazard,
            "mitigation": self.mitigation,
            "help": self.help,
            "layers": len(self.layers),
            "time_ms": self.time_ms,
            "size_bytes": self.size_bytes,
            "example": self.layers[0].name if self.layers else "",
        }


def total_ms(layers: Iterable[Layer]) -> float:
    """Sum of the known times; NaN if none is known."""
    times = [layer.time_ms for layer in layers if not math.isnan(layer.time_ms)]
    return math.fsum(times) if times else math.nan


def counted(layers: Iterable[Layer], most: int = 6) -> str:
    """Numbers of layers by type as text, such as `24 Cast, 2 Transpose and 3 others`."""
    counts = Counter(layer.type for layer in layers).most_common()
    others = sum(n for _, n in counts[most:])
    return ", ".join(f"{n} {name}" for name, n in counts[:most]) + (f" and {others} others" if others else "")


def mib(size_bytes: float) -> str:
    """Bytes as text in KiB, MiB, GiB or TiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if size_bytes >= size:
            return f"{size_bytes / size:,.1f} {unit}"
    return f"{size_bytes / 2**10:,.1f} KiB"


_HOPS = 3  # layers between a product and the softmax: scale, mask, cast
_CHAIN = {"Pow", "Mul", "Add", "Sub", "Sqrt", "Rsqrt", "Reciprocal", "Div", "Cast", "Clip", "Max", "Expand"}
_REDUCTIONS = {"ReduceMean", "ReduceL2", "ReduceSumSquare", "ReduceSum"}
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "NoOp")
_BAD = {
    "ScatterND": "write whole tensors (concatenate, stack) instead of parts; as friendly forms do for rotary tables",
    "ScatterElements": "write whole tensors (concatenate, stack) instead of parts",
    "NonZero": "select by a mask instead; the size of its output is known only after a run",
    "Loop": "unroll it",
    "SequenceAt": "index tensors instead of lists",
    "SplitToSequence": "split into tensors instead of a list",
}


def unfused_attention(layers: EngineLayers) -> Iterator[Finding]:
    """A separate softmax between two products: the scores of all pairs of tokens are written and read."""
    parts: dict[int, Layer] = {}
    scores: list[Layer] = []
    for place, layer in enumerate(layers.layers):
        if layer.kind != "softmax":
            continue
        around = _products_around(layers, place)
        if around or layer.role in ("attn1", "attn2"):
            scores.append(layer)
            parts |= {place: layer} | around
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
        tuple(parts[place] for place in sorted(parts)),
        size,
    )


def norm_chains(layers: EngineLayers) -> Iterator[Finding]:
    """A norm as a chain of operators: Pow, ReduceMean, Add, Sqrt, Div, Mul."""
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
    """Weights that are transposed at every run."""
    transposes = tuple(
        layer
        for layer in layers.layers
        if layer.type in ("Transpose", "Shuffle")
        and (
            (layer.inputs and layer.inputs[0].constant)
            or 0 < layer.activation_bytes == layer.weight_bytes  # a profile without its graph
        )
    )
    if transposes:
        size = sum(layer.activation_bytes for layer in transposes)
        yield Finding(
            "weights transposed at run time",
            f"weights are transposed at every run: {len(transposes)}, {mib(size)}",
            "fold them when exporting, or store the weight as its product reads it",
            "constant folding skips large weights, to keep files small",
            transposes,
            size,
        )


def bad_operators(layers: EngineLayers) -> Iterator[Finding]:
    """Operators and number formats that engines run slowly or refuse."""
    for name, mitigation in _BAD.items():
        nodes = tuple(layer for layer in layers.layers if layer.type == name)
        if nodes:
            yield Finding(
                f"{name} in the graph",
                f"{len(nodes)} {name}",
                mitigation,
                "engines run it one element at a time, or not at all",
                nodes,
                sum(layer.activation_bytes for layer in nodes),
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
        return  # an engine may still fuse them into other layers
    moves = tuple(
        layer
        for layer in layers.layers
        if layer.kind in ("layout", "gather")
        and layer.type not in _VIEWS
        and not (layer.inputs and layer.inputs[0].constant)
        and layer.precision in ITEM_BYTES
        and not layer.precision.startswith(("int", "bool"))
    )
    share = 100 * total_ms(moves) / layers.total_ms if layers.timed else math.nan
    if not moves or (layers.timed and not share >= minimum_percent):
        return
    time_share = f", which takes {share:.1f} % of the time" if layers.timed else ""
    yield Finding(
        "activations moved",
        f"activations are only moved{time_share}: {counted(moves)}",
        "write rotary embedding and head splitting so that an engine can fuse them into neighbouring products",
        "a move computes nothing; it reads and writes an activation",
        moves,
        sum(layer.activation_bytes for layer in moves),
    )


def off_device(layers: EngineLayers) -> Iterator[Finding]:
    """Nodes of a GPU session that run on the CPU, and the copies between GPU and CPU."""
    if not any(layer.provider not in ("", "CPUExecutionProvider") for layer in layers.layers):
        return
    copies = tuple(layer for layer in layers.layers if layer.type.startswith("Memcpy"))
    if copies:
        yield Finding(
            "copies between host and GPU",
            f"activations are copied inside the graph: {counted(copies)}",
            "express the operators around them in a form that the GPU provider supports",
            "each copy waits for the GPU, and prevents graph capture",
            copies,
            sum(layer.activation_bytes for layer in copies),
        )
    on_cpu = tuple(
        layer
        for layer in layers.layers
        if layer.provider == "CPUExecutionProvider"
        and (layer.type not in SHAPE_OPERATORS or layer.precision.startswith(("fp", "bf")))
    )
    if on_cpu:
        yield Finding(
            "computed on the CPU",
            f"a GPU session computes on the CPU: {counted(on_cpu)}",
            "export them in another dtype or opset, or use a provider that supports them",
            "their inputs and outputs are copied between GPU and host at every run",
            on_cpu,
        )


def _products_around(layers: EngineLayers, place: int) -> dict[int, Layer]:
    """The products whose output a softmax reads, and those that read its output."""
    table, edges = layers.layers, layers.edges
    products: dict[int, Layer] = {}
    if any(edges.before):
        for neighbours in (edges.before, edges.after):
            near = {place}
            for _ in range(_HOPS):
                near = {j for i in near for j in neighbours[i]}
                products |= {i: table[i] for i in near if table[i].kind in PRODUCTS}
                near = {i for i in near if table[i].kind not in (*PRODUCTS, "softmax")}
        return products
    softmax = table[place]
    shapes = {tensor.shape for tensor in (*softmax.inputs, *softmax.outputs)}
    for i, layer in enumerate(table):
        layer_shapes = {tensor.shape for tensor in (*layer.inputs, *layer.outputs)}
        if layer.kind in PRODUCTS and layer.modules == softmax.modules and shapes & layer_shapes:
            products[i] = layer
    return products


_CONVERSION_HOPS = 2  # conversions in a row between two products


def not_as_planned(layers: EngineLayers, planned: Mapping[str, str]) -> Iterator[Finding]:
    """Products that compute, or store their weights, in another format than planned."""
    if not planned:
        return
    formats = {pattern: _format(name) for pattern, name in planned.items()}
    deviations: dict[tuple[str, str], list[Layer]] = {}
    matched: set[str] = set()
    for layer in layers.layers:
        if layer.kind not in ("matmul", "conv"):
            continue
        matching = [p for p in formats if any(fnmatch.fnmatchcase(module, p) for module in layer.modules)]
        if not matching:
            continue
        matched.update(matching)
        name, weights_only = formats[matching[-1]]
        used = layer.weight_dtype if weights_only else layer.precision
        # A product of two activations (scores) has no weights, and an inspector may not give them.
        if used and used != name:
            deviations.setdefault((f"a weight in {name}" if weights_only else name, used), []).append(layer)
    for (name, used), layers_of in deviations.items():
        yield Finding(
            "precision not as planned",
            f"{name} was planned and {used} is used: {counted(layers_of)}",
            "check that Q/DQ or Cast is directly at the layer's inputs, and that the engine has a kernel for it there",
            "a layer that falls back is as slow as before and still loses quality",
            tuple(layers_of),
        )
    if absent := [pattern for pattern in formats if pattern not in matched]:
        yield Finding(
            "planned layers not found",
            f"no layer matches the planned patterns: {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}",
            "compare with the module names of the report; names of exporter and plan have to agree",
            "a pattern without a layer quantises nothing",
            (),
        )


def between_quantised(layers: EngineLayers) -> Iterator[Finding]:
    """Conversions between one quantised product and the next."""
    table, edges = layers.layers, layers.edges
    between = []
    for place, layer in enumerate(table):
        if layer.kind not in CONVERSIONS or (layers.source == "onnx" and layer.kind == "quantize"):
            continue
        sides = [_nearest_products(table, neighbours, place) for neighbours in (edges.before, edges.after)]
        if all(any(table[i].precision in CODES for i in side) for side in sides):
            between.append(layer)
    if between:
        yield Finding(
            "conversions between quantised layers",
            f"there are conversions between quantised layers: {counted(between)}",
            "give both layers one scale and one format, so that the next layer reads the quantised values directly",
            "each writes and reads the activation again, which often costs more than quantisation saves",
            tuple(between),
            sum(layer.activation_bytes for layer in between),
        )


def left_quantisers(layers: EngineLayers) -> Iterator[Finding]:
    """Q/DQ nodes that the engine runs as layers instead of fusing them into products."""
    if layers.source == "onnx":
        return
    unfused = [layer for layer in layers.layers if layer.kind == "quantize"]
    weights = tuple(layer for layer in unfused if layer.inputs and layer.inputs[0].constant)
    others = tuple(layer for layer in unfused if layer not in weights)
    if others:
        yield Finding(
            "Q/DQ not fused",
            f"quantising and dequantising are separate layers: {counted(others)}",
            "place Q/DQ directly before its product, in a type for which the engine has a kernel",
            "without a quantised kernel after it, quantising only adds work",
            others,
            sum(layer.activation_bytes for layer in others),
        )
    if weights:
        size = sum(layer.activation_bytes for layer in weights)
        yield Finding(
            "weights dequantised at run time",
            f"weights become {mib(size)} of floats at every run: {counted(weights)}",
            "use an engine with a kernel that reads quantised weights, or keep these weights in 16 bits",
            "this saves space on disk only, and every run has the time of the conversion",
            weights,
            size,
        )


def float32_layers(layers: EngineLayers) -> Iterator[Finding]:
    """Float32 layers in an engine whose products are narrower."""
    products = Counter(
        layer.precision for layer in layers.layers if layer.kind in PRODUCTS and layer.precision
    )
    if not products:
        return
    usual = products.most_common(1)[0][0]
    if ITEM_BYTES.get(usual, 4.0) >= ITEM_BYTES["fp32"]:
        return
    wide = tuple(
        layer
        for layer in layers.layers
        if layer.precision in ("fp32", "fp64") and layer.kind not in (*CONVERSIONS, "shape", "sync")
    )
    if not wide:
        return
    slow = [layer for layer in wide if layer.kind in PRODUCTS]
    yield Finding(
        "FP32 islands",
        f"FP32 layers in an engine whose products are {usual.upper()}: {counted(wide)}; products among them: {len(slow)}",
        "give products the engine's format; keep norms, modulation and timestep embedding as the library keeps them",
        "Wan keeps norms and modulation in FP32 on purpose; a product in FP32 runs at a fraction of the speed",
        wide,
        sum(layer.activation_bytes for layer in wide),
    )


def conversions(layers: EngineLayers, minimum_percent: float) -> Iterator[Finding]:
    """Changes of dtype, layout or device of activations, if they take at least a share of the time."""
    changes = tuple(
        layer
        for layer in layers.layers
        if layer.kind in CONVERSIONS
        and layer.kind != "quantize"  # `left_quantisers` has these
        and not (layer.inputs and all(tensor.constant for tensor in layer.inputs))
        and any(
            tensor.dtype in FLOATS or tensor.dtype in CODES or not tensor.dtype for tensor in layer.outputs
        )
    )
    if not changes:
        return
    time_ms, whole_ms = total_ms(changes), layers.total_ms
    share = 100 * time_ms / whole_ms if whole_ms else math.nan
    if layers.timed and not share >= minimum_percent:
        return
    time_share = f" take {share:.1f} % of the time" if layers.timed else ""
    yield Finding(
        "conversions",
        f"conversions of dtype or layout{time_share}: {counted(changes)}",
        "make neighbours agree on dtype and layout: cast once at the input, keep layers of one format together",
        "a conversion computes nothing; it reads and writes an activation",
        changes,
        sum(layer.activation_bytes for layer in changes),
    )


def _nearest_products(table: tuple[Layer, ...], neighbours: list[list[int]], place: int) -> set[int]:
    near, products = {place}, set()
    for _ in range(_CONVERSION_HOPS + 1):
        near = {j for i in near for j in neighbours[i]}
        products |= {i for i in near if table[i].kind in PRODUCTS}
        near -= products
    return products


def _format(name: str) -> tuple[str, bool]:
    """Format of tensors, and whether only weights have it: `"int4-weight-64"` gives `("int4", True)`."""
    plain, weight, _ = str(name).lower().partition("-weight")
    plain = element_name(plain.removesuffix("-channel")) or plain
    if plain not in ITEM_BYTES:
        known = [*FLOATS, *CODES, "int8-weight", "int4-weight"]
        raise WanlabError(f"no format {name!r}{did_you_mean(str(name), known)}; give {', '.join(known)}")
    return plain, bool(weight)


def lint(
    layers: EngineLayers, *, planned: Mapping[str, str] | None = None, minimum_percent: float = 1.0
) -> tuple[Finding, ...]:
    """Findings, ordered by time, then by bytes, then by number of layers, largest first.

    For a graph before any engine, problems that every engine solves are left out.

    Args:
        layers: layers of the engine.
        planned: pattern of module names -> planned number format; see `report.summarize`.
        minimum_percent: share of the time, in percent, from which conversions and moves are a finding.

    Raises:
        WanlabError: a planned format that does not exist.
    """
    findings = [
        *unfused_attention(layers),
        *norm_chains(layers),
        *weight_transposes(layers),
        *bad_operators(layers),
        *off_device(layers),
        *not_as_planned(layers, planned or {}),
        *between_quantised(layers),
        *left_quantisers(layers),
        *float32_layers(layers),
        *conversions(layers, minimum_percent),
        *moved(layers, minimum_percent),
    ]

    def weight(finding: Finding) -> tuple[float, int, int]:
        time_ms = finding.time_ms
        return 0.0 if math.isnan(time_ms) else time_ms, finding.size_bytes, len(finding.layers)

    return tuple(sorted(findings, key=weight, reverse=True))
