"""Amdahl's bound of a plan, its predicted effect and cost, and the cost of searching for it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from wanlab.core.errors import WanlabError
from wanlab.diagnose.breakdown import breakdown
from wanlab.diagnose.capture import capture
from wanlab.diagnose.trace import read_trace
from wanlab.models.pipeline import Model
from wanlab.precision.apply import AS_LOADED
from wanlab.precision.assignment import assign
from wanlab.precision.plan import Plan, is_float, load_plan
from wanlab.precision.recording import Example, Recording
from wanlab.precision.selection.costs import COUNTED, DEFAULT, counted_only
from wanlab.precision.selection.solve import branches_of, table_of


def measured_bound(
    model: Model, costs: pd.DataFrame, image: Any, prompt: str, folder: str | os.PathLike, **settings: Any
) -> AmdahlBound:
    """`amdahl_bound`, with the share of linear layers from a profile of one generation.

    Args:
        costs: table of `layer_costs`. image, prompt, settings: arguments of `Model.generate`; a model that takes no picture
            leaves it out, and one that needs more inputs gets the frames of a held-out clip.
        folder: folder for the trace.
    """
    inputs = Example(image, prompt, adapts=True).inputs(model, settings.get("frames"))
    shares = breakdown(read_trace(capture(model, prompt=prompt, folder=folder, **inputs | settings)))
    size = {name: settings.get(name) for name in ("height", "width", "frames")}
    schedule = model.schedule(settings.get("steps"), **size)
    return amdahl_bound(costs, shares, schedule=schedule["component"])


HAND_PICKED = ("uniform-int8", "uniform-fp8-channel", "ffn-int8", "uniform-int8-weight")
"""Presets that figures show beside a chosen plan."""


def predict(
    model, plans: Iterable[Plan], sensitivity, costs: pd.DataFrame, *, objective: str = "memory"
) -> pd.DataFrame:
    """Predicted effect and cost of plans.

    Layers that were not measured (embedders, output) and formats that were not measured add nothing, so the effect of such a
    plan is at least the predicted one; `unknown_layers` is the number of these layers.

    Args:
        model: model that the plans are for.
        plans: presets, plans of files read by `load_plan`, or of selections.

    Returns:
        DataFrame: plan, effect, unknown_layers, cost (of the layers that the sensitivity knows, as `Selection.cost`), unit,
        saved_percent (of it), bits_per_weight, share_8bit_percent (of all linear weights).
    """
    effects = table_of(sensitivity)
    ranges = effects.drop_duplicates(["component", "layer", "first_step"])
    ranges = ranges[["component", "layer", "first_step", "last_step"]]
    known = effects.set_index(["component", "layer", "format", "first_step"])["effect"]
    costs_of = costs.set_index(["component", "layer", "format"])
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
        planned = frame.assign(
            format=[DEFAULT if is_float(f) and f == default else f for f in frame["format"]]
        )
        effect, cost, before, unknown, size, weights = 0.0, 0.0, 0.0, set(), 0.0, 0
        for (component, layer), own in planned.groupby(["component", "layer"], sort=False):
            whole = costs_of.loc[(component, layer, DEFAULT)]
            weights += int(whole["weights"])
            formats = list(dict.fromkeys(own["format"]))
            costed = [f if (component, layer, f) in costs_of.index else DEFAULT for f in formats]
            if costed != formats:
                unknown.add((component, layer))
            size += sum(float(costs_of.loc[(component, layer, f), "size_bytes"]) for f in costed)
            if (component, layer) not in layers:
                if formats != [DEFAULT]:
                    unknown.add((component, layer))
                continue
            if memory:
                cost += sum(float(costs_of.loc[(component, layer, f), column]) for f in costed)
                before += float(whole[column])
            for band in ranges[(ranges["component"] == component) & (ranges["layer"] == layer)].itertuples():
                for format, share in _shares(own, band.first_step, band.last_step):
                    if format != DEFAULT and (component, layer, format, band.first_step) in known.index:
                        effect += share * float(known[(component, layer, format, band.first_step)])
                    elif format != DEFAULT:
                        unknown.add((component, layer))
                    if not memory:
                        spent = calls * (band.last_step - band.first_step + 1)
                        named = format if (component, layer, format) in costs_of.index else DEFAULT
                        cost += share * spent * float(costs_of.loc[(component, layer, named), column])
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


def effect_ceiling(
    predicted: pd.DataFrame, plans: Sequence[str | os.PathLike], headroom: float | None
) -> float | None:
    """Limit of the predicted effect below which a plan is better than some plans picked by hand.

    Args:
        predicted: table of `predict`. plans: presets or files in it.
        headroom: limit as a share of the least effect of these plans; None sets no limit.

    Raises:
        WanlabError: none of these plans was predicted.
    """
    if headroom is None:
        return None
    names = {load_plan(plan).name for plan in plans}
    effects = predicted.loc[predicted["plan"].isin(names), "effect"]
    if not len(effects):
        raise WanlabError(
            "headroom is a share of the effect of plans picked by hand; name some to compare with"
        )
    return headroom * float(effects.min())


def _shares(own: pd.DataFrame, first: int, last: int):
    """Formats of a layer within a range of steps, each with the share of the range's steps."""
    for row in own.itertuples():
        begin = 0 if pd.isna(row.first_step) else int(row.first_step)
        end = last if pd.isna(row.last_step) else int(row.last_step)
        common = min(end, last) - max(begin, first) + 1
        if common > 0:
            yield row.format, common / (last - first + 1)


@dataclass(frozen=True)
class AmdahlBound:
    """Amdahl's bound on precision (AFIPS 1967): only linear layers of experts become faster.

    Attributes:
        share_percent: share of a generation's time that they take. source: origin of that share.
        infinite: speed-up of the generation if they took no time.
        format: format in which their total time is least. rate: ratio of their time as loaded to that in this format.
        at_format: speed-up of the generation if all of them were in it.
        counted: whether the rate is of counted operations and nominal rates, as nothing was timed.
    """

    share_percent: float
    source: str
    infinite: float
    format: str
    rate: float
    at_format: float
    counted: bool

    def of(self, rate: float) -> float:
        """Speed-up of the generation where the linear layers are `rate` times as fast."""
        return speedup(self.share_percent, rate)

    def row(self) -> dict[str, Any]:
        """One table row."""
        return asdict(self)

    def __str__(self) -> str:
        how = "by nominal rates, counted and not timed" if self.counted else "as timed here"
        return (
            f"linear layers of the experts take {self.share_percent:.1f} % of a generation ({self.source}): without them"
            f" it would be {self.infinite:.2f}x as fast, with all of them in {self.format} {self.at_format:.2f}x (they alone"
            f" {self.rate:.2f}x, {how})"
        )


def amdahl_bound(costs: pd.DataFrame, share: Any, *, schedule: Any = None) -> AmdahlBound:
    """The bound of any plan, from the share of linear layers and what they cost in each format.

    Args:
        costs: table of `layer_costs`.
        share: share of linear layers in a generation, in percent; or a `Breakdown` of one (`wanlab.diagnose.breakdown`), of
            which the rows of linear layers in experts are taken.
        schedule: components of the steps (`model.schedule(steps)["component"]`); experts count alike if not given.

    Raises:
        WanlabError: a share outside 0 to 100, or no format to compare.
    """
    if hasattr(share, "parts"):
        parts = share.parts
        experts = parts["component"].astype(str).str.startswith("expert")
        rows = parts[experts & (parts["category"] == "linear")]
        percent, source = 100 * float(rows["time_ms"].sum()) / share.wall_ms, "from a profile"
    else:
        percent, source = float(share), "as given"
    if not 0 <= percent <= 100:
        raise WanlabError(f"a share is 0 to 100 %, not {percent:.4g} %")
    counted = counted_only(costs)
    calls = dict.fromkeys(costs["component"], 1) if schedule is None else dict(_called(schedule))
    spent = costs.assign(
        spent=costs["work_gflop" if counted else "time_ms"] * costs["component"].map(calls).fillna(0)
    )
    default = spent[spent["format"] == DEFAULT].set_index(["component", "layer"])["spent"]
    rates = {}
    for name in dict.fromkeys(spent.loc[spent["format"] != DEFAULT, "format"]):
        own = spent[spent["format"] == name].set_index(["component", "layer"])["spent"]
        # Layers that cannot be in the format stay as they are.
        rates[name] = float(default.sum() / own.reindex(default.index).fillna(default).sum())
    if not rates:
        raise WanlabError(
            "these costs have no format but the default; name some in layer_costs(model, formats)"
        )
    best = max(rates, key=lambda name: rates[name])
    infinite = speedup(percent, float("inf"))
    return AmdahlBound(percent, source, infinite, best, rates[best], speedup(percent, rates[best]), counted)


def speedup(share_percent: float, rate: float) -> float:
    """Speed-up of the whole where a share of it becomes `rate` times as fast."""
    left = 1 - share_percent / 100 + (share_percent / 100 / rate if rate != float("inf") else 0)
    return float("inf") if left <= 0 else 1 / left


def _called(schedule: Any) -> dict[str, int]:
    """Component -> number of its calls."""
    return Counter(str(name) for name in schedule)


def product_bound(
    products: pd.DataFrame, formats: Mapping[str, str], linear_share_percent: float
) -> dict[str, Any] | None:
    """Amdahl's bound of a plan: its linear layers at the measured rate of their products, all else as in the baseline.

    Args:
        products: table of `product_times`.
        formats: layer -> format whose codes it multiplies.
        linear_share_percent: share of the baseline's time that its matrix products take.

    Returns:
        bound_speedup, planned_percent (share of the time of all products that the plan changes), product_speedup (of these);
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
    remaining = 1 - linear_share_percent / 100 * saved / before
    return {
        "bound_speedup": 1 / remaining if remaining > 0 else float("inf"),
        "planned_percent": 100 * own / before,
        "product_speedup": own / (own - saved),
    }


@dataclass(frozen=True)
class SearchCost:
    """Expert forwards that the search for a plan took, beside those of brute force.

    Attributes:
        recording, sensitivity, generations: forwards of recording and calibration, of the sensitivity (gradients as two
            forwards each, products of layers by their share of one), and of generations for verification.
        brute_force: layers x formats x cases x calls of a generation, and the originals: every layer in every format by
            itself measured end to end on the same cases.
        formula: the same in words.
    """

    recording: float
    sensitivity: float
    generations: float
    brute_force: float
    formula: str

    @property
    def forwards(self) -> float:
        return self.recording + self.sensitivity + self.generations

    @property
    def percent(self) -> float:
        return 100 * self.forwards / self.brute_force

    def row(self) -> dict[str, Any]:
        """One table row."""
        return {
            "recording_forwards": self.recording,
            "sensitivity_forwards": self.sensitivity,
            "generation_forwards": self.generations,
            "forwards": self.forwards,
            "brute_force_forwards": self.brute_force,
            "percent_of_brute_force": self.percent,
            "formula": self.formula,
        }

    def __str__(self) -> str:
        brute = f"{self.formula} = {self.brute_force:,.0f}"
        return f"{self.forwards:,.0f} forwards, {self.percent:.1f} % of brute force ({brute})"


def search_cost(
    sensitivity, recording: Recording | None, originals, generations: int, *, calibrated: bool = True
) -> SearchCost:
    """The cost of a search.

    Args:
        sensitivity: `Sensitivity`. recording: recording that was made for it; None where it existed.
        originals: originals from `make_originals`; their forwards count too.
        generations: number of cases generated with plans, decoded or not.
        calibrated: whether calibration passed the recording once more.
    """
    frame = sensitivity.frame
    layers = len(frame.drop_duplicates(["component", "layer"]))
    formats = frame["format"].nunique()
    cases, calls = len(originals.outputs), originals.batched.calls
    recorded = len(recording.calls) * (1 + calibrated) if recording is not None else 0
    brute = (layers * formats + 1) * cases * calls
    return SearchCost(
        recording=recorded,
        sensitivity=float(sensitivity.costs()["forward_equivalents"].iloc[0]),
        generations=originals.forwards + generations * calls,
        brute_force=brute,
        formula=f"({layers} layers x {formats} formats + 1) x {cases} cases x {calls} calls",
    )
