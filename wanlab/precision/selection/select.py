"""The plan that saves the most within a budget, written as few readable rules."""

from __future__ import annotations

import difflib
import fnmatch
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from msgspec import structs

from wanlab.core.errors import WanlabError
from wanlab.precision.assignment import made_for, natural
from wanlab.precision.calibration import calibrate
from wanlab.precision.plan import IN_BLOCKS, Plan, Rule, load_plan, make_plan, save_plan
from wanlab.precision.recording import random_recording
from wanlab.precision.selection.bound import predict
from wanlab.precision.selection.costs import DEFAULT, layer_costs
from wanlab.precision.selection.solve import Limits, Problem, Solution, make_problem, solve
from wanlab.precision.sensitivity.measure import sensitivity as measure_sensitivity


@dataclass(frozen=True)
class Layer:
    """One linear layer and its chosen formats.

    Attributes:
        formats: (first_step, last_step, format), in order; one with None, None where the step does not matter.
    """

    component: str
    layer: str
    block: int | None
    projection: str
    formats: tuple[tuple[int | None, int | None, str], ...]


@dataclass(frozen=True)
class _Area:
    """Layers that get the same formats: blocks (None is all), patterns, and these formats."""

    blocks: tuple[int, ...] | None
    layers: tuple[str, ...]
    formats: tuple[tuple[int | None, int | None, str], ...]
    component: str = "*"


def compress(
    layers: Iterable[Layer],
    *,
    name: str,
    default: str = "model",
    num_steps: int | None = None,
    note: str = "",
) -> Plan:
    """A short list of rules that gives every layer its formats, checked layer by layer.

    A format for most layers, others for whole projections or blocks, then exceptions; rules that all experts share are
    written once.

    Args:
        layers: layers of all experts; the rules change no others.
        num_steps: number of steps; needed where formats change with the step.

    Raises:
        WanlabError: a layer twice, or formats by steps without their number.
    """
    layers = list(layers)
    parts: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        parts[layer.component].append(layer)
    if len({(each.component, each.layer) for each in layers}) < len(layers):
        raise WanlabError("a layer has two formats; give every layer once")
    for written in (_joined({c: _areas(own) for c, own in parts.items()}), _one_by_one(layers)):
        plan = make_plan(
            name,
            default,
            [r for area in written for r in _rules(area)],
            num_steps=_needed(layers, num_steps),
            note=note,
        )
        if _gives(plan, parts):
            return plan
    raise WanlabError("these layers' names cannot be written as rules; they have the signs * ? [ in them")


def _needed(layers: Sequence[Layer], num_steps: int | None) -> int | None:
    return num_steps if any(first is not None for each in layers for first, _, _ in each.formats) else None


def _areas(layers: Sequence[Layer]) -> list[_Area]:
    """Rules of one expert, in order."""
    cells = {(each.block, each.projection): each.formats for each in layers if each.block is not None}
    written = min(_attempts(cells), key=lambda areas: (sum(len(a.formats) for a in areas), len(str(areas))))
    outside = defaultdict(list)
    for each in layers:
        if each.block is None and each.formats != _KEPT:
            outside[each.formats].append(each.layer)
    alone = [each.layer for each in layers if each.block is None]
    rest = [_Area(None, _globs(names, alone), formats) for formats, names in outside.items()]
    # Such a name may be that of a projection too (HunyuanVideo's proj_out): the rules of the blocks come after it, and what
    # they keep is said.
    globs = [glob for area in rest for glob in area.layers]
    kept = {
        place: formats
        for place, formats in cells.items()
        if formats == _KEPT and any(fnmatch.fnmatchcase(place[1], glob) for glob in globs)
    }
    return rest + _exceptions(kept, 1, sorted({name for _, name in cells}, key=natural)) + written


_KEPT = ((None, None, DEFAULT),)


def _attempts(cells: dict):
    """Several lists of areas that give the layers of the blocks their formats."""
    if not cells:
        yield []
        return
    common = [formats for formats, _ in Counter(cells.values()).most_common()]
    names = sorted({projection for _, projection in cells}, key=natural)
    for base in dict.fromkeys([*common[:4], _KEPT]):
        start = [] if base == _KEPT else [_Area(None, (IN_BLOCKS,), base)]
        for nested in (None, 0, 1):
            middle, current = _lines(cells, base, nested, names)
            left = {place: formats for place, formats in cells.items() if formats != current[place]}
            for axis in (0, 1):
                yield start + middle + _exceptions(left, axis, names)


def _lines(cells: dict, base, axis: int | None, names: list[str]) -> tuple[list[_Area], dict]:
    """Rules for whole blocks (axis 0) or projections (1), most of whose layers differ from the base."""
    current = dict.fromkeys(cells, base)
    if axis is None:
        return [], current
    lines: dict = defaultdict(list)
    for place, formats in cells.items():
        lines[place[axis]].append(formats)
    usual = {line: Counter(formats_of_line).most_common(1)[0][0] for line, formats_of_line in lines.items()}
    together: dict = defaultdict(list)
    for line, formats in usual.items():
        if formats != base:
            together[formats].append(line)
    # A name without a dot, such as proj_out, may also be that of a layer outside the blocks.
    whole = tuple(sorted({block for block, _ in cells}))
    areas = [
        _Area(tuple(sorted(formats_of_line)), ("*",), formats)
        if axis == 0
        else _Area(
            None if all("." in name for name in formats_of_line) else whole,
            _globs(formats_of_line, names),
            formats,
        )
        for formats, formats_of_line in together.items()
    ]
    return areas, {place: usual[place[axis]] for place in cells}


def _exceptions(left: dict, axis: int, names: list[str]) -> list[_Area]:
    """Rules for single layers; those with the same blocks (axis 1) or projections (axis 0) share one."""
    lines: dict = defaultdict(set)
    for place, formats in left.items():
        lines[place[axis], formats].add(place[1 - axis])
    together: dict = defaultdict(list)
    for (line, formats), others in lines.items():
        together[frozenset(others), formats].append(line)
    areas = []
    for (others, formats), group in together.items():
        blocks, projections = (group, others) if axis == 0 else (others, group)
        areas.append(_Area(tuple(sorted(blocks)), _globs(projections, names), formats))
    return sorted(areas, key=lambda area: (str(area.formats), area.blocks, area.layers))


def _globs(names: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Patterns for names: `attn1.*` where all known names with this beginning are among them."""
    names, globs = set(names), []
    for prefix in dict.fromkeys(name.split(".")[0] for name in known):
        own = {name for name in known if name.split(".")[0] == prefix}
        if len(own) > 1 and own <= names:
            globs.append(f"{prefix}.*")
            names -= own
    return tuple(sorted([*globs, *names], key=natural))


def _joined(parts: dict[str, list[_Area]]) -> list[_Area]:
    """Rules of all experts as one list; rules of both lists, in the same order, are written once."""
    names = list(parts)
    if len(names) == 1:
        return parts[names[0]]
    first, second = (parts[name] for name in names[:2])
    if len(names) > 2:
        return [replace(area, component=name) for name in names for area in parts[name]]
    areas: list[_Area] = []
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            areas += first[a:b]
        else:
            areas += [replace(area, component=names[0]) for area in first[a:b]]
            areas += [replace(area, component=names[1]) for area in second[c:d]]
    return areas


def _one_by_one(layers: Sequence[Layer]) -> list[_Area]:
    """A rule for every layer, those outside the blocks first, as their names may be those of projections too."""
    first = [each for each in layers if each.block is None and each.formats != _KEPT]
    names = {(each.component, each.layer) for each in first}
    then = [
        each
        for each in layers
        if each.block is not None and (each.formats != _KEPT or (each.component, each.projection) in names)
    ]
    return [_Area(None, (each.layer,), each.formats, each.component) for each in [*first, *then]]


def _rules(area: _Area):
    blocks = None if area.blocks is None else _spans(area.blocks)
    for first, last, format in area.formats:
        steps = None if first is None else _spans(range(first, last + 1))
        yield Rule(format=format, component=area.component, blocks=blocks, layers=area.layers, steps=steps)


def _spans(numbers: Sequence[int]) -> str:
    """`(0, 1, 2, 5)` as `"0-2, 5"`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in spans)


def _gives(plan: Plan, parts: dict[str, list[Layer]]) -> bool:
    """Whether the rules give every layer its formats at every step, matched as `assign` does it."""
    for component, layers in parts.items():
        count = max((each.block + 1 for each in layers if each.block is not None), default=0)
        chosen = [
            (rule, rule.block_numbers(count), rule.step_numbers())
            for rule in plan.rules
            if fnmatch.fnmatchcase(component, rule.component)
        ]
        for each in layers:
            fits = [
                (rule.format, steps)
                for rule, blocks, steps in chosen
                if (blocks is None or each.block in blocks)
                and any(
                    (g == IN_BLOCKS and each.block is not None)
                    or fnmatch.fnmatchcase(each.layer, g)
                    or fnmatch.fnmatchcase(each.projection, g)
                    for g in rule.layers
                )
            ]
            for first, last, expected in each.formats:
                whole = range(plan.num_steps or 1)
                for step in whole if first is None else whole[first : last + 1]:
                    fitting = [format for format, steps in fits if steps is None or step in steps]
                    if (fitting[-1] if fitting else DEFAULT) != expected:
                        return False
    return True


@dataclass(frozen=True, eq=False)
class Selection:
    """A chosen plan with its predicted effect and cost.

    Attributes:
        plan: plan as rules.
        frame: one row per layer and range of steps: component, layer, block, projection, first_step, last_step (None where
            the step does not matter), format, effect (of its group), group.
        effect: predicted squared relative change of the final latents, unmeasured layers included. budget: limit of it.
        cost, default_cost: cost of the chosen layers, in `unit`: as planned, and as loaded.
        size_bytes, default_bytes: size of all linear weights.
        bits_per_weight: mean over linear weights, scales included. share_8bit: share of linear weights in at most 8 bits.
        optimal: whether the solver proved it cheapest, within 0.01 %. solve_ms: its time.
        problem, limits, chosen: problem and limits that were solved and options that were chosen, for `repair`.
    """

    plan: Plan
    frame: pd.DataFrame
    effect: float
    budget: float | None
    cost: float
    default_cost: float
    unit: str
    size_bytes: int
    default_bytes: int
    bits_per_weight: float
    share_8bit: float
    optimal: bool
    solve_ms: float
    problem: Problem = field(repr=False)
    limits: Limits = field(repr=False)
    chosen: Any = field(repr=False)

    @property
    def saved_percent(self) -> float:
        """Share of the cost of the chosen layers that is saved."""
        return 100 * (1 - self.cost / self.default_cost)

    def row(self) -> dict[str, Any]:
        """One table row."""
        return {
            "plan": self.plan.name,
            "rules": len(self.plan.rules),
            "effect": self.effect,
            "cost": self.cost,
            "unit": self.unit,
            "saved_percent": self.saved_percent,
            "size_bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "share_8bit_percent": 100 * self.share_8bit,
            "optimal": self.optimal,
        }

    def formats(self) -> pd.DataFrame:
        """Layers and weights by component and format."""
        rows = self.frame.drop_duplicates(["component", "layer", "format"])
        return rows.groupby(["component", "format"], as_index=False).agg(layers=("layer", "count"))

    def __str__(self) -> str:
        return (
            f"{self.plan.name}: {len(self.plan.rules)} rules, {self.bits_per_weight:.2f} bits per linear weight,"
            f" {100 * self.share_8bit:.0f} % of them in 8 bits or fewer, {self.saved_percent:.1f} % of {self.unit} saved,"
            f" predicted effect {self.effect:.2g}"
        )


def select_plan(
    sensitivity,
    costs: pd.DataFrame,
    *,
    objective: str = "memory",
    budget: float | None = None,
    formats: Sequence[str] | None = None,
    min_share_8bit: float | None = None,
    max_bits: float | None = None,
    group: str = "layer",
    by_steps: bool = False,
    rest: str = DEFAULT,
    rest_effect: float = 0.0,
    name: str = "selected",
    time_limit_s: float = 20.0,
) -> Selection:
    """Choose a format for every layer, so that the cost is least and the sum of effects within the budget.

    Args:
        sensitivity: `Sensitivity`, or a table with its columns.
        costs: table of `layer_costs` with the same formats.
        objective: `"memory"`: bytes of weights; `"time"`: measured milliseconds of a generation, or counted operations where
            nothing was measured. Weight-only formats save memory but no time; formats that round inputs too save both.
        budget: largest predicted effect; None is no limit. `precision.fit_relation` gives it for a quality loss.
        formats: formats to choose from besides `"default"`; None takes all that were measured. Floats mean the default.
        min_share_8bit: fraction of all linear weights that must be in formats of 8 bits or fewer at every step.
        max_bits: largest mean bits of a linear weight.
        group: layers that get one format together: each `"layer"`, a `"projection"` in all blocks of an expert, or a
            whole `"block"`.
        by_steps: whether each range of steps has its own choice. A layer then holds the weights of all its formats.
        rest: format of linear layers that were not measured (embedders, output).
        rest_effect: effect of rounding these, see `measured_effect`.
        name: name of the plan.
        time_limit_s: time limit of the solver; then its best choice so far is taken.

    Raises:
        WanlabError: tables that do not fit, or limits that no plan keeps (the message names the nearest).
    """
    problem = make_problem(
        sensitivity,
        costs,
        objective=objective,
        formats=formats,
        group=group,
        by_steps=by_steps,
        rest=rest,
        rest_effect=rest_effect,
    )
    return chosen_plan(
        problem, Limits(budget, min_share_8bit, max_bits), name=name, time_limit_s=time_limit_s
    )


def chosen_plan(
    problem: Problem, limits: Limits, *, name: str, least: str = "cost", time_limit_s: float = 20.0
) -> Selection:
    """Solve a problem and write the plan; see `select_plan`."""
    begin = time.perf_counter()
    solution = solve(problem, limits, least=least, time_limit_s=time_limit_s)
    return selection_of(problem, limits, solution, name, (time.perf_counter() - begin) * 1e3)


def selection_of(
    problem: Problem, limits: Limits, solution: Solution, name: str, solve_ms: float = 0.0
) -> Selection:
    """A solution as a plan with its prediction."""
    options = problem.options.loc[solution.chosen].sort_values(["group", "first_step"])
    frame = _frame(problem, options)
    by_format = options.drop_duplicates(["group", "format"])
    always = (options["bits"] <= 8).groupby(options["group"]).all()
    weights = options.groupby("group")["weights"].first()
    size = int(by_format["size_bytes"].sum()) + problem.rest_bytes
    defaults = problem.options[problem.options["format"] == DEFAULT]
    memory = problem.objective == "memory"
    whole = defaults.drop_duplicates("group") if memory else defaults
    layers = [*_layers(frame), *_rest(problem)]
    total = problem.weights
    return Selection(
        plan=compress(layers, name=name, num_steps=problem.num_steps),
        frame=frame,
        effect=float(options["effect"].sum()) + problem.rest_effect,
        budget=limits.effect,
        cost=float((by_format["size_bytes"] if memory else options["cost"]).sum()),
        default_cost=float(whole["cost"].sum()),
        unit=problem.unit,
        size_bytes=size,
        default_bytes=int(defaults.drop_duplicates("group")["size_bytes"].sum()) + problem.rest_default_bytes,
        bits_per_weight=8 * size / total,
        share_8bit=float((weights[always].sum() + problem.rest_few) / total),
        optimal=solution.optimal,
        solve_ms=solve_ms,
        problem=problem,
        limits=limits,
        chosen=solution.chosen,
    )


def _frame(problem: Problem, options: pd.DataFrame) -> pd.DataFrame:
    columns = ["group", "first_step", "last_step", "format", "effect"]
    frame = problem.members.merge(options[columns], on="group")
    if not problem.by_steps:
        frame[["first_step", "last_step"]] = None
    return frame.astype({"first_step": "Int64", "last_step": "Int64"})


def _layers(frame: pd.DataFrame):
    """The layers of a frame, with neighbouring ranges of one format joined."""
    for (component, layer), rows in frame.groupby(["component", "layer"], sort=False):
        spans: list[list] = []
        for row in rows.sort_values("first_step").itertuples():
            if spans and spans[-1][2] == row.format:
                spans[-1][1] = row.last_step
            else:
                spans.append([row.first_step, row.last_step, row.format])
        formats = (
            tuple((int(a), int(b), f) for a, b, f in spans)
            if len(spans) > 1
            else ((None, None, spans[0][2]),)
        )
        block = rows["block"].iloc[0]
        yield Layer(
            component, layer, None if pd.isna(block) else int(block), rows["projection"].iloc[0], formats
        )


def _rest(problem: Problem):
    for row in problem.rest.itertuples():
        block = None if pd.isna(row.block) else int(row.block)
        yield Layer(row.component, row.layer, block, row.projection, ((None, None, row.format),))


@dataclass(frozen=True, eq=False)
class Frontier:
    """Plans from loose to tight budgets, each the cheapest within its own.

    Attributes:
        selections: selections, cheapest first; no two are the same plan.
        frame: rows of the selections.
    """

    selections: tuple[Selection, ...]
    frame: pd.DataFrame

    def spread(self, count: int) -> list[Selection]:
        """About `count` of them, evenly from cheap to expensive, without those that have no effect."""
        useful = [each for each in self.selections if each.effect > each.problem.rest_effect]
        if not useful:
            raise WanlabError(
                "every plan of the frontier leaves all layers as they are; measure more formats"
            )
        places = np.unique(np.linspace(0, len(useful) - 1, count).round().astype(int))
        return [useful[place] for place in places]


def frontier(
    sensitivity, costs: pd.DataFrame, *, points: int = 10, name: str = "frontier", **settings: Any
) -> Frontier:
    """The cheapest plans within budgets from loose to tight, evenly in their logarithm.

    Args:
        points: number of budgets; equal plans count once.
        settings: settings of `select_plan`, without the budget.

    Raises:
        WanlabError: as `select_plan`.
    """
    limit_s = settings.pop("time_limit_s", 20.0)
    share, bits = settings.pop("min_share_8bit", None), settings.pop("max_bits", None)
    problem = make_problem(sensitivity, costs, objective=settings.pop("objective", "memory"), **settings)

    def at(effect: float | None, least: str = "cost") -> Selection:
        return chosen_plan(problem, Limits(effect, share, bits), name=name, least=least, time_limit_s=limit_s)

    loose, tight = at(None), at(None, "effect")
    smallest = problem.options.loc[problem.options["effect"] > 0, "effect"].min()
    lowest = max(tight.effect, loose.effect * 1e-4, min(float(smallest), loose.effect))
    budgets = np.geomspace(loose.effect, lowest, points)[1:] if loose.effect > lowest > 0 else []
    by_hash = {each.plan.hash: each for each in [loose, *(at(float(b)) for b in budgets), tight]}
    ordered = sorted(by_hash.values(), key=lambda each: (each.cost, -each.effect))
    best: list[Selection] = []
    for each in ordered:
        if not best or each.effect < best[-1].effect:
            best.append(each)
    named = [_named(each, structs.replace(each.plan, name=f"{name}-{i}")) for i, each in enumerate(best)]
    return Frontier(tuple(named), pd.DataFrame([each.row() for each in named]))


def _named(selection: Selection, plan: Plan) -> Selection:
    return replace(selection, plan=plan)


TIMED_FORMATS = ("fp8", "fp8-channel", "int8")
TIMED_PRESETS = ("uniform-fp8", "ffn-fp8")
"""Presets that are predicted too; the second plan has at most half the effect of the first of these."""
SMALL_CLIP = {"height": 256, "width": 448, "frames": 17}
"""Size of the clip on which effects are measured where the video is larger, as gradients need several times the memory."""


@dataclass(frozen=True, eq=False)
class PlansByTime:
    """Plans selected by time.

    Attributes:
        plans: name -> plan, the fastest first; one plan alone where that has a small enough effect.
        selected: a row per plan, as `Selection.row`: its cost, effect and shares.
        predicted: cost and effect of presets, from `predict`.
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
    formats: Sequence[str] = TIMED_FORMATS,
    small: Mapping[str, int] | None = None,
    steps: int = 8,
    calls: int = 2,
    probes: int = 2,
    name: str = "",
    progress: bool = True,
) -> PlansByTime:
    """Select two plans for one expert by time, one format per projection so that all blocks are one kind.

    `layer_costs` times every shape of a linear layer in every format as compiled blocks run it (on a CPU it counts
    operations, and the note of the plans states that); `sensitivity` measures on random inputs of a small clip how much each
    layer's rounding changes the latents. With random weights effects only compare layers with one another.

    Args:
        model: model from `wanlab.models.load`, with the expert as loaded.
        height, width, frames: size of the video for which costs are measured; the model's default if not given.
        formats: formats to choose from, beside the model's own.
        small: height, width and frames of the clip that effects are measured on; the smaller of the video and
            `SMALL_CLIP` if not given.
        steps: number of steps of the random recording. calls, probes: as `sensitivity` takes them.
        name: beginning of the plans' names; the model's name if not given.
        progress: whether bars are shown.
    """
    defaults = model.spec.defaults
    given = {"height": height, "width": width, "frames": frames}
    size: dict[str, Any] = {
        key: getattr(defaults, key) if value is None else value for key, value in given.items()
    }
    if small is None:
        small = (
            SMALL_CLIP
            if size["height"] * size["width"] > SMALL_CLIP["height"] * SMALL_CLIP["width"]
            else size
        )
    with tempfile.TemporaryDirectory(prefix="wanlab-by-time-") as folder:
        recording = random_recording(model, component, folder, steps=steps, **small)
        ranges = {component: calibrate(model, component, recording, progress=progress)}
        measured = measure_sensitivity(
            model, recording, ranges, formats=formats, calls=calls, probes=probes, progress=progress
        ).with_bands(1)
    costs = layer_costs(model, formats, progress=progress, **size)
    presets = [load_plan(each) for each in TIMED_PRESETS]
    predicted = predict(model, presets, measured, costs, objective="time")
    limit = float(predicted.set_index("plan").loc[TIMED_PRESETS[0], "effect"]) / 2
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
            continue  # the fastest has at most this effect already
        note = f"selected by time for {model.spec.name} {component} at {size['height']}x{size['width']}x{size['frames']}"
        note += " from costs of compiled layers" if selection.unit == "ms" else f", {selection.unit}"
        plans[selection.plan.name] = structs.replace(selection.plan, note=note, made_for=made_for(model))
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
