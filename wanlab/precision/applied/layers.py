"""Layers of a network replaced by those a plan asks for, with a record of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wanlab.precision.formats import get_format
from wanlab.precision.plans.assignment import Assignment
from wanlab.precision.plans.plan import FLOATS, KEEP, is_float

if TYPE_CHECKING:
    import pandas as pd

AS_LOADED = "as-loaded"


def asked(assignment: Assignment, component: str) -> pd.DataFrame:
    """Rows of the assignment, with `wanted`: the format, or `"as-loaded"` where no rule gives another than the network's.

    Layers that a network keeps in float32 (the timestep's) stay so unless a rule names them.
    """
    import pandas as pd

    rows = assignment.frame[assignment.frame["component"] == component]

    def wanted(row) -> str:
        kept = pd.isna(row.rule) or assignment.plan.rules[int(row.rule)].format == KEEP
        return AS_LOADED if kept else row.format

    return rows.assign(wanted=[wanted(row) for row in rows.itertuples()])


def replace_layers(
    network, component: str, assignment: Assignment, ranges, native: bool, clock
) -> list[dict]:
    """Put planned layers into a network; a record of every layer."""
    from wanlab.precision.applied.steps import SteppedLayer, spell

    records = []
    for layer, rows in asked(assignment, component).groupby("layer", sort=False):
        original = network.get_submodule(layer)
        variants = {}
        for row in rows.itertuples():
            if row.wanted not in variants:
                variants[row.wanted] = _variant(original, row.wanted, layer, ranges, native)
            amax = None if ranges is None else ranges.get(layer)
            records.append(_record(row, original, variants[row.wanted], amax))
        if rows["first_step"].notna().any():
            by_band = {
                spell(band): next(
                    r.wanted for r in rows.itertuples() if r.first_step <= band[0] <= r.last_step
                )
                for band in clock.bands
            }
            made = SteppedLayer(variants, by_band, clock)
        else:
            made = next(iter(variants.values()))
        if made is not original:
            parent, _, name = layer.rpartition(".")
            # Kept where numbers are names, as in a Sequential.
            setattr(network.get_submodule(parent), name, made)
    return records


def _variant(original, wanted: str, layer: str, ranges, native: bool):
    import torch

    from wanlab.precision.applied.linears import FloatIsland, planned

    if wanted == AS_LOADED:
        return original
    if is_float(wanted):
        dtype = getattr(torch, FLOATS[wanted])
        return original if original.weight.dtype == dtype else FloatIsland(original, wanted, dtype)
    format = get_format(wanted)
    amax = ranges[layer] if ranges is not None and format.activation is not None else None
    return planned(original, format, native=native, amax=amax)


def _record(row, original, made, amax: float | None) -> dict[str, Any]:
    from wanlab.precision.applied.linears import FEWEST_ROWS, INTEGER

    before = original.weight
    same = made is original
    scaling = "" if same else made.scaling
    return {
        "component": row.component,
        "layer": row.layer,
        "kind": row.kind,
        "format": row.format,
        "first_step": row.first_step,
        "last_step": row.last_step,
        "kernel": "as loaded" if same else made.kernel,
        "input": scaling,
        "input_amax": amax if scaling == "static" else None,
        "note": f"decoded for fewer than {FEWEST_ROWS} rows" if not same and made.kernel == INTEGER else "",
        "weight_before_bytes": before.nbytes,  # replaced where the network was cast
        "weight_bytes": before.nbytes if same else held_bytes(made),
        "weight_error_percent": 0.0 if same else _distance(before, made.decoded()),
    }


def held_bytes(layer) -> int:
    """Bytes of a layer's weight as it is held: codes and scales, or a float; without bias and input scale."""
    named = {**layer._parameters, **layer._buffers}
    return sum(t.nbytes for name, t in named.items() if t is not None and name not in ("bias", "input_scale"))


def _distance(before, after) -> float:
    before = before.detach().float()
    size = before.norm()
    return float(100 * (after.float() - before).norm() / size) if size > 0 else 0.0
