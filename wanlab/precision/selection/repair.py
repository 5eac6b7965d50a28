"""Until it holds: the worst offenders of a plan that loses too much are raised, and it is verified again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from wanlab.precision.selection.cases import Originals, for_choosing
from wanlab.precision.selection.relation import FORMS, MARGIN
from wanlab.precision.selection.select import Selection, selection_of
from wanlab.precision.selection.solve import Limits, Solution, undominated
from wanlab.precision.selection.verify import Verification, verify_plan

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.precision.selection.relation import Relation


@dataclass(frozen=True, eq=False)
class Repaired:
    """What became of a plan.

    Attributes:
        selection: the last one. verification: its proof.
        holds: whether the upper end of its quality loss is within the limit.
        history: one row per round: round, plan, raised (groups that got a better format), effect (predicted), cost,
            loss_percent, upper_percent, holds.
        generations: that the rounds took.
    """

    selection: Selection
    verification: Verification
    holds: bool
    history: pd.DataFrame
    generations: int


def repair(
    model,
    selection: Selection,
    originals: Originals,
    *,
    limit_percent: float,
    verification: Verification | None = None,
    relation: Relation | None = None,
    calibrations: Mapping[str, Any] | None = None,
    max_rounds: int = 6,
    progress: bool = True,
    **settings: Any,
) -> Repaired:
    """Verify a plan; while its quality loss exceeds the limit, raise what has the largest effect per cost saved.

    Each round takes the predicted effect down as far as the relation asks for, by at least one group. Limits on bits and on
    the share of 8 bits stay kept; the one on the effect is what is being corrected.

    Args:
        selection: from `select_plan` or `frontier`. originals: cases to choose by, never those of the final set.
        limit_percent: of the upper end of the quality loss.
        verification: of this plan, where there is one already.
        relation: how loss follows from effect; linear if not given.
        max_rounds: of repairs; the history ends there even if the limit is not kept.
        settings: of `verify_plan`.

    Raises:
        WanlabError: cases of the final set, or as `verify_plan`.
    """
    import pandas as pd

    for_choosing(originals)
    exponent = FORMS[relation.form] if relation else 1.0
    options = {"calibrations": calibrations, "progress": progress} | settings
    generations, raised, rows = 0, 0, []
    name = selection.plan.name
    for number in range(max_rounds + 1):
        if verification is None:
            verification = verify_plan(model, selection.plan, originals, **options)
            generations += verification.generations
        holds = verification.holds(limit_percent)
        rows.append(
            {
                "round": number,
                "plan": selection.plan.name,
                "raised": raised,
                "effect": selection.effect,
                "cost": selection.cost,
                "loss_percent": verification.quality.percent,
                "upper_percent": verification.upper_percent,
                "holds": holds,
            }
        )
        if holds or number == max_rounds or verification.upper_percent is None:
            break
        target = selection.effect * (MARGIN * limit_percent / verification.upper_percent) ** (1 / exponent)
        better, raised = raise_worst(selection, target, f"{name}-repaired-{number + 1}")
        if better is None:
            break
        selection, verification = better, None
    return Repaired(selection, verification, holds, pd.DataFrame(rows), generations)


def raise_worst(selection: Selection, target: float, name: str) -> tuple[Selection | None, int]:
    """The plan with formats raised until its effect is at most a target, largest effect per cost first.

    Returns:
        The plan and how many formats were raised; None and 0 where nothing is left to raise.
    """
    problem, limits = selection.problem, replace(selection.limits, effect=None)
    options = problem.options
    chosen = {(row.group, row.first_step): row.Index for row in options.loc[selection.chosen].itertuples()}
    useful = options.loc[undominated(problem)]
    choices = useful.groupby(["group", "first_step"]).groups
    effects, effect, raised = options["effect"].to_numpy(), selection.effect, 0
    # Steps up by ratio of what they save in effect to what they cost; what the limits forbid is passed over.
    while raised == 0 or effect > target:
        steps = sorted(_steps(options, choices, chosen), reverse=True)
        step = next(
            ((place, to) for _, place, to in steps if _kept(problem, limits, chosen | {place: to})), None
        )
        if step is None:
            break
        place, to = step
        effect += effects[to] - effects[chosen[place]]
        chosen[place] = to
        raised += 1
    if not raised:
        return None, 0
    solution = Solution(np.array(sorted(chosen.values())), None, False)
    return selection_of(problem, limits, solution, name), raised


def _steps(options: pd.DataFrame, choices: Mapping, chosen: Mapping):
    """Every step to a format of less effect: effect saved per cost, where, and to what."""
    effects, costs = options["effect"].to_numpy(), options["cost"].to_numpy()
    for place, now in chosen.items():
        for other in choices[place]:
            saved = effects[other] - effects[now]
            if saved < 0:
                yield -saved / max(costs[other] - costs[now], 1e-12), place, other


def _kept(problem, limits: Limits, chosen: Mapping) -> bool:
    """Whether a choice keeps the limits on bits."""
    rows = problem.options.loc[list(chosen.values())]
    if limits.min_share_8bit is not None:
        few = (rows["bits"] <= 8).groupby(rows["group"]).all()
        weights = rows.groupby("group")["weights"].first()
        if (weights[few].sum() + problem.rest_few) / problem.weights < limits.min_share_8bit - 1e-9:
            return False
    if limits.max_bits is not None:
        held = rows.drop_duplicates(["group", "format"])["size_bytes"].sum() + problem.rest_bytes
        if 8 * held / problem.weights > limits.max_bits + 1e-9:
            return False
    return True
