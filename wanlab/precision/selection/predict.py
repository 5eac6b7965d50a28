"""What any plan is predicted to do, by the same tables that plans are chosen with: presets beside the frontier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from wanlab.precision.plans.assignment import assign
from wanlab.precision.plans.plan import Plan, is_float
from wanlab.precision.selection.costs import COUNTED, DEFAULT
from wanlab.precision.selection.problem import branches_of, table_of

if TYPE_CHECKING:
    import pandas as pd


def predict(
    model, plans: Iterable[Plan], sensitivity, costs: pd.DataFrame, *, objective: str = "memory"
) -> pd.DataFrame:
    """Predicted effect and cost of plans.

    Layers that the sensitivity does not know (embedders, output) and formats that were not measured count nothing, so the
    effect of such a plan is at least what is said; `unknown_layers` counts them.

    Args:
        model: that the plans are for.
        plans: presets, files read by `load_plan`, selections' plans.

    Returns:
        DataFrame: plan, effect, unknown_layers, cost (of the layers that the sensitivity knows, as `Selection.cost`), unit,
        saved_percent (of it), bits_per_weight, share_8bit_percent (of all linear weights).
    """
    import pandas as pd

    effects = table_of(sensitivity)
    ranges = effects.drop_duplicates(["component", "layer", "first_step"])
    ranges = ranges[["component", "layer", "first_step", "last_step"]]
    known = effects.set_index(["component", "layer", "format", "first_step"])["effect"]
    held = costs.set_index(["component", "layer", "format"])
    layers = set(zip(effects["component"], effects["layer"], strict=True))
    calls = branches_of(sensitivity)
    memory = objective == "memory"
    unit = "bytes" if memory else "GFLOP (counted)" if (costs["source"] == COUNTED).all() else "ms"
    column = {"bytes": "size_bytes", "ms": "time_ms"}.get(unit, "work_gflop")
    rows = []
    for plan in plans:
        assignment = assign(plan, model)
        frame = assignment.frame[assignment.frame["kind"] == "Linear"]
        default = assignment.default
        wanted = frame.assign(
            format=[DEFAULT if is_float(f) and f == default else f for f in frame["format"]]
        )
        effect, cost, before, unknown, size, weights = 0.0, 0.0, 0.0, set(), 0.0, 0
        for (component, layer), own in wanted.groupby(["component", "layer"], sort=False):
            whole = held.loc[(component, layer, DEFAULT)]
            weights += int(whole["weights"])
            formats = list(dict.fromkeys(own["format"]))
            costed = [f if (component, layer, f) in held.index else DEFAULT for f in formats]
            if costed != formats:
                unknown.add((component, layer))
            size += sum(float(held.loc[(component, layer, f), "size_bytes"]) for f in costed)
            if (component, layer) not in layers:
                if formats != [DEFAULT]:
                    unknown.add((component, layer))
                continue
            if memory:
                cost += sum(float(held.loc[(component, layer, f), column]) for f in costed)
                before += float(whole[column])
            for band in ranges[(ranges["component"] == component) & (ranges["layer"] == layer)].itertuples():
                for format, share in _shares(own, band.first_step, band.last_step):
                    if format != DEFAULT and (component, layer, format, band.first_step) in known.index:
                        effect += share * float(known[(component, layer, format, band.first_step)])
                    elif format != DEFAULT:
                        unknown.add((component, layer))
                    if not memory:
                        spent = calls * (band.last_step - band.first_step + 1)
                        named = format if (component, layer, format) in held.index else DEFAULT
                        cost += share * spent * float(held.loc[(component, layer, named), column])
                        before += share * spent * float(whole[column])
        rows.append(
            {
                "plan": plan.name,
                "effect": effect,
                "unknown_layers": len(unknown),
                "cost": cost,
                "unit": unit,
                "saved_percent": 100 * (1 - cost / before),
                "bits_per_weight": 8 * size / weights,
                "share_8bit_percent": 100 * assignment.share(8),
            }
        )
    return pd.DataFrame(rows)


def _shares(own: pd.DataFrame, first: int, last: int):
    """Formats of a layer within a range of steps, each with the share of the range's steps."""
    import pandas as pd

    for row in own.itertuples():
        begin = 0 if pd.isna(row.first_step) else int(row.first_step)
        end = last if pd.isna(row.last_step) else int(row.last_step)
        common = min(end, last) - max(begin, first) + 1
        if common > 0:
            yield row.format, common / (last - first + 1)
