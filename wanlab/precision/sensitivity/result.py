"""The result of a sensitivity measurement: tables for any ranges of steps, with intervals."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from wanlab.core.errors import WanlabError
from wanlab.core.stats import (
    LEAST,
    draw_group_weights,
    draw_weights,
    percentile_interval,
    weighted_interval,
)
from wanlab.models.families.base import Family
from wanlab.precision.sensitivity.work import Cost, Part


def band_rows(
    parts: Sequence[Part], first: int, last: int, weights: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Rows of `Sensitivity.frame` of one component and range of steps."""
    picked = calls_between(parts, first, last)
    if not len(picked["velocity"]):
        return
    part = parts[0]
    local = np.sqrt(picked["local"].mean(axis=0))
    velocity = np.sqrt(picked["velocity"].mean(axis=0))
    low, high = weighted_interval(picked["velocity"], draw_weights(len(picked["velocity"])), np.sqrt)
    samples, groups = effect_samples(parts, first, last, weights)
    effect = samples.mean(axis=0)
    effect_low, effect_high = weighted_interval(samples, draw_group_weights(groups))
    for index, layer in enumerate(part.layers):
        block, projection = part.place(index)
        for column, format in enumerate(part.formats):
            at = (index, column)
            yield {
                "component": part.component,
                "layer": layer,
                "block": block,
                "projection": projection,
                "format": format,
                "first_step": first,
                "last_step": last,
                "local_error": float(local[at]),
                "velocity_error": float(velocity[at]),
                "low": float(low[at]),
                "high": float(high[at]),
                "effect": float(effect[at]),
                "effect_low": float(effect_low[at]),
                "effect_high": float(effect_high[at]),
                "parameters": part.parameters[index],
                "calls": len(picked["velocity"]),
            }


def calls_between(parts: Sequence[Part], first: int, last: int) -> dict[str, np.ndarray]:
    """`local` and `velocity` of the calls in a range of steps, `[calls, layers, formats]`."""
    rows_of: dict[str, list] = {"local": [], "velocity": []}
    for part in parts:
        inside = [i for i, call in enumerate(part.calls) if first <= call["step"] <= last]
        for name, rows in rows_of.items():
            rows.append(getattr(part, name)[inside])
    return {name: np.concatenate(rows) for name, rows in rows_of.items()}


def effect_samples(
    parts: Sequence[Part], first: int, last: int, weights: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Squared relative change of the final latents, once per example and direction.

    The changes by a layer in the calls of an example are added along each direction before they are squared. Where only
    some steps of a range were measured, they represent the others by the weights of the velocities.

    Returns:
        Samples `[samples, layers, formats]`, and the example of each sample.
    """
    sums: dict[int, Any] = {}
    steps: dict[int, set[int]] = {}
    coherent = all(part.coherent for part in parts)
    for part in parts:
        for call, paths in zip(part.calls, part.paths, strict=True):
            if first <= call["step"] <= last:
                example = call["example"]
                sums[example] = sums.get(example, 0.0) + (paths if coherent else paths**2)
                steps.setdefault(example, set()).add(call["step"])
    samples, groups = [], []
    size = np.abs(np.asarray(weights, dtype=np.float64)) ** (1 if coherent else 2)
    for example, total in sums.items():
        factor = size[first : last + 1].sum() / max(size[sorted(steps[example])].sum(), 1e-300)
        total = (total * factor) ** 2 if coherent else total * factor
        samples.append(np.moveaxis(total, -1, 0))
        groups += [example] * total.shape[-1]
    return np.concatenate(samples), np.array(groups)


COLUMNS = (
    "component", "layer", "block", "projection", "format", "first_step", "last_step", "local_error",
    "velocity_error", "low", "high", "effect", "effect_low", "effect_high", "parameters", "calls",
)  # fmt: skip


WAYS = {
    "probes": "Measured block by block, with directions carried back through all later steps.",
    "direct": "Measured block by block: every layer rounded alone from its block on; later steps do not react.",
    "plain": "Measured the plain way: every layer rounded alone in a forward of the whole network; later steps do not"
    " react.",
}
"""Method of a measurement -> how it measures."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Changes of velocities and final latents by the rounding of every layer.

    Attributes:
        settings: model, generation (settings of the recording), schedule (component of every step), weights (of every
            step's velocity in the final latents), formats, probes, calls, method, seed.
        parts: finished parts.
        bands: component -> ranges of steps, inclusive, one row each in `frame`.
        wanted: names of all units of work of the measurement; a shard has fewer.
        reused: number of units that were read from the folder.
    """

    settings: dict[str, Any]
    parts: tuple[Part, ...]
    bands: dict[str, list[tuple[int, int]]]
    wanted: tuple[str, ...] = ()
    reused: int = field(default=0, compare=False)

    @functools.cached_property
    def frame(self) -> pd.DataFrame:
        """One row per component, layer, format and range of steps.

        Columns: component, layer, block, projection, format, first_step, last_step, local_error (relative L2 of the
        layer's output, root mean square over calls), velocity_error (relative L2 of the velocity by this layer
        alone), low, high (its 95 % bootstrap interval over calls), effect (predicted squared L2 of the change of the
        final latents when this layer is rounded in these steps, over their own), effect_low, effect_high (95 %, over
        examples and directions), parameters, calls. Effects of layers and of ranges add up to that of a plan as far
        as their errors are uncorrelated.
        """
        rows = [row for component in self.components for row in self._rows(component)]
        frame = pd.DataFrame(rows, columns=list(COLUMNS))
        return frame.astype({"block": "Int64", "first_step": "Int64", "last_step": "Int64"})

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(
            sorted({part.component for part in self.parts}, key=lambda c: self.settings["schedule"].index(c))
        )

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(self.settings["formats"])

    @property
    def cost(self) -> Cost:
        """Cost of all parts, also of those that were read from the folder."""
        return sum((part.cost for part in self.parts), Cost())

    @property
    def calls(self) -> int:
        """Number of calls of experts whose layers were measured."""
        return sum(len(part.calls) for part in self.parts)

    @property
    def forwards(self) -> float:
        """Number of passes of a whole expert; blocks that run again for their gradients count, gradients do not."""
        return self.cost.forwards

    @property
    def brute_force(self) -> int:
        """Forwards of rounding one layer at a time: one per layer, format and call, and one of each call as it is."""
        return sum(len(part.calls) * (1 + len(part.layers) * len(part.formats)) for part in self.parts)

    @property
    def units(self) -> tuple[str, ...]:
        """Names of the units of work that were measured."""
        return tuple(dict.fromkeys(part.unit for part in self.parts))

    @property
    def complete(self) -> bool:
        """Whether every unit of work was measured."""
        return set(self.wanted) <= set(self.units)

    def costs(self) -> pd.DataFrame:
        """Cost of the measurement beside that of brute force.

        Columns: calls, forwards, backwards, products (of a layer's size, in forwards), forward_equivalents (forwards
        and products as one each, a backward as two), time_in_forwards (measured time over that of a forward),
        brute_force, percent_of_brute_force (of forward_equivalents), time_percent_of_brute_force.
        """
        cost, brute = self.cost, self.brute_force
        spent = cost.forwards + 2 * cost.backwards + cost.products
        timed = cost.time_ms / (cost.forward_ms / self.passes) if cost.forward_ms else float("nan")
        return pd.DataFrame(
            [
                {
                    "calls": self.calls,
                    "forwards": cost.forwards,
                    "backwards": cost.backwards,
                    "products": cost.products,
                    "forward_equivalents": spent,
                    "time_in_forwards": timed,
                    "brute_force": brute,
                    "percent_of_brute_force": 100 * spent / brute,
                    "time_percent_of_brute_force": 100 * timed / brute,
                }
            ]
        )

    @property
    def passes(self) -> int:
        """Number of calls that were computed, whether or not their layers were measured."""
        return sum(part.passes for part in self.parts)

    def totals(self) -> pd.DataFrame:
        """Sum of the effects of all layers: component, and a column per format."""
        sums = self.frame.pivot_table("effect", "component", "format", "sum")
        return sums.reset_index().rename_axis(columns=None)

    def by_role(self, family: Family) -> pd.DataFrame:
        """Sum of the effects of the layers of each role: component, role, layers, and a column per format.

        Args:
            family: family of the model, `model.family`.
        """
        frame = self.frame.assign(role=[family.role(layer) for layer in self.frame["layer"]])
        keys = ["component", "role"]
        sums = frame.pivot_table("effect", keys, "format", "sum")[list(self.formats)]
        counts = frame.drop_duplicates(["component", "layer"]).groupby(keys).size()
        sums.insert(0, "layers", counts)
        return sums.reset_index().rename_axis(columns=None)

    @property
    def way(self) -> str:
        """How it was measured, in a sentence."""
        even = (
            " Every step counts alike, as its sampler's weights are not known."
            if self.settings.get("even_steps")
            else ""
        )
        return WAYS[self.settings["method"]] + even

    def ranked(self, count: int | None = None, *, by: str = "effect") -> pd.DataFrame:
        """The rows of `frame`, most sensitive first.

        Raises:
            WanlabError: no such column.
        """
        if by not in ("effect", "velocity_error", "local_error"):
            raise WanlabError(f"rank by effect, velocity_error or local_error, not {by!r}")
        frame = self.frame.sort_values(by, ascending=False, ignore_index=True)
        return frame if count is None else frame.head(count)

    def __str__(self) -> str:
        """The most sensitive row, and what the measurement cost."""
        end = f" ({self.way.rstrip('.')})" if self.settings["method"] == "plain" else ""
        top, cost = self.ranked(1).iloc[0], self.costs().iloc[0]
        first, last = top["first_step"] + 1, top["last_step"] + 1  # readers count from 1
        when = f"step {first}" if first == last else f"steps {first} to {last}"
        return (
            f"most sensitive is {top['layer']} of {top['component']} in {top['format']} at {when}, effect"
            f" {top['effect']:.2g} ({top['effect_low']:.2g} to {top['effect_high']:.2g}); measured with"
            f" {cost['forward_equivalents']:,.0f} forwards' worth, {cost['percent_of_brute_force']:.1f} % of the"
            f" {cost['brute_force']:,.0f} of rounding one layer at a time{end}"
        )

    def with_bands(self, bands: int | Sequence[tuple[int, int]]) -> Sensitivity:
        """The same measurement over other ranges of steps; see `sensitivity`. Nothing runs again.

        Errors within a range are added before they are squared, those of two ranges afterwards. Where a layer keeps one
        format throughout, one range (`with_bands(1)`) is the better prediction.
        """
        return replace(self, bands=make_bands(self.settings["schedule"], bands))

    def _rows(self, component: str):
        parts = [part for part in self.parts if part.component == component]
        for first, last in self.bands.get(component, ()):
            yield from band_rows(parts, first, last, self.settings["weights"])


def make_bands(
    schedule: Sequence[str], bands: int | Sequence[tuple[int, int]]
) -> dict[str, list[tuple[int, int]]]:
    """Ranges of steps of every component: a number of equal ones, or given ones, split where the expert changes.

    Raises:
        WanlabError: no range, or one that is outside the schedule.
    """
    ranges: dict[str, list[tuple[int, int]]] = {}
    for component in dict.fromkeys(schedule):
        own = [step for step, name in enumerate(schedule) if name == component]
        if isinstance(bands, int):
            if bands < 1:
                raise WanlabError(f"bands must be at least 1, not {bands}")
            count = min(bands, len(own))
            edges = [round(i * len(own) / count) for i in range(count + 1)]
            ranges[component] = [(own[a], own[b - 1]) for a, b in pairwise(edges) if b > a]
            continue
        for first, last in bands:
            if not 0 <= first <= last < len(schedule):
                raise WanlabError(
                    f"steps {first} to {last} are no range within steps 0 to {len(schedule) - 1}"
                )
            inside = [step for step in own if first <= step <= last]
            if inside:
                ranges.setdefault(component, []).append((inside[0], inside[-1]))
    return ranges


QUANTITIES = ("velocity_error", "effect")


@dataclass(frozen=True, eq=False)
class ExpertTolerance:
    """Errors and effects of rounding all measured layers of an expert, format by format.

    Attributes:
        frame: one row per expert and format: component, format, velocity_error (relative L2, errors of layers taken
            as uncorrelated), velocity_low, velocity_high (95 % bootstrap over calls), effect (squared relative change
            of the final latents), effect_low, effect_high (95 %, over examples and directions), layers, calls.
        ratios: one row per format and quantity: format, quantity (`"velocity_error"`, `"effect"`), ratio (high-noise
            expert over low-noise expert), low, high (95 %), less_tolerant (the expert, or `"neither"` where the
            interval includes 1, or is unknown). Empty with one expert.
    """

    frame: pd.DataFrame
    ratios: pd.DataFrame

    @property
    def table(self) -> pd.DataFrame:
        """The ratios of two experts; of one expert its own rows."""
        return self.ratios if len(self.ratios) else self.frame

    def less_tolerant(self, format: str, quantity: str = "effect") -> str | None:
        """The expert that tolerates this format less, `"neither"`, or None with one expert.

        Raises:
            WanlabError: no such format or quantity.
        """
        if self.ratios.empty:
            return None
        rows = self.ratios[(self.ratios["format"] == format) & (self.ratios["quantity"] == quantity)]
        if rows.empty:
            raise WanlabError(
                f"no {quantity} of {format!r} was measured; there is {', '.join(set(self.ratios['format']))}"
            )
        return rows["less_tolerant"].iloc[0]


def expert_tolerance(sensitivity: Sensitivity) -> ExpertTolerance:
    """Compare the experts when all their measured layers are rounded, over all their steps.

    The velocity's error is that of one call; the effect is that of all steps of an expert on the final latents. The experts
    differ in a row where the 95 % interval of their ratio does not include 1.
    """
    rows, samples = [], {}
    for component in sensitivity.components:
        parts = [part for part in sensitivity.parts if part.component == component]
        last = len(sensitivity.settings["schedule"]) - 1
        calls = calls_between(parts, 0, last)["velocity"].sum(axis=1)
        first = sensitivity.settings["schedule"].index(component)
        end = max(i for i, name in enumerate(sensitivity.settings["schedule"]) if name == component)
        effect, groups = effect_samples(parts, first, end, sensitivity.settings["weights"])
        effect = effect.sum(axis=1)
        samples[component] = {"velocity_error": calls, "effect": effect, "groups": groups}
        seed = len(samples)
        velocity_low, velocity_high = weighted_interval(calls, draw_weights(len(calls), seed), np.sqrt)
        effect_low, effect_high = weighted_interval(effect, draw_group_weights(groups, seed))
        for column, format in enumerate(sensitivity.formats):
            rows.append(
                {
                    "component": component,
                    "format": format,
                    "velocity_error": float(np.sqrt(calls[:, column].mean())),
                    "velocity_low": float(velocity_low[column]),
                    "velocity_high": float(velocity_high[column]),
                    "effect": float(effect[:, column].mean()),
                    "effect_low": float(effect_low[column]),
                    "effect_high": float(effect_high[column]),
                    "layers": len(parts[0].layers),
                    "calls": len(calls),
                }
            )
    ratios = _ratios(samples, sensitivity.formats) if len(samples) == 2 else []
    columns = ["format", "quantity", "ratio", "low", "high", "less_tolerant"]
    return ExpertTolerance(pd.DataFrame(rows), pd.DataFrame(ratios, columns=columns))


def _ratios(samples: dict, formats) -> list[dict]:
    high, low = samples["expert_high"], samples["expert_low"]
    rows = []
    for quantity in QUANTITIES:
        if quantity == "effect":
            # Both have the same examples and directions, so they are resampled together.
            paired = np.array_equal(high["groups"], low["groups"])
            weights = [
                draw_group_weights(high["groups"], 1),
                draw_group_weights(low["groups"], 1 if paired else 2),
            ]
        else:
            weights = [draw_weights(len(side[quantity]), seed) for seed, side in enumerate((high, low), 1)]
        power = 0.5 if quantity == "velocity_error" else 1.0
        for column, format in enumerate(formats):
            above, below = high[quantity][:, column], low[quantity][:, column]
            drawn = [w @ values for w, values in zip(weights, (above, below), strict=True)]
            few = min(len(above), len(below)) < LEAST
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = float((above.mean() / below.mean()) ** power)
                least, most = percentile_interval((drawn[0] / drawn[1]) ** power, math.nan if few else ratio)
            less = "expert_high" if least > 1 else "expert_low" if most < 1 else "neither"
            rows.append(
                {
                    "format": format,
                    "quantity": quantity,
                    "ratio": ratio,
                    "low": least,
                    "high": most,
                    "less_tolerant": less,
                }
            )
    return rows
