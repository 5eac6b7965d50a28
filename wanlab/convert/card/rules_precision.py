"""Lint of number formats: what was planned, what is converted, what stayed wide."""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Iterator, Mapping

from wanlab.convert.card.findings import Finding, counted, mib, total_ms
from wanlab.convert.card.kinds import CONVERSIONS, PRODUCTS
from wanlab.convert.card.layers import CODES, FLOATS, ITEM_BYTES, EngineLayers, Layer
from wanlab.errors import WanlabError, did_you_mean

_HOPS = 2
_ALIASES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64", "fp8-channel": "fp8"}


def not_as_planned(layers: EngineLayers, planned: Mapping[str, str]) -> Iterator[Finding]:
    """Products that compute, or keep their weights, in another format than planned."""
    if not planned:
        return
    wanted = {pattern: _format(name) for pattern, name in planned.items()}
    wrong: dict[tuple[str, str], list[Layer]] = {}
    met: set[str] = set()
    for layer in layers.layers:
        if layer.kind not in ("matmul", "conv"):
            continue
        matching = [p for p in wanted if any(fnmatch.fnmatchcase(module, p) for module in layer.modules)]
        if not matching:
            continue
        met.update(matching)
        name, weights_only = wanted[matching[-1]]
        used = layer.weight_dtype if weights_only else layer.precision
        # An activation against an activation (scores) has no weights, and an inspector may not say them.
        if used and used != name:
            wrong.setdefault((f"a weight in {name}" if weights_only else name, used), []).append(layer)
    for (name, used), found in wrong.items():
        yield Finding(
            "precision not as planned",
            f"{name} was planned and {used} is used: {counted(found)}",
            "check that Q/DQ or Cast stands right at the layer's inputs, and that the engine has a kernel for it there",
            "a layer that falls back is as slow as before and has lost quality all the same",
            tuple(found),
        )
    if absent := [pattern for pattern in wanted if pattern not in met]:
        yield Finding(
            "planned layers not found",
            f"no layer fits what was planned: {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}",
            "compare with the module names of the card; names of exporter and plan have to agree",
            "a pattern that fits nothing quantises nothing",
            (),
        )


def between_quantised(layers: EngineLayers) -> Iterator[Finding]:
    """Conversions on the way from one quantised product to the next."""
    table, edges = layers.layers, layers.edges
    found = []
    for place, layer in enumerate(table):
        if layer.kind not in CONVERSIONS or (layers.source == "onnx" and layer.kind == "quantize"):
            continue
        sides = [_nearest_products(table, neighbours, place) for neighbours in (edges.before, edges.after)]
        if all(any(table[i].precision in CODES for i in side) for side in sides):
            found.append(layer)
    if found:
        yield Finding(
            "conversions between quantised layers",
            f"conversions stand between quantised layers: {counted(found)}",
            "give both layers one scale and one format, so that codes pass from one to the next",
            "each writes and reads the activation once more, often more than quantising saved",
            tuple(found),
            sum(layer.activation_bytes for layer in found),
        )


def left_quantisers(layers: EngineLayers) -> Iterator[Finding]:
    """Q/DQ nodes that the engine runs as layers instead of taking them into products."""
    if layers.source == "onnx":
        return
    left = [layer for layer in layers.layers if layer.kind == "quantize"]
    weights = tuple(layer for layer in left if layer.inputs and layer.inputs[0].constant)
    others = tuple(layer for layer in left if layer not in weights)
    if others:
        yield Finding(
            "Q/DQ not fused",
            f"quantising and dequantising are layers of their own: {counted(others)}",
            "place Q/DQ right before the product it belongs to, in a type that the engine has a kernel for",
            "without a quantised kernel behind it, quantising only adds work",
            others,
            sum(layer.activation_bytes for layer in others),
        )
    if weights:
        size = sum(layer.activation_bytes for layer in weights)
        yield Finding(
            "weights dequantised at run time",
            f"weights become {mib(size)} of floats at every run: {counted(weights)}",
            "use an engine with a kernel that reads the codes, or keep these weights in 16 bits",
            "memory is saved on disk only, and every run pays for the conversion",
            weights,
            size,
        )


def islands(layers: EngineLayers) -> Iterator[Finding]:
    """Float32 layers in an engine whose products are narrower."""
    products = Counter(
        layer.precision for layer in layers.layers if layer.kind in PRODUCTS and layer.precision
    )
    if not products:
        return
    usual = products.most_common(1)[0][0]
    if ITEM_BYTES.get(usual, 4.0) >= ITEM_BYTES["fp32"]:
        return
    found = tuple(
        layer
        for layer in layers.layers
        if layer.precision in ("fp32", "fp64") and layer.kind not in (*CONVERSIONS, "shape", "sync")
    )
    if not found:
        return
    slow = [layer for layer in found if layer.kind in PRODUCTS]
    yield Finding(
        "FP32 islands",
        f"FP32 layers in an engine whose products are {usual.upper()}: {counted(found)}; products among them: {len(slow)}",
        "give products the engine's format; keep norms, modulation and timestep embedding as the library keeps them",
        "Wan keeps norms and modulation in FP32 on purpose; a product there runs at a fraction of the speed",
        found,
        sum(layer.activation_bytes for layer in found),
    )


def conversions(layers: EngineLayers, minimum_percent: float) -> Iterator[Finding]:
    """Changes of dtype, layout or place of activations, where they take a share of the time that is worth having."""
    found = tuple(
        layer
        for layer in layers.layers
        if layer.kind in CONVERSIONS
        and layer.kind != "quantize"  # has a finding of its own
        and not (layer.inputs and all(tensor.constant for tensor in layer.inputs))
        and any(
            tensor.dtype in FLOATS or tensor.dtype in CODES or not tensor.dtype for tensor in layer.outputs
        )
    )
    if not found:
        return
    time_ms, whole_ms = total_ms(found), layers.total_ms
    share = 100 * time_ms / whole_ms if whole_ms else math.nan
    if layers.timed and not share >= minimum_percent:
        return
    taken = f" take {share:.1f} % of the time" if layers.timed else ""
    yield Finding(
        "conversions",
        f"conversions of dtype or layout{taken}: {counted(found)}",
        "make neighbours agree on dtype and layout: cast once at the input, keep islands of other formats together",
        "a conversion computes nothing; it reads and writes an activation",
        found,
        sum(layer.activation_bytes for layer in found),
    )


def _nearest_products(table: tuple[Layer, ...], neighbours: list[list[int]], place: int) -> set[int]:
    near, found = {place}, set()
    for _ in range(_HOPS + 1):
        near = {j for i in near for j in neighbours[i]}
        found |= {i for i in near if table[i].kind in PRODUCTS}
        near -= found
    return found


def _format(name: str) -> tuple[str, bool]:
    """Format as tensors have it, and whether it is of the weights alone: `"int4-weight-64"` -> `("int4", True)`."""
    plain, weight, _ = str(name).lower().partition("-weight")
    plain = _ALIASES.get(plain, plain)
    if plain not in ITEM_BYTES:
        known = [*FLOATS, *CODES, "int8-weight", "int4-weight"]
        raise WanlabError(f"no format {name!r}{did_you_mean(str(name), known)}; give {', '.join(known)}")
    return plain, bool(weight)
