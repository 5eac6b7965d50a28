"""The cheapest plan under a budget as a mixed-integer program for HiGHS (Huangfu and Hall 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.precision.plan import FLOATS
from wanlab.precision.selection.costs import COUNTED, DEFAULT, MEASURED

GROUPS = ("layer", "projection", "block")
OBJECTIVES = ("memory", "time")
TIE = 0.03
NEEDED = ("component", "layer", "block", "projection", "format", "first_step", "last_step", "effect")


@dataclass(frozen=True, eq=False)
class Problem:
    """Options of a choice of formats.

    Attributes:
        options: one row per group, range of steps and format: group (number), first_step, last_step, format, effect, cost
            (of a generation, for time; of the weights held, for memory), default_cost, size_bytes, bits, weights.
        members: one row per layer: group, component, layer, block, projection.
        objective: `"memory"` or `"time"`. unit: unit of costs, `"ms"`, `"GFLOP (counted)"` or `"bytes"`.
        rest_weights, rest_bytes, rest_default_bytes, rest_few: elements of linear layers that have no options, their bytes
            as planned and as loaded, and their elements in 8 bits or fewer.
        rest: these layers, one row each: component, layer, block, projection, format.
        rest_effect: effect of rounding these layers.
        tie: costs that differ by less than this fraction count as equal.
        num_steps: number of steps of the generation; by_steps: whether each range of steps has its own choice.
    """

    options: pd.DataFrame
    members: pd.DataFrame
    objective: str
    unit: str
    rest_weights: int
    rest_bytes: int
    rest_default_bytes: int
    rest_few: int
    rest: pd.DataFrame
    rest_effect: float
    num_steps: int
    by_steps: bool
    tie: float = TIE

    @property
    def weights(self) -> int:
        """Elements of all linear layers."""
        return self.rest_weights + int(self.options.groupby("group")["weights"].first().sum())


def make_problem(
    sensitivity,
    costs: pd.DataFrame,
    *,
    objective: str,
    formats: Sequence[str] | None = None,
    group: str = "layer",
    by_steps: bool = False,
    rest: str = DEFAULT,
    rest_effect: float = 0.0,
    tie: float = TIE,
) -> Problem:
    """Tables of effects and costs as one problem; see `select_plan` for the arguments.

    Raises:
        WanlabError: tables that do not fit each other, an unknown group or objective, no format to choose from.
    """
    for value, known, what in ((group, GROUPS, "group"), (objective, OBJECTIVES, "objective")):
        if value not in known:
            raise WanlabError(
                f"no {what} {value!r}{did_you_mean(str(value), known)}; give {', '.join(known)}"
            )
    effects = table_of(sensitivity)
    names = _formats(effects, formats)
    effects = effects[effects["format"].isin(names)]
    if rest != DEFAULT and rest not in set(costs["format"]):
        raise WanlabError(
            f"no costs of {rest}, the format of the rest; name it in layer_costs(model, formats)"
        )
    keys = ["component", "layer"]
    ranges = effects.drop_duplicates([*keys, "first_step"])[[*keys, "first_step", "last_step"]]
    num_steps = int(effects["last_step"].max()) + 1
    zero = ranges.assign(format=DEFAULT, effect=0.0)
    table = pd.concat(
        [effects[[*keys, "format", "first_step", "last_step", "effect"]], zero], ignore_index=True
    )
    columns = ["block", "projection", "bits", "weights", "size_bytes", "source", "time_ms", "work_gflop"]
    table = table.merge(costs[[*keys, "format", *columns]], on=[*keys, "format"], how="left")
    lacking = table[table["bits"].isna()]
    if len(lacking):
        first = lacking.iloc[0]
        raise WanlabError(
            f"no cost of {first['layer']} of {first['component']} in {first['format']}; take layer_costs of the same model"
            " with the formats of the sensitivity"
        )
    table, unit = _costed(table, objective, branches_of(sensitivity))
    table["group"], members = _grouped(table, group)
    spans = ["first_step", "last_step"] if by_steps else []
    if not by_steps:
        table = _over_steps(table, objective)
    options = _summed(table, ["group", *spans, "format"])
    spread = options if by_steps else options.assign(first_step=0, last_step=num_steps - 1)
    options = _stretched(spread, steps_of(sensitivity) or num_steps)
    rest_rows = costs.merge(members[keys], on=keys, how="left", indicator=True)
    rest_rows = rest_rows[rest_rows["_merge"] == "left_only"]
    rest_planned = rest_rows[rest_rows["format"] == rest]
    whole = rest_rows[rest_rows["format"] == DEFAULT]
    # Layers that cannot be in the rest's format, as their inputs are no multiple of its block, keep the default.
    kept = whole[~whole.set_index(keys).index.isin(rest_planned.set_index(keys).index)]
    chosen = rest_planned if rest == DEFAULT else pd.concat([rest_planned, kept])
    return Problem(
        options=options.reset_index(drop=True),
        members=members,
        objective=objective,
        unit=unit,
        rest_weights=int(whole["weights"].sum()),
        rest_bytes=int(chosen["size_bytes"].sum()),
        rest_default_bytes=int(whole["size_bytes"].sum()),
        rest_few=int(chosen.loc[chosen["bits"] <= 8, "weights"].sum()),
        rest=chosen[[*keys, "block", "projection", "format"]].reset_index(drop=True),
        rest_effect=rest_effect,
        num_steps=steps_of(sensitivity) or num_steps,
        by_steps=by_steps,
        tie=tie,
    )


def table_of(sensitivity) -> pd.DataFrame:
    """The rows of a `Sensitivity`, or of a table with its columns.

    Raises:
        WanlabError: missing columns, or effects that are negative or not numbers.
    """
    frame = getattr(sensitivity, "frame", sensitivity)
    missing = [name for name in NEEDED if name not in frame.columns]
    if missing:
        raise WanlabError(f"the sensitivity has no column {missing[0]!r}; it needs {', '.join(NEEDED)}")
    wrong = frame[~(frame["effect"] >= 0)]
    if len(wrong):
        first = wrong.iloc[0]
        raise WanlabError(
            f"the effect of {first['layer']} in {first['format']} is {first['effect']}; effects are 0 or more"
        )
    return frame


def branches_of(sensitivity) -> int:
    """Number of calls of an expert in a step: two with guidance."""
    generation = getattr(sensitivity, "settings", {}).get("generation", {})
    return 2 if (generation.get("guidance_scale") or 0) > 1 else 1


def steps_of(sensitivity) -> int | None:
    """Number of steps of the generation; None where the measurement has no schedule."""
    schedule = getattr(sensitivity, "settings", {}).get("schedule")
    return len(schedule) if schedule else None


def _formats(effects: pd.DataFrame, formats: Sequence[str] | None) -> list[str]:
    known = list(dict.fromkeys(effects["format"]))
    chosen = known if formats is None else [name for name in formats if name not in (DEFAULT, *FLOATS)]
    for name in chosen:
        if name not in known:
            raise WanlabError(
                f"the effect of {name!r} was not measured{did_you_mean(name, known)}; there is {', '.join(known)}"
            )
    if not chosen:
        raise WanlabError(f"no format to choose from; give some of {', '.join(known)}")
    return chosen


def _costed(table: pd.DataFrame, objective: str, branches: int) -> tuple[pd.DataFrame, str]:
    """The table with the cost of every row, bytes or time or work in this range of steps; and its unit."""
    if objective == "memory":
        return table.assign(cost=table["size_bytes"].astype(float)), "bytes"
    sources = set(table["source"])
    if sources == {MEASURED, COUNTED}:
        raise WanlabError("some costs are measured and some counted; take layer_costs of one device")
    each = table["time_ms"] if sources == {MEASURED} else table["work_gflop"]
    calls = branches * (table["last_step"] - table["first_step"] + 1)
    return table.assign(cost=(each * calls).astype(float)), "ms" if sources == {
        MEASURED
    } else "GFLOP (counted)"


def _grouped(table: pd.DataFrame, group: str):
    """Number of every row's group, and the layers with theirs. Each layer outside the blocks is its own group."""
    layers = table.drop_duplicates(["component", "layer"])[["component", "layer", "block", "projection"]]
    by = layers[group].astype("string").where(layers["block"].notna() | (group == "layer"), layers["layer"])
    keys = layers["component"] + "|" + by
    members = layers.assign(group=pd.factorize(keys)[0]).reset_index(drop=True)
    number = members.set_index(["component", "layer"])["group"]
    return number.loc[pd.MultiIndex.from_frame(table[["component", "layer"]])].to_numpy(), members


def _over_steps(table: pd.DataFrame, objective: str) -> pd.DataFrame:
    """One row per layer and format: effects and times of all steps are added, bytes count once."""
    named = {name: (name, "first") for name in ("group", "bits", "weights", "size_bytes")}
    how = "first" if objective == "memory" else "sum"
    return table.groupby(["component", "layer", "format"], as_index=False, sort=False).agg(
        effect=("effect", "sum"), cost=("cost", how), **named
    )


def _summed(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """One row per group and format; formats that one of the group's layers cannot have are left out."""
    rows = table.groupby(by, as_index=False, sort=False).agg(
        effect=("effect", "sum"),
        cost=("cost", "sum"),
        size_bytes=("size_bytes", "sum"),
        bits=("bits", "max"),
        weights=("weights", "sum"),
    )
    place = [name for name in by if name != "format"]
    default = rows.loc[rows["format"] == DEFAULT, [*place, "cost", "weights"]]
    rows = rows.merge(default.rename(columns={"cost": "default_cost", "weights": "whole"}), on=place)
    return rows[rows["weights"] == rows["whole"]].drop(columns="whole")


def _stretched(options: pd.DataFrame, num_steps: int) -> pd.DataFrame:
    """Options whose ranges reach from the first to the last step, as an expert is not called outside its own steps."""
    first, last = (
        options.groupby("group")[name].transform(how)
        for name, how in (("first_step", "min"), ("last_step", "max"))
    )
    return options.assign(
        first_step=options["first_step"].where(options["first_step"] != first, 0).astype(int),
        last_step=options["last_step"].where(options["last_step"] != last, num_steps - 1).astype(int),
    )


GAP = 1e-4
"""A choice within this fraction of the best possible cost is taken as the best."""


@dataclass(frozen=True, eq=False)
class Solution:
    """One option per group and range of steps.

    Attributes:
        chosen: indices into `Problem.options`.
        gap: largest distance of the cost from the best possible, as a fraction; None where it is not known.
        optimal: whether the gap is at most `GAP`.
    """

    chosen: np.ndarray
    gap: float | None
    optimal: bool


@dataclass(frozen=True)
class Limits:
    """Limits of a choice. None is no limit.

    Attributes:
        effect: largest sum of effects, unmeasured layers included.
        min_share_8bit: least fraction of all linear weights in formats of at most 8 bits at every step.
        max_bits: largest mean bits of a linear weight, scales included.
    """

    effect: float | None = None
    min_share_8bit: float | None = None
    max_bits: float | None = None


def solve(problem: Problem, limits: Limits, *, least: str = "cost", time_limit_s: float = 20.0) -> Solution:
    """Minimise the cost (or the effect) of a problem.

    One binary per group, range of steps and format, exactly one format each. Effects add: the roundings of different layers
    are independent. The bytes of a format that a group has in any range of steps count once.

    Args:
        least: quantity to minimise: `"cost"`, or `"effect"` for the least effect under the other limits.

    Raises:
        WanlabError: no choice keeps the limits (the message names the nearest), or none was found in time.
    """
    options = problem.options
    kept = undominated(problem)
    rows = options.iloc[kept].reset_index(drop=True)
    count = len(rows)
    pairs = rows[["group", "format"]].apply(tuple, axis=1)
    held_codes, held_formats = _numbered(pairs)
    group_codes, groups = _numbered(rows["group"])
    first = rows.groupby(held_codes).first()
    size, few = first["size_bytes"].to_numpy(float), rows["bits"].to_numpy() <= 8
    weights = rows.groupby(group_codes)["weights"].first().to_numpy(float)
    total = problem.weights
    x, h, z = 0, count, count + len(held_formats)  # choices, formats held, groups in few bits throughout
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
    # z of a group is at most 1 where it has a few-bit format in every range of steps, else 0
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
        share = limits.min_share_8bit - problem.rest_few / total
        add([(np.zeros(len(groups), int), z + np.arange(len(groups)), weights / total)], share, np.inf, 1)
    if limits.max_bits is not None:
        room = limits.max_bits - 8 * problem.rest_bytes / total
        add(
            [(np.zeros(len(held_formats), int), h + np.arange(len(held_formats)), 8 * size / total)],
            -np.inf,
            room,
            1,
        )

    target = np.zeros(width)
    if least == "effect":
        target[:count] = effects / (effects.max() or 1.0)
    elif problem.objective == "memory":
        target[h : h + len(held_formats)] = size / size.max()
    else:
        target[:count] = rows["cost"].to_numpy(float) / rows["cost"].max()
    integral = np.zeros(width)
    integral[:count] = 1
    result = milp(
        target,
        constraints=constraints,
        integrality=integral,
        bounds=Bounds(0, 1),
        options={"time_limit": time_limit_s, "mip_rel_gap": GAP},
    )
    if result.x is None:
        raise WanlabError(_impossible(problem, limits, least, result))
    chosen = np.flatnonzero(result.x[:count] > 0.5)
    gap = None if result.mip_gap is None else float(result.mip_gap)
    return Solution(np.asarray(kept)[chosen], gap, result.status == 0)


def undominated(problem: Problem) -> list[int]:
    """Options to which no other format of the same group is at least equal in every quantity and range of steps.

    Costs and bytes within `Problem.tie` count as equal: measured times are not more certain, and the bytes of scales alone
    shall not decide. With a tie of 0 every best choice stays.
    """
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
    codes, known = pd.factorize(values)
    return codes, list(known)


def _first(codes, places):
    """Group of every place (a group in a range of steps)."""
    return pd.Series(codes).groupby(places).first().to_numpy()


def _impossible(problem: Problem, limits: Limits, least: str, result) -> str:
    """Message for limits that no choice keeps."""
    parts = [
        f"an effect of at most {limits.effect:.3g}" if limits.effect is not None else "",
        f"{100 * limits.min_share_8bit:.0f} % of linear weights in 8 bits"
        if limits.min_share_8bit is not None
        else "",
        f"{limits.max_bits:.2f} bits per weight" if limits.max_bits is not None else "",
    ]
    wish = " and ".join(part for part in parts if part) or "these options"
    if result.status == 1:
        return f"no plan with {wish} was found in time; give time_limit_s more, or group='projection'"
    if limits.effect is None or least == "effect":
        return f"no plan has {wish}; measure formats of fewer bits, or ask for less"
    try:
        near = solve(problem, Limits(None, limits.min_share_8bit, limits.max_bits), least="effect")
    except WanlabError as error:
        return str(error)
    least_effect = problem.options.loc[near.chosen, "effect"].sum() + problem.rest_effect
    return f"no plan has {wish}; the least effect under the other limits is {least_effect:.3g}"
