"""A plan within a quality budget: relation of effect and quality loss, selection, verification, repair."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from msgspec import structs

from wanlab.core.answer import MOST_DETAILS, Answer, Tile, answer, fitting, step
from wanlab.core.errors import WanlabError
from wanlab.core.stats import bootstrap_mean
from wanlab.core.words import component_text, counted, listed, shown
from wanlab.precision.assignment import made_for
from wanlab.precision.plan import Plan, make_plan
from wanlab.precision.selection.bound import AmdahlBound
from wanlab.precision.selection.costs import DEFAULT
from wanlab.precision.selection.select import Frontier, Selection, frontier, select_plan, selection_of
from wanlab.precision.selection.solve import Limits, Solution, table_of, undominated
from wanlab.precision.selection.verify import (
    LOSS,
    Originals,
    Verification,
    for_choosing,
    measured_effect,
    verify_plan,
)

FORMS = {"linear": 1.0, "square root": 0.5}
"""Name -> exponent of the effect. A loss that grows with the square of errors is linear in the effect; one that grows with
their size, as the spread over cases does where errors improve as often as they harm, is linear in its root."""

MARGIN = 0.8
"""Share of the limit for which the budget is set, as the interval of a plan varies with its noise."""


@dataclass(frozen=True, eq=False)
class Relation:
    """Upper end of the quality loss as a function of the effect: `scale * effect ** exponent`.

    Attributes:
        form: name of `FORMS`. scale: percent at an effect of 1.
        residual_percent: root mean square distance of the fitted from the measured upper ends, in percent of quality loss.
        points: one row per plan: plan, predicted (effect), effect (true), loss_percent, upper_percent, fitted_percent.
        judged: what upper ends are of: `LOSS`, or `DIVERGENCE` where no truth is known.
    """

    form: str
    scale: float
    residual_percent: float
    points: pd.DataFrame
    judged: str = LOSS

    def upper_percent(self, effect: float) -> float:
        """Predicted upper end of the quality loss of a plan of this predicted effect."""
        return self.scale * effect ** FORMS[self.form]

    def budget(self, limit_percent: float, *, margin: float = MARGIN) -> float:
        """The effect whose predicted upper end is the limit times a margin.

        It is at most the largest effect that was measured; nothing is known beyond.
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
        quantity = "effect" if self.form == "linear" else "the root of the effect"
        return (
            f"upper end of the {self.judged} = {self.scale:.3g} % x {quantity}, from {len(self.points)} plans,"
            f" {self.residual_percent:.2g} % off in the root mean square"
        )


def fit_relation(predicted: Sequence[float], verifications: Sequence[Verification]) -> Relation:
    """Fit the upper end of the quality loss to predicted effects, through the origin; the form that fits better is taken.

    Args:
        predicted: predicted effect of each plan. verifications: verifications of the same plans, with truths.

    Raises:
        WanlabError: fewer than two plans, no quality loss, or no effect.
    """
    if len(predicted) != len(verifications) or len(predicted) < 2:
        raise WanlabError(f"{len(verifications)} verified plans make no relation; verify two or more")
    upper = [each.upper_percent for each in verifications]
    judged = {each.judged for each in verifications}
    if len(judged) > 1:
        raise WanlabError(
            "some plans were verified with truths and some without; verify them on the same cases"
        )
    if not all(effect > 0 for effect in predicted):
        raise WanlabError("a plan without predicted effect says nothing of the relation; leave it out")
    form, scale, residual = fit(list(predicted), [max(0.0, value) for value in upper])
    points = pd.DataFrame(
        {
            "plan": [each.plan.name for each in verifications],
            "predicted": list(predicted),
            "effect": [each.effect for each in verifications],
            "loss_percent": [
                math.nan if each.quality.percent is None else each.quality.percent for each in verifications
            ],
            "upper_percent": upper,
            "fitted_percent": [scale * effect ** FORMS[form] for effect in predicted],
        }
    )
    return Relation(form, scale, residual, points, judged.pop())


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


PAIRED = ("lpips", "loss_percent")


def compare_plans(verifications: Sequence[Verification], *, seed: int = 0) -> pd.DataFrame:
    """One row per plan, with its differences to the first plan on the same cases.

    Args:
        verifications: results of `verify_plan` on the same cases.
        seed: seed of the bootstrap.

    Returns:
        DataFrame: the columns of `Verification.row`, and for lpips and loss_percent the difference to the first plan as
        `_more`, mean over cases, with its 95 % bootstrap interval `_more_low` and `_more_high` (NaN for the first).

    Raises:
        WanlabError: no verification, or other cases.
    """
    if not verifications:
        raise WanlabError("no verified plan to compare; give at least one")
    first, rows = verifications[0], []
    for each in verifications:
        if (each.purpose, list(each.frame["case"])) != (first.purpose, list(first.frame["case"])):
            raise WanlabError(
                f"{each.plan.name} was verified on other cases than {first.plan.name}; take the same originals"
            )
        row = each.row()
        for metric in PAIRED if each is not first else ():
            difference = (each.frame[metric] - first.frame[metric]).to_numpy(float)
            low, high = bootstrap_mean(difference, seed) or (math.nan, math.nan)
            row |= {
                f"{metric}_more": float(difference.mean()),
                f"{metric}_more_low": low,
                f"{metric}_more_high": high,
            }
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class Repaired:
    """A plan after its repairs.

    Attributes:
        selection: the last selection. verification: its verification.
        holds: whether the upper end of its quality loss is within the limit.
        history: one row per round: round, plan, raised (number of groups with a better format), effect (predicted), cost,
            loss_percent, upper_percent, holds.
        generations: number of generations of all rounds.
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
    """Verify a plan; while its quality loss exceeds the limit, give better formats to the groups with most effect per cost.

    Each round lowers the predicted effect as far as the relation requires, by at least one group. Limits on bits and on the
    share of 8 bits still apply; that on the effect is replaced.

    Args:
        selection: result of `select_plan` or `frontier`. originals: originals of cases to choose by, never of the final set.
        limit_percent: limit of the upper end of the quality loss.
        verification: verification of this plan, where it was verified already.
        relation: relation of effect and loss; linear if not given.
        max_rounds: largest number of repairs; the history ends there even if the loss exceeds the limit.
        settings: settings of `verify_plan`.

    Raises:
        WanlabError: cases of the final set, or as `verify_plan`.
    """
    for_choosing(originals)
    exponent = FORMS[relation.form] if relation else 1.0
    options: dict[str, Any] = {"calibrations": calibrations, "progress": progress} | settings
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
        upper = verification.upper_percent
        if number == max_rounds or upper is None or upper <= limit_percent:
            break
        target = selection.effect * (MARGIN * limit_percent / upper) ** (1 / exponent)
        better, raised = raise_worst(
            selection, target, f"{name}-with-more-bits{f'-{number + 1}' * (number > 0)}"
        )
        if better is None:
            break
        selection, verification = better, None
    plan = structs.replace(selection.plan, made_for=made_for(model))
    selection = replace(selection, plan=plan)
    return Repaired(selection, verification, holds, pd.DataFrame(rows), generations)


def raise_worst(selection: Selection, target: float, name: str) -> tuple[Selection | None, int]:
    """The plan with formats raised until its effect is at most a target, largest effect per cost first.

    Returns:
        The plan and how many formats were raised; None and 0 where no format can be raised.
    """
    problem, limits = selection.problem, replace(selection.limits, effect=None)
    options = problem.options
    chosen = {(row.group, row.first_step): row.Index for row in options.loc[selection.chosen].itertuples()}
    useful = options.loc[undominated(problem)]
    choices = useful.groupby(["group", "first_step"]).groups
    effects, effect, raised = options["effect"].to_numpy(), selection.effect, 0
    # The best ratio of effect saved to cost comes first; steps that break the limits are skipped.
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
    """Every change to a format of less effect: effect saved per cost, group and range of steps, and new option."""
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
        size_bytes = rows.drop_duplicates(["group", "format"])["size_bytes"].sum() + problem.rest_bytes
        if 8 * size_bytes / problem.weights > limits.max_bits + 1e-9:
            return False
    return True


FEW_FORMATS = 2
"""Formats of an expert that a headline names; the others are in the figure."""


def plan_words(frame: pd.DataFrame, *, places: bool = True) -> str:
    """Which expert gets which format: "high-noise expert all int4 weights; low-noise expert int8, 20 % int4 weights
    (cross-attention k and v)".

    Shares are of the linear layers in the blocks, every range of steps counted alike.

    Args:
        frame: `Selection.frame`. places: whether projections are named.
    """
    inside, parts = frame.dropna(subset=["block"]), {}
    for component, own in (inside if len(inside) else frame).groupby("component", sort=False):
        shares = own["format"].value_counts(normalize=True)
        words = [f"{100 * share:.0f} % {format_words(name)}" for name, share in shares.items()][:FEW_FORMATS]
        words += ["others"] * (len(shares) > FEW_FORMATS)
        if len(shares) == FEW_FORMATS and places:
            words[1] += _where(own, shares.index[1])
        alone = f"all {format_words(shares.index[0])}"
        parts[component_text(component)] = alone if len(shares) == 1 else " and ".join(words)
    if len(set(parts.values())) == 1 and len(parts) > 1:
        return f"both experts {next(iter(parts.values()))}"
    return "; ".join(f"{name} {words}" for name, words in parts.items())


def format_words(name: str) -> str:
    """A format in a sentence: "int4-weight" as "int4 weights", "fp8-channel" as "fp8 per channel"."""
    if name == DEFAULT:
        return "as loaded"
    kind, dash, what = name.partition("-")
    return f"{kind} {({'weight': 'weights', 'channel': 'per channel'}).get(what, what)}" if dash else name


PLACES = {"attn1": "self-attention", "attn2": "cross-attention", "ffn": "feed-forward"}
LINES = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "output"}


def _where(own: pd.DataFrame, format: str) -> str:
    """The projections that have a format, in brackets, where it is all layers of few of them; else empty."""
    names = set(own.loc[own["format"] == format, "projection"])
    elsewhere = set(own.loc[own["format"] != format, "projection"])
    split = [name.split(".") for name in sorted(names)]
    if (
        names & elsewhere
        or any(part[0] not in PLACES for part in split)
        or len({part[0] for part in split}) > 1
    ):
        return ""
    lines = [LINES[part[1]] for part in split if part[1] in LINES]
    return f" ({PLACES[split[0][0]]} {listed(lines)})" if lines else f" ({PLACES[split[0][0]]})"


@dataclass(frozen=True, eq=False)
class Chosen:
    """A plan within a quality budget, and the measurements it was chosen by.

    Attributes:
        repaired: plan, prediction and verification on the cases it was chosen by.
        frontier: plans from loose to tight. relation: relation of effect and loss, from those in `probes`.
        budget: limit of the effect. ceiling: another limit of it, None without one. rest_effect: effect of rounding the
            layers that the sensitivity does not know, 0 where they are left as they are.
        limit_percent: limit of the upper end of the quality loss.
        generations: number of plans, the originals apart.
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

    def answer(self, bound: AmdahlBound, plan_file: str | os.PathLike = "") -> Answer:
        """Which expert gets which format, whether the plan keeps the limit on quality, and how sure that is.

        Args:
            bound: what plans can gain in time, from `measured_bound`.
            plan_file: where the plan was saved, for the command that measures it on other cases.
        """
        proof, chosen = self.verification, self.selection
        known, limit = proof.quality.known, self.limit_percent
        share = 100 * proof.weight_bytes / proof.before_bytes
        cases = counted(len(proof.frame), "case")
        lost = proof.quality.text if known else proof.divergence.text
        kept = f"within {limit:g} %" if known else f"LPIPS within {limit / 100:g}"
        limited = f"the quality loss {kept}" if known else f"{kept} of the original"
        if proof.holds(limit):
            words = [plan_words(chosen.frame), plan_words(chosen.frame, places=False)]
            smaller = f"linear weights shrink to {share:.0f} %, "
            tried = [
                f"Use {each}: {size}{lost}, {kept} on the {cases} it was chosen by."
                for each in words
                for size in (smaller, "")
            ]
            headline = fitting(*tried)
        else:
            headline = f"No plan was found that is proven to keep {limited}: {lost}."
            nearest = f"The nearest: {plan_words(chosen.frame)}."
        details = [] if proof.holds(limit) else [nearest]
        details += (
            [] if known else ["No truth is known of this model's videos, so its quality loss is unknown."]
        )
        details += [
            f"All linear layers of the experts together take {shown(proof.weight_bytes, 'bytes')}, {share:.0f} % of the"
            f" {shown(proof.before_bytes, 'bytes')} before.",
            f"In time, plans can make this generation at most {bound.at_format:.2f} times as fast"
            f" ({'counted' if bound.counted else 'timed'} products of {bound.format}).",
        ]
        few = f"{100 * chosen.share_8bit:.0f} % of weights in 8 bits or fewer"
        tiles = (
            Tile("quality loss", *proof.quality.tile(limit)),
            Tile(
                "linear weights",
                shown(proof.weight_bytes, "bytes"),
                f"{share:.0f} % of {shown(proof.before_bytes, 'bytes')} before",
            ),
            Tile("bits per linear weight", f"{chosen.bits_per_weight:.3g}", few),
            Tile("speed-up", f"≤ {bound.at_format:.2f}×", "bound of any plan, not measured here"),
            proof.divergence.tile(),
        )
        following = step("measures the plan on cases that it was not chosen by", "41_configuration", cases=8,
                         plan=os.fspath(plan_file) or self.plan.name, case_set="final")  # fmt: skip
        return answer(headline, *details[:MOST_DETAILS], tiles=tiles, next=following)

    def row(self) -> dict[str, Any]:
        """Flat record: that of the selection, with hash, holds and kernels."""
        proof = self.verification
        return self.selection.row() | {
            "hash": self.plan.hash,
            "holds": self.repaired.holds,
            "kernels": proof.kernels,
        }

    def predictions(self) -> pd.DataFrame:
        """Prediction beside verification of every plan that was generated with.

        Columns: plan, predicted_effect, effect, predicted_upper_percent, upper_percent, loss_percent.
        """
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

    Plans of the frontier, from loose to tight, are verified; upper ends of their quality losses are fitted to their
    predicted effects; the fit gives the budget of the plan, which is then verified, and repaired while its loss is too
    large.

    Args:
        sensitivity: result of `precision.sensitivity`. costs: table of `layer_costs`.
        originals: result of `make_originals` on cases to choose by.
        limit_percent: limit of the upper end of the 95 % interval of the quality loss; where no truth is known (text to
            video), of the divergence: LPIPS to the unchanged model's videos, in percent.
        ceiling: further limit of the predicted effect, e.g. below that of a plan that must be improved on.
        probes: number of plans of the frontier to verify, at least 2. points: number of budgets of the frontier.
        calibrations: calibrations as `apply_plan` takes them.
        rest: format of linear layers that were not measured (embedders, output). Its effect is measured on the
            cases, unless `rest_effect` is among the settings.
        settings: settings of `select_plan`: objective, formats, min_share_8bit, max_bits, group, by_steps.

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
            generations += len(originals.outputs)
        settings["rest"] = rest
    plans = frontier(sensitivity, costs, points=points, **settings)
    options: dict[str, Any] = {"calibrations": calibrations, "progress": progress}
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
    """The measured effect of rounding all linear layers outside the sensitivity, and no others."""
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
