"""Cost of every linear layer in every format: measured where the device has its kernel, else counted and marked so."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch.nn.functional import linear
from tqdm.auto import tqdm

from wanlab.core.errors import WanlabError
from wanlab.measure.timing import time_ms
from wanlab.models.shapes import latent_shape
from wanlab.precision.apply import AS_LOADED, experts_of
from wanlab.precision.assignment import operations, quantizable_layers, weight_bits, weight_bytes
from wanlab.precision.formats import QuantFormat, check_blocks, get_format
from wanlab.precision.plan import is_float
from wanlab.precision.quant_linear import (
    DECODED,
    FEWEST_ROWS,
    INTEGER,
    SIMULATED,
    kernel_for,
    planned,
    scaled_mm,
)

DEFAULT = "default"
"""Format of a layer that stays as the model was loaded, as in plans."""

MEASURED, COUNTED = "measured", "counted"

VERSIONS = 4096

COLUMNS = [
    "component", "layer", "block", "projection", "format", "bits", "weights", "rows", "flop", "size_bytes",
    "source", "kernel", "time_ms", "cv_percent", "work_gflop",
]  # fmt: skip


PRODUCT_COLUMNS = ["rows", "inputs", "outputs", "dtype", "format", "layers", "time_ms", "tflop_per_s"]


def layer_costs(
    model,
    formats: Sequence[str | QuantFormat],
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    iterations: int = 20,
    measured: bool | None = None,
    compiled: bool | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Time, work and bytes of every linear layer of the experts, in every format and as it was loaded.

    On a GPU each distinct shape is timed once in each format, with the layer that `apply_plan` would put there: the time
    includes the rounding of its input. Layers of equal shape and rows share the sample. Uncompiled, that rounding is
    several passes over the input and takes more than an 8-bit product saves; compiled it is one, and inside a compiled
    block it is fused with what comes before, so a plan chosen by compiled costs is at least as fast as predicted. On a
    CPU, where products of codes are simulated, nothing is timed, and `work_gflop` is used instead: operations over the
    format's rate relative to a float's.

    Args:
        model: model from `wanlab.models.load`, its experts as loaded.
        formats: formats beside `"default"`; a layer whose inputs are no multiple of a format's block has no row in it.
        height, width, frames: size of the video; the model's default if not given.
        iterations: number of samples per shape and format.
        measured: whether costs are timed; None does so on CUDA.
        compiled: whether layers are timed with torch.compile, as in compiled blocks; None does so on CUDA.

    Returns:
        DataFrame: component, layer, block, projection, format, bits (of a weight), weights (elements), rows (of the input in
        a forward of batch 1), flop, size_bytes (scales included), source (`"measured"` or `"counted"`), kernel, time_ms and
        cv_percent (NaN where counted), work_gflop.

    Raises:
        WanlabError: an unknown format, a size that is not legal, an expert with a plan or on an engine.
    """
    defaults = model.spec.defaults
    size = (height or defaults.height, width or defaults.width, frames or defaults.frames)
    tokens = latent_shape(model.spec, *size).tokens
    known = [get_format(each) for each in formats if each != DEFAULT]
    measured = model.device.type == "cuda" if measured is None else measured
    compiled = model.device.type == "cuda" if compiled is None else compiled
    rows = []
    for component, network in experts_of(model).items():
        layers = quantizable_layers(network)
        for layer in layers[layers["kind"] == "Linear"].to_dict("records"):
            weight = network.get_submodule(layer["layer"]).weight
            flop = operations(layer["layer"], layer["shape"], tokens, defaults.text_tokens)
            for each in (None, *known):
                if each is None or _fits(layer["shape"], each):
                    rows.append(_row(component, layer, weight, flop, each))
    keys = list(dict.fromkeys((row["shape"], row["rows"], row["dtype"], row["format"]) for row in rows))
    timed: dict[tuple, dict[str, Any]] = {}
    for key in (
        tqdm(keys, desc="layer costs", unit="shape", leave=False, disable=not (progress and measured))
        if measured
        else ()
    ):
        timed[key] = _time(key, {each.name: each for each in known}, model.device, iterations, compiled)
    for row in rows:
        key = (row.pop("shape"), row["rows"], row.pop("dtype"), row["format"])
        row |= timed.get(key, {"source": COUNTED, "kernel": "", "time_ms": math.nan, "cv_percent": math.nan})
    return pd.DataFrame(rows, columns=COLUMNS).astype({"block": "Int64"})


def counted_only(costs: pd.DataFrame) -> bool:
    """Whether nothing in these costs was timed."""
    return bool((costs["source"] == COUNTED).all())


def _fits(shape: tuple[int, ...], format: QuantFormat) -> bool:
    try:
        check_blocks(tuple(shape), format.weight)
    except WanlabError:
        return False
    return True


def _row(
    component: str, layer: dict, weight: torch.Tensor, flop: int, format: QuantFormat | None
) -> dict[str, Any]:
    shape = tuple(layer["shape"])
    weights = math.prod(shape)
    if format is None:
        bits, size_bytes, faster = 8 * weight.itemsize, weight.nbytes, 1.0
    else:
        bits, size_bytes = weight_bits(format.name), weight_bytes(shape, format.name, weight.itemsize)
        # Weight-only formats multiply floats: their rate is that of the network.
        faster = format.weight.codes.rate if format.activation is not None else 1.0
    return {
        "component": component,
        "layer": layer["layer"],
        "block": layer["block"],
        "projection": layer["projection"],
        "format": DEFAULT if format is None else format.name,
        "bits": bits,
        "weights": weights,
        "rows": flop // (2 * weights),
        "flop": flop,
        "size_bytes": size_bytes,
        "work_gflop": flop / 1e9 / faster,
        "shape": shape,
        "dtype": weight.dtype,
    }


def _time(
    key: tuple, formats: dict[str, QuantFormat], device, iterations: int, compiled: bool
) -> dict[str, Any]:
    """Time one layer of this shape on random input, as a plan would put it into the network."""
    (outputs, inputs), rows, dtype, name = key
    draw = torch.Generator(device).manual_seed(0)
    layer = torch.nn.Linear(inputs, outputs, device=device, dtype=dtype)
    values = torch.randn(1, rows, inputs, device=device, generator=draw).to(dtype)
    kernel = str(dtype).removeprefix("torch.")
    if name != DEFAULT:
        layer = planned(layer, formats[name], native=True, amax=float(values.abs().max()))
        kernel = layer.kernel
    if compiled:
        layer.compile(dynamic=False)
    # All layers share one forward: the limit is on its versions, of which every shape and format is one.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=VERSIONS):
        samples = time_ms(
            lambda: layer(values), warmup=3, iterations=iterations, device=device, progress=False, label=name
        )
    return {"source": MEASURED, "kernel": kernel, "time_ms": samples.median, "cv_percent": samples.cv_percent}


def cost_totals(costs: pd.DataFrame) -> pd.DataFrame:
    """Sums of `layer_costs` per format: format, source, and those of time_ms, work_gflop and size_bytes that are known."""
    sums = costs.groupby(["format", "source"], sort=False)[["time_ms", "work_gflop", "size_bytes"]]
    return sums.sum(min_count=1).reset_index().dropna(axis="columns").round(3)


def product_times(
    layers: Mapping[str, tuple[int, torch.nn.Linear]], formats: Sequence[str], *, iterations: int = 5
) -> pd.DataFrame:
    """Times of every distinct shape of a linear layer: its product alone, without the rounding of its input.

    Args:
        layers: name -> rows of its input in one call, and the layer.
        formats: formats beside the layer's own float. Those whose products are not computed on codes here (weight-only
            formats, simulated ones, too few rows) are left out.
        iterations: number of samples of each.

    Returns:
        A row per shape and format: rows, inputs, outputs, dtype, format (`"as-loaded"` for the float), layers (names),
        time_ms (median), tflop_per_s.
    """
    shapes: dict[tuple, list[str]] = {}
    for name, (rows, layer) in layers.items():
        weight = layer.weight
        shapes.setdefault((rows, *weight.shape, weight.dtype, weight.device), []).append(name)
    records = []
    for (rows, outputs, inputs, dtype, device), names in shapes.items():
        values = torch.randn(rows, inputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        calls: dict[str, Callable[..., Any] | None] = {AS_LOADED: lambda a=values, b=weight: linear(a, b)}
        calls |= {name: _on_codes(name, values, weight) for name in formats}
        for name, call in calls.items():
            if call is None:
                continue
            with torch.no_grad():
                median_ms = time_ms(
                    call, warmup=2, iterations=iterations, device=device, progress=False
                ).median
            speed = 2 * rows * inputs * outputs / median_ms / 1e9 if median_ms > 0 else float("nan")
            kind = str(dtype).removeprefix("torch.")
            records.append((rows, inputs, outputs, kind, name, tuple(names), median_ms, speed))
    return pd.DataFrame(records, columns=PRODUCT_COLUMNS)


def _on_codes(name: str, values: torch.Tensor, weight: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """A call of the product on codes; None where this device has none."""
    if is_float(name) or get_format(name).activation is None:
        return None
    rows, device = len(values), weight.device
    format = get_format(name)
    kernel = kernel_for(format, tuple(weight.shape), device, device.type == "cuda")
    if kernel in (DECODED, SIMULATED) or (kernel == INTEGER and rows < FEWEST_ROWS):
        return None
    if kernel == INTEGER:
        a, b = values.to(torch.int8), weight.to(torch.int8)
        return lambda: torch._int_mm(a, b.t())
    a, b = values.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    by_row = format.weight.granularity == "channel"
    step = torch.ones((rows, 1) if by_row else (), device=device)
    scale = torch.ones(len(weight) if by_row else (), device=device)
    return lambda: scaled_mm(a, step, b, scale, None, values.dtype)
