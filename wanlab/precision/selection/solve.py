"""The cheapest choice under a budget, as a mixed-integer programme for HiGHS (Huangfu and Hall 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError
from wanlab.precision.selection.problem import Problem

if TYPE_CHECKING:
    import numpy as np

GAP = 1e-4
"""A choice within this fraction of the best possible cost is taken as the best."""


@dataclass(frozen=True, eq=False)
class Solution:
    """One option per group and range of steps.

    Attributes:
        chosen: index into `Problem.options`.
        gap: how far the cost can be from the best, as a fraction; None where nothing bounds it.
        optimal: the gap is closed, within `GAP`.
    """

    chosen: np.ndarray
    gap: float | None
    optimal: bool


@dataclass(frozen=True)
class Limits:
    """What a choice must keep. None is no limit.

    Attributes:
        effect: sum of effects, those of the rest included.
        min_share_8bit: fraction of all linear weights in formats of at most 8 bits at every step.
        max_bits: mean bits of a linear weight, scales included.
    """

    effect: float | None = None
    min_share_8bit: float | None = None
    max_bits: float | None = None


def solve(problem: Problem, limits: Limits, *, least: str = "cost", time_limit_s: float = 20.0) -> Solution:
    """Minimise the cost (or the effect) of a problem.

    One binary per group, range of steps and format, exactly one format each. Effects add: the roundings of different layers
    are independent. A format that a group has in some range of steps is held, and its bytes counted, once.

    Args:
        least: `"cost"`, or `"effect"` to learn what is possible at all.

    Raises:
        WanlabError: nothing keeps the limits (says what comes nearest), or no choice was found in time.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    options = problem.options
    kept = undominated(problem)
    rows = options.iloc[kept].reset_index(drop=True)
    count = len(rows)
    pairs = rows[["group", "format"]].apply(tuple, axis=1)
    held_codes, held = _numbered(pairs)
    group_codes, groups = _numbered(rows["group"])
    first = rows.groupby(held_codes).first()
    size, few = first["size_bytes"].to_numpy(float), rows["bits"].to_numpy() <= 8
    weights = rows.groupby(group_codes)["weights"].first().to_numpy(float)
    total = problem.weights
    x, h, z = 0, count, count + len(held)  # choices, formats held, groups in few bits throughout
    width = z + len(groups)
    constraints = []

    def add(entries: list[tuple], low, high, lines: int) -> None:
        where, column, value = (np.concatenate([np.atleast_1d(e[i]) for e in entries]) for i in range(3))
        constraints.append(
            LinearConstraint(coo_array((value, (where, column)), (lines, width)).tocsr(), low, high)
        )

    ones, index = np.ones(count), np.arange(count)
    places, place_list = _numbered(rows[["group", "first_step"]].apply(tuple, axis=1))
    add([(places, x + index, ones)], 1, 1, len(place_list))
    add([(index, x + index, ones), (index, h + held_codes, -ones)], -np.inf, 0, count)
    # z of a group is at most what few-bit formats it has in each range of steps
    add(
        [
            (np.arange(len(place_list)), z + _first(group_codes, places), np.ones(len(place_list))),
            (places[few], x + index[few], -np.ones(int(few.sum()))),
        ],
        -np.inf,
        0,
        len(place_list),
    )
    effects = rows["effect"].to_numpy(float)
    if limits.effect is not None:
        room = limits.effect - problem.rest_effect
        if room < 0:
            raise WanlabError(
                f"the layers that are not chosen have an effect of {problem.rest_effect:.3g}, over the budget of"
                f" {limits.effect:.3g}; leave them as they are (rest='default')"
            )
        unit = room or 1.0
        add([(np.zeros(count, int), x + index, effects / unit)], -np.inf, room / unit, 1)
    if limits.min_share_8bit is not None:
        wanted = limits.min_share_8bit - problem.rest_few / total
        add([(np.zeros(len(groups), int), z + np.arange(len(groups)), weights / total)], wanted, np.inf, 1)
    if limits.max_bits is not None:
        room = limits.max_bits - 8 * problem.rest_bytes / total
        add([(np.zeros(len(held), int), h + np.arange(len(held)), 8 * size / total)], -np.inf, room, 1)

    target = np.zeros(width)
    if least == "effect":
        target[:count] = effects / (effects.max() or 1.0)
    elif problem.objective == "memory":
        target[h : h + len(held)] = size / size.max()
    else:
        target[:count] = rows["cost"].to_numpy(float) / rows["cost"].max()
    integral = np.zeros(width)
    integral[:count] = 1
    found = milp(
        target,
        constraints=constraints,
        integrality=integral,
        bounds=Bounds(0, 1),
        options={"time_limit": time_limit_s, "mip_rel_gap": GAP},
    )
    if found.x is None:
        raise WanlabError(_impossible(problem, limits, least, found))
    chosen = np.flatnonzero(found.x[:count] > 0.5)
    gap = None if found.mip_gap is None else float(found.mip_gap)
    return Solution(np.asarray(kept)[chosen], gap, found.status == 0)


def undominated(problem: Problem) -> list[int]:
    """Options that no other format of the same group beats or equals in everything, in every range of steps.

    Costs and bytes that are equal within `Problem.tie` count as equal: measured times are no more certain, and a few scales
    are no reason for another format. With a tie of 0 no best choice is lost.
    """
    import numpy as np

    options = problem.options
    few = (options["bits"] > 8).astype(float)
    table = options.assign(many=few)[["cost", "effect", "size_bytes", "many"]].to_numpy(float)
    slack = np.array([1 + problem.tie, 1.0, 1 + problem.tie, 1.0])
    kept: list[int] = []
    for _, part in options.groupby("group", sort=False):
        by_format = {
            name: rows.sort_values("first_step").index for name, rows in part.groupby("format", sort=False)
        }
        alive = dict(by_format)
        for name, own in by_format.items():
            for other, its in by_format.items():
                if other == name or other not in alive or len(its) != len(own):
                    continue
                if np.all(table[its] <= slack * table[own]):
                    del alive[name]
                    break
        kept += [index for its in alive.values() for index in its]
    return sorted(kept)


def _numbered(values):
    import pandas as pd

    codes, known = pd.factorize(values)
    return codes, list(known)


def _first(codes, places):
    """The group of every place."""
    import pandas as pd

    return pd.Series(codes).groupby(places).first().to_numpy()


def _impossible(problem: Problem, limits: Limits, least: str, found) -> str:
    """What to say of limits that no choice keeps."""
    said = [
        f"an effect of at most {limits.effect:.3g}" if limits.effect is not None else "",
        f"{100 * limits.min_share_8bit:.0f} % of linear weights in 8 bits"
        if limits.min_share_8bit is not None
        else "",
        f"{limits.max_bits:.2f} bits per weight" if limits.max_bits is not None else "",
    ]
    wish = " and ".join(part for part in said if part) or "these options"
    if found.status == 1:
        return f"no plan with {wish} was found in time; give time_limit_s more, or group='projection'"
    if limits.effect is None or least == "effect":
        return f"no plan has {wish}; measure formats of fewer bits, or ask for less"
    try:
        near = solve(problem, Limits(None, limits.min_share_8bit, limits.max_bits), least="effect")
    except WanlabError as error:
        return str(error)
    least_effect = problem.options.loc[near.chosen, "effect"].sum() + problem.rest_effect
    return f"no plan has {wish}; the least effect under the other limits is {least_effect:.3g}"
