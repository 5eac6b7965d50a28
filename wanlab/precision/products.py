"""Products of linear layers timed alone, in their own float and on codes; what a plan can save with them at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch.nn.functional import linear

from wanlab.measure.timing import time_ms
from wanlab.precision.apply import AS_LOADED
from wanlab.precision.formats import get_format
from wanlab.precision.plan import is_float
from wanlab.precision.quant_linear import DECODED, FEWEST_ROWS, INTEGER, SIMULATED, kernel_for, scaled_mm

COLUMNS = ["rows", "inputs", "outputs", "dtype", "format", "layers", "time_ms", "tflop_per_s"]


def product_times(
    layers: Mapping[str, tuple[int, torch.nn.Linear]], formats: Sequence[str], *, iterations: int = 5
) -> pd.DataFrame:
    """Every distinct shape of a linear layer: its product alone, without the rounding of its input.

    Args:
        layers: name -> rows of its input in one call, and the layer.
        formats: to add to the layer's own float. One whose products are not computed on codes here (weight-only formats,
            simulated ones, too few rows) is left out.
        iterations: samples of each.

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
        calls = {AS_LOADED: lambda a=values, b=weight: linear(a, b)}
        calls |= {name: _on_codes(name, values, weight) for name in formats}
        for name, call in calls.items():
            if call is None:
                continue
            with torch.no_grad():
                taken = time_ms(call, warmup=2, iterations=iterations, device=device, progress=False).median
            speed = 2 * rows * inputs * outputs / taken / 1e9 if taken > 0 else float("nan")
            kind = str(dtype).removeprefix("torch.")
            records.append((rows, inputs, outputs, kind, name, tuple(names), taken, speed))
    return pd.DataFrame(records, columns=COLUMNS)


def _on_codes(name: str, values: torch.Tensor, weight: torch.Tensor):
    """A call of the product on codes; None where there is none on this device."""
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


def product_bound(
    products: pd.DataFrame, formats: Mapping[str, str], linear_share_percent: float
) -> dict[str, Any] | None:
    """Amdahl's bound of a plan: its linear layers at the measured rate of their products, all else as in the baseline.

    Args:
        products: from `product_times`.
        formats: layer -> format whose codes it multiplies.
        linear_share_percent: of the baseline's time that its matrix products take.

    Returns:
        bound_speedup, planned_percent (of the time of all products, that the plan changes), product_speedup (of those);
        None where none of the layers was timed in its format.
    """
    times = {(layer, row.format): row.time_ms for row in products.itertuples() for layer in row.layers}
    before = sum(time for (_, name), time in times.items() if name == AS_LOADED)
    planned = {
        layer: (times[layer, AS_LOADED], times[layer, name])
        for layer, name in formats.items()
        if (layer, name) in times
    }
    if not planned or not before:
        return None
    own = sum(first for first, _ in planned.values())
    saved = own - sum(second for _, second in planned.values())
    rest = 1 - linear_share_percent / 100 * saved / before
    return {
        "bound_speedup": 1 / rest if rest > 0 else float("inf"),
        "planned_percent": 100 * own / before,
        "product_speedup": own / (own - saved),
    }
