"""Which expert tolerates less, per format, with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError
from wanlab.precision.sensitivities.result import Sensitivity
from wanlab.precision.sensitivities.statistics import (
    calls_between,
    effect_samples,
    interval,
    over_calls,
    over_groups,
)

if TYPE_CHECKING:
    import pandas as pd

QUANTITIES = ("velocity_error", "effect")


@dataclass(frozen=True, eq=False)
class ExpertTolerance:
    """What rounding all measured layers of an expert does, format by format.

    Attributes:
        frame: one row per expert and format: component, format, velocity_error (relative L2, errors of layers taken
            as uncorrelated), velocity_low, velocity_high (95 % bootstrap over calls), effect (squared relative change
            of the final latents), effect_low, effect_high (95 %, over examples and directions), layers, calls.
        ratios: one row per format and quantity: format, quantity (`"velocity_error"`, `"effect"`), ratio (high-noise
            expert over low-noise expert), low, high (95 %), less_tolerant (the expert, or `"neither"` where the
            interval holds 1). Empty with one expert.
    """

    frame: pd.DataFrame
    ratios: pd.DataFrame

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

    def sentence(self, format: str, quantity: str = "effect") -> str:
        """The answer in words, with its interval."""
        said = self.less_tolerant(format, quantity)
        if said is None:
            return f"{format}: one expert, nothing to compare"
        row = self.ratios[(self.ratios["format"] == format) & (self.ratios["quantity"] == quantity)].iloc[0]
        ratio, low, high = row["ratio"], row["low"], row["high"]
        if said == "neither":
            return (
                f"{format}: neither expert clearly tolerates less ({label(quantity)} of the high-noise expert over"
                f" that of the low-noise expert {ratio:.3g}, 95 % {low:.3g} to {high:.3g})"
            )
        if said == "expert_low":
            ratio, low, high = 1 / ratio, 1 / high, 1 / max(low, 1e-300)
        names = ["high-noise expert", "low-noise expert"]
        less, more = names if said == "expert_high" else names[::-1]
        return (
            f"{format}: the {less} tolerates less, its {label(quantity)} is {ratio:.3g} times the {more}'s"
            f" (95 % {low:.3g} to {high:.3g})"
        )


def label(quantity: str) -> str:
    """A quantity in words."""
    return {"velocity_error": "velocity error", "effect": "effect on the final latents"}[quantity]


def expert_tolerance(sensitivity: Sensitivity) -> ExpertTolerance:
    """Compare the experts when all their measured layers are rounded, over all their steps.

    The velocity's error is that of one call, the effect is what all steps of an expert do to the final latents. A row
    of two experts is decided where the 95 % interval of their ratio leaves out 1.
    """
    import numpy as np
    import pandas as pd

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
        velocity_low, velocity_high = interval(calls, over_calls(len(calls), seed), np.sqrt)
        effect_low, effect_high = interval(effect, over_groups(groups, seed))
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
    import numpy as np

    high, low = samples["expert_high"], samples["expert_low"]
    rows = []
    for quantity in QUANTITIES:
        if quantity == "effect":
            # The same examples and directions end both: drawn together.
            paired = np.array_equal(high["groups"], low["groups"])
            weights = [over_groups(high["groups"], 1), over_groups(low["groups"], 1 if paired else 2)]
        else:
            weights = [over_calls(len(side[quantity]), seed) for seed, side in enumerate((high, low), 1)]
        power = 0.5 if quantity == "velocity_error" else 1.0
        for column, format in enumerate(formats):
            above, below = high[quantity][:, column], low[quantity][:, column]
            drawn = [w @ values for w, values in zip(weights, (above, below), strict=True)]
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = float((above.mean() / below.mean()) ** power)
                ends = np.nanpercentile((drawn[0] / drawn[1]) ** power, [2.5, 97.5])
            least, most = min(float(ends[0]), ratio), max(float(ends[1]), ratio)
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
