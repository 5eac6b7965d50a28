"""Plans selected by time for one expert: the fastest there is, and the fastest at half the effect of uniform FP8."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from msgspec.structs import replace

from wanlab.precision.calibration import calibrate
from wanlab.precision.plan import Plan, load_plan, save_plan
from wanlab.precision.recording import random_recording
from wanlab.precision.selection.bound import predict
from wanlab.precision.selection.costs import layer_costs
from wanlab.precision.selection.select import select_plan
from wanlab.precision.sensitivity.measure import sensitivity

FORMATS = ("fp8", "fp8-channel", "int8")
PRESETS = ("uniform-fp8", "ffn-fp8")
"""Predicted beside them; the second plan has at most half the effect of the first of these."""
SMALL = {"height": 256, "width": 448, "frames": 17}
"""Of the clip that effects are measured on where the model's own is larger: a gradient needs several times the memory."""


@dataclass(frozen=True, eq=False)
class PlansByTime:
    """Plans selected by time.

    Attributes:
        plans: name -> plan, the fastest first; one where it has so small an effect already.
        selected: a row per plan, as `Selection.row`: its cost, effect and shares.
        predicted: cost and effect of the presets beside them, from `predict`.
        effects: sum of effects by projection and format.
        costs: sum of costs by projection, format, source (`"measured"` or `"counted"`) and kernel.
    """

    plans: dict[str, Plan]
    selected: pd.DataFrame
    predicted: pd.DataFrame
    effects: pd.DataFrame
    costs: pd.DataFrame

    def save(self, folder: str | os.PathLike) -> list[Path]:
        """Write every plan as `NAME.yaml`."""
        return [save_plan(plan, Path(folder) / f"{name}.yaml") for name, plan in self.plans.items()]


def plans_by_time(
    model,
    component: str,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    formats: Sequence[str] = FORMATS,
    small: Mapping[str, int] | None = None,
    steps: int = 8,
    calls: int = 2,
    probes: int = 2,
    name: str = "",
    progress: bool = True,
) -> PlansByTime:
    """Select two plans for one expert by time, one format per projection so that all blocks are one kind.

    `layer_costs` times every shape of a linear layer in every format as compiled blocks run it (on a CPU it counts, and
    the note of the plans says so); `sensitivity` says on random inputs of a small clip how far each layer's rounding moves
    the latents. Random weights have no quality to lose: effects only weigh layers against each other.

    Args:
        model: from `wanlab.models.load`, the expert as loaded.
        height, width, frames: of the video that is to be fast; the model's default if not given.
        formats: to choose from, beside the model's own.
        small: height, width and frames of the clip that effects are measured on; the smaller of the video and `SMALL` if
            not given.
        steps, calls, probes: of the sensitivity.
        name: begins the names of the plans; the model's name if not given.
        progress: show bars.
    """
    defaults = model.spec.defaults
    asked = {"height": height, "width": width, "frames": frames}
    size: dict[str, Any] = {
        key: getattr(defaults, key) if value is None else value for key, value in asked.items()
    }
    if small is None:
        small = SMALL if size["height"] * size["width"] > SMALL["height"] * SMALL["width"] else size
    with tempfile.TemporaryDirectory(prefix="wanlab-by-time-") as folder:
        recording = random_recording(model, component, folder, steps=steps, **small)
        ranges = {component: calibrate(model, component, recording, progress=progress)}
        measured = sensitivity(
            model, recording, ranges, formats=formats, calls=calls, probes=probes, progress=progress
        ).with_bands(1)
    costs = layer_costs(model, formats, progress=progress, **size)
    presets = [load_plan(each) for each in PRESETS]
    predicted = predict(model, presets, measured, costs, objective="time")
    limit = float(predicted.set_index("plan").loc[PRESETS[0], "effect"]) / 2
    plans: dict[str, Plan] = {}
    rows: list[dict[str, Any]] = []
    for kind, budget in (("fastest", None), ("half-effect", limit)):
        selection = select_plan(
            measured,
            costs,
            objective="time",
            budget=budget,
            group="projection",
            name=f"{name or model.spec.name}-{kind}",
        )
        if selection.plan.hash in {plan.hash for plan in plans.values()}:
            continue  # the fastest has so small an effect already
        note = f"selected by time for {model.spec.name} {component} at {size['height']}x{size['width']}x{size['frames']}"
        note += " from costs of compiled layers" if selection.unit == "ms" else f", {selection.unit}"
        plans[selection.plan.name] = replace(selection.plan, note=note)
        rows.append(selection.row())
    keys = ["projection", "format", "source", "kernel"]
    effects = measured.frame.pivot_table("effect", "projection", "format", "sum")
    return PlansByTime(
        plans,
        pd.DataFrame(rows),
        predicted,
        effects.reset_index().rename_axis(columns=None),
        costs.groupby(keys, as_index=False, dropna=False)[["time_ms", "work_gflop"]].sum(min_count=1),
    )
