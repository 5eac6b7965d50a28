"""From the effect that is predicted to the quality that is lost: measured on a few plans, not assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.precision.selection.verify import Verification

FORMS = {"linear": 1.0, "square root": 0.5}
"""Name -> exponent of the effect. A loss that grows with the square of errors is linear in the effect; one that grows with
their size, as the spread over cases does where errors help as often as they harm, goes with its root."""

MARGIN = 0.8
"""Of the limit, that the budget aims at: the interval of a plan moves with its noise."""


@dataclass(frozen=True, eq=False)
class Relation:
    """Upper end of the quality loss as a function of the effect: `scale * effect ** exponent`.

    Attributes:
        form: a name of `FORMS`. scale: percent at an effect of 1.
        residual_percent: root mean square distance of the fitted from the measured upper ends, in percent of quality loss.
        points: one row per plan: plan, predicted (effect), effect (true), loss_percent, upper_percent, fitted_percent.
    """

    form: str
    scale: float
    residual_percent: float
    points: pd.DataFrame

    def upper_percent(self, effect: float) -> float:
        """Predicted upper end of the quality loss of a plan of this predicted effect."""
        return self.scale * effect ** FORMS[self.form]

    def budget(self, limit_percent: float, *, margin: float = MARGIN) -> float:
        """The effect whose predicted upper end is the limit times a margin.

        It is at most the largest effect that was tried: beyond it nothing is known.
        """
        if limit_percent <= 0:
            raise WanlabError(
                f"a quality loss of at most {limit_percent} % leaves nothing to choose; give more than 0"
            )
        largest = float(self.points["predicted"].max())
        if self.scale <= 0:
            return largest
        return min(largest, (margin * limit_percent / self.scale) ** (1 / FORMS[self.form]))

    def __str__(self) -> str:
        said = "effect" if self.form == "linear" else "the root of the effect"
        return (
            f"upper end of the quality loss = {self.scale:.3g} % x {said}, from {len(self.points)} plans,"
            f" {self.residual_percent:.2g} % off in the root mean square"
        )


def fit_relation(predicted: Sequence[float], verifications: Sequence[Verification]) -> Relation:
    """Fit the upper end of the quality loss to predicted effects, through the origin; the form that fits better is taken.

    Args:
        predicted: effect of each plan. verifications: of the same plans, with truths.

    Raises:
        WanlabError: fewer than two plans, no quality loss, or no effect.
    """
    import pandas as pd

    if len(predicted) != len(verifications) or len(predicted) < 2:
        raise WanlabError(f"{len(verifications)} verified plans make no relation; verify two or more")
    upper = [each.upper_percent for each in verifications]
    if any(value is None for value in upper):
        raise WanlabError("quality loss is unknown without the truth of the cases; give held-out cases")
    if not all(effect > 0 for effect in predicted):
        raise WanlabError("a plan without predicted effect says nothing of the relation; leave it out")
    form, scale, residual = fit(list(predicted), [max(0.0, value) for value in upper])
    points = pd.DataFrame(
        {
            "plan": [each.plan.name for each in verifications],
            "predicted": list(predicted),
            "effect": [each.effect for each in verifications],
            "loss_percent": [each.quality.percent for each in verifications],
            "upper_percent": upper,
            "fitted_percent": [scale * effect ** FORMS[form] for effect in predicted],
        }
    )
    return Relation(form, scale, residual, points)


def fit(effects: list[float], values: list[float]) -> tuple[str, float, float]:
    """Form, scale and residual of the better of the forms: least squares through the origin."""
    best = None
    for form, exponent in FORMS.items():
        powers = [effect**exponent for effect in effects]
        scale = sum(p * v for p, v in zip(powers, values, strict=True)) / sum(p * p for p in powers)
        residual = math.sqrt(
            sum((scale * p - v) ** 2 for p, v in zip(powers, values, strict=True)) / len(values)
        )
        if best is None or residual < best[2]:
            best = (form, scale, residual)
    return best
