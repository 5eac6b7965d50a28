"""The result of a sensitivity measurement: tables from its parts, for any ranges of steps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.precision.sensitivities.parts import Cost, Part
from wanlab.precision.sensitivities.statistics import band_rows

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "component", "layer", "block", "projection", "format", "first_step", "last_step", "local_error",
    "velocity_error", "low", "high", "effect", "effect_low", "effect_high", "parameters", "calls",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """How much every layer's rounding changes velocities and final latents.

    Attributes:
        settings: model, generation (settings of the recording), schedule (component of every step), weights (of every
            step's velocity in the final latents), formats, probes, calls, method, seed.
        parts: finished pieces.
        bands: component -> ranges of steps, inclusive, one row each in `frame`.
        wanted: units of work that there are in all, by name; fewer parts were measured where this is a shard.
        reused: units that were found finished in the folder.
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
        import pandas as pd

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
        """Of all parts, those included that were found finished."""
        return sum((part.cost for part in self.parts), Cost())

    @property
    def calls(self) -> int:
        """Calls of experts whose layers were measured."""
        return sum(len(part.calls) for part in self.parts)

    @property
    def forwards(self) -> float:
        """Passes of a whole expert; running blocks again for their gradients counts, gradients are counted apart."""
        return self.cost.forwards

    @property
    def brute_force(self) -> int:
        """Forwards of rounding one layer at a time: one per layer, format and call, and one of each call as it is."""
        return sum(len(part.calls) * (1 + len(part.layers) * len(part.formats)) for part in self.parts)

    @property
    def units(self) -> tuple[str, ...]:
        """Units of work that are in."""
        return tuple(dict.fromkeys(part.unit for part in self.parts))

    @property
    def complete(self) -> bool:
        """Whether every unit of work is in."""
        return set(self.wanted) <= set(self.units)

    def costs(self) -> pd.DataFrame:
        """What was spent beside brute force.

        Columns: calls, forwards, backwards, products (of a layer's size, in forwards), forward_equivalents (forwards
        and products as one each, a backward as two), time_in_forwards (measured time over that of a forward),
        brute_force, percent_of_brute_force (of forward_equivalents), time_percent_of_brute_force.
        """
        import pandas as pd

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
        """Calls that were passed, whether or not their layers were measured."""
        return sum(part.passes for part in self.parts)

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
        top, cost = self.ranked(1).iloc[0], self.costs().iloc[0]
        first, last = top["first_step"], top["last_step"]
        when = f"step {first}" if first == last else f"steps {first} to {last}"
        return (
            f"most sensitive is {top['layer']} of {top['component']} in {top['format']} at {when}, effect"
            f" {top['effect']:.2g} ({top['effect_low']:.2g} to {top['effect_high']:.2g}); found with"
            f" {cost['forward_equivalents']:,.0f} forwards' worth, {cost['percent_of_brute_force']:.1f} % of the"
            f" {cost['brute_force']:,.0f} of rounding one layer at a time"
        )

    def with_bands(self, bands: int | Sequence[tuple[int, int]]) -> Sensitivity:
        """The same measurement over other ranges of steps; see `sensitivity`. Nothing is run again.

        Errors within a range are added before they are squared, those of two ranges after. Where a layer keeps one format
        throughout, one range (`with_bands(1)`) is the better prediction.
        """
        return replace(self, bands=make_bands(self.settings["schedule"], bands))

    def _rows(self, component: str):
        parts = [part for part in self.parts if part.component == component]
        for first, last in self.bands.get(component, ()):
            yield from band_rows(parts, first, last, self.settings["weights"])


def make_bands(
    schedule: Sequence[str], bands: int | Sequence[tuple[int, int]]
) -> dict[str, list[tuple[int, int]]]:
    """Ranges of steps of every component: a number of equal ones, or those given, cut where the expert changes.

    Raises:
        WanlabError: no range, or one that is outside the schedule.
    """
    made: dict[str, list[tuple[int, int]]] = {}
    for component in dict.fromkeys(schedule):
        own = [step for step, name in enumerate(schedule) if name == component]
        if isinstance(bands, int):
            if bands < 1:
                raise WanlabError(f"bands must be at least 1, not {bands}")
            count = min(bands, len(own))
            edges = [round(i * len(own) / count) for i in range(count + 1)]
            made[component] = [(own[a], own[b - 1]) for a, b in pairwise(edges) if b > a]
            continue
        for first, last in bands:
            if not 0 <= first <= last < len(schedule):
                raise WanlabError(f"steps {first} to {last} are no range of steps 0 to {len(schedule) - 1}")
            inside = [step for step in own if first <= step <= last]
            if inside:
                made.setdefault(component, []).append((inside[0], inside[-1]))
    return made
