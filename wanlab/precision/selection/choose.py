"""From tables to a plan that is proven: frontier, a relation of effect and loss, selection, verification, repair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wanlab.precision.plans.plan import make_plan
from wanlab.precision.selection.cases import Originals, for_choosing
from wanlab.precision.selection.costs import DEFAULT
from wanlab.precision.selection.problem import table_of
from wanlab.precision.selection.relation import Relation, fit_relation
from wanlab.precision.selection.repair import Repaired, repair
from wanlab.precision.selection.select import Frontier, Selection, frontier, select_plan
from wanlab.precision.selection.verify import Verification, measured_effect, verify_plan

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.precision.plans.plan import Plan


@dataclass(frozen=True, eq=False)
class Chosen:
    """A plan within a quality budget, and how it was found.

    Attributes:
        repaired: the plan, its prediction and its proof on the cases it was chosen by.
        frontier: plans from loose to tight. relation: of effect and loss, from those in `probes`.
        budget: on the effect. ceiling: what else held it down, None if nothing did. rest_effect: of rounding the layers that
            the sensitivity does not know, 0 where they are left as they are.
        limit_percent: of the upper end of the quality loss.
        generations: of plans, the originals apart.
    """

    repaired: Repaired
    frontier: Frontier
    relation: Relation
    probes: tuple[Verification, ...]
    budget: float
    ceiling: float | None
    rest_effect: float
    limit_percent: float
    generations: int

    @property
    def plan(self) -> Plan:
        return self.repaired.selection.plan

    @property
    def selection(self) -> Selection:
        return self.repaired.selection

    @property
    def verification(self) -> Verification:
        return self.repaired.verification

    def predictions(self) -> pd.DataFrame:
        """Prediction beside verification of every plan that was generated with.

        Columns: plan, predicted_effect, effect, predicted_upper_percent, upper_percent, loss_percent.
        """
        import pandas as pd

        points = self.relation.points.rename(
            columns={"predicted": "predicted_effect", "fitted_percent": "predicted_upper_percent"}
        )
        own = {
            "plan": self.plan.name,
            "predicted_effect": self.selection.effect,
            "effect": self.verification.effect,
            "predicted_upper_percent": self.relation.upper_percent(self.selection.effect),
            "upper_percent": self.verification.upper_percent,
            "loss_percent": self.verification.quality.percent,
        }
        return pd.concat([points, pd.DataFrame([own])], ignore_index=True)[list(own)]


def choose_plan(
    model,
    sensitivity,
    costs: pd.DataFrame,
    originals: Originals,
    *,
    limit_percent: float = 3.0,
    ceiling: float | None = None,
    probes: int = 3,
    points: int = 8,
    calibrations: Mapping[str, Any] | None = None,
    rest: str = DEFAULT,
    name: str = "selected",
    max_rounds: int = 6,
    progress: bool = True,
    **settings: Any,
) -> Chosen:
    """The plan that saves the most within a quality budget.

    Plans of the frontier, from loose to tight, are generated with; upper ends of their quality losses are fitted to their
    predicted effects; the fit places the budget of the plan, which is then verified, and repaired while it loses too much.

    Args:
        sensitivity: from `precision.sensitivity`. costs: from `layer_costs`.
        originals: from `make_originals`, of cases to choose by.
        limit_percent: of the upper end of the 95 % interval of the quality loss.
        ceiling: of the predicted effect besides; e.g. below that of a plan that must be beaten.
        probes: plans of the frontier to verify, at least 2. points: budgets of the frontier.
        calibrations: as `apply_plan` takes them.
        rest: format of linear layers that the sensitivity does not know (embedders, output). Its effect is measured on the
            cases, unless `rest_effect` is among the settings.
        settings: of `select_plan`: objective, formats, min_share_8bit, max_bits, group, by_steps.

    Raises:
        WanlabError: cases of the final set, or as `select_plan` and `verify_plan`.
    """
    for_choosing(originals)
    generations = 0
    if rest != DEFAULT:
        if "rest_effect" not in settings:
            settings["rest_effect"] = _rest_effect(
                model, sensitivity, costs, rest, originals, calibrations, progress
            )
            generations += len(originals.made)
        settings["rest"] = rest
    plans = frontier(sensitivity, costs, points=points, **settings)
    options = {"calibrations": calibrations, "progress": progress}
    tried = plans.spread(max(2, probes))
    proofs = tuple(verify_plan(model, each.plan, originals, **options) for each in tried)
    relation = fit_relation([each.effect for each in tried], proofs)
    budget = relation.budget(limit_percent)
    effect = budget if ceiling is None else min(budget, ceiling)
    selection = select_plan(sensitivity, costs, budget=effect, name=name, **settings)
    done = repair(
        model,
        selection,
        originals,
        limit_percent=limit_percent,
        relation=relation,
        max_rounds=max_rounds,
        **options,
    )
    generations += sum(each.generations for each in proofs) + done.generations
    return Chosen(
        done,
        plans,
        relation,
        proofs,
        effect,
        ceiling,
        settings.get("rest_effect", 0.0),
        limit_percent,
        generations,
    )


def _rest_effect(
    model, sensitivity, costs: pd.DataFrame, rest: str, originals, calibrations, progress: bool
) -> float:
    """The true effect of rounding everything that the sensitivity does not know, and nothing else."""
    keys = ["component", "layer"]
    known = table_of(sensitivity).set_index(keys).index
    outside = costs[(costs["format"] == rest) & ~costs.set_index(keys).index.isin(known)]
    if outside.empty:
        return 0.0
    rules = [
        {"format": rest, "component": component, "layers": tuple(rows["layer"])}
        for component, rows in outside.groupby("component", sort=False)
    ]
    return measured_effect(
        model, make_plan("rest", rules=rules), originals, calibrations=calibrations, progress=progress
    )
