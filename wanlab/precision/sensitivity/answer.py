"""What a sensitivity says at the top of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from wanlab.core.answer import Answer, Step, Tile, answer, step
from wanlab.core.stats import interval_text
from wanlab.core.words import between_text, capital, component_text, counted, listed, shown
from wanlab.precision.sensitivity.agreement import Agreement
from wanlab.precision.sensitivity.result import ExpertTolerance, Sensitivity


def sensitivity_answer(
    found: Sensitivity,
    tolerance: ExpertTolerance,
    truth: Agreement | None,
    format: str,
    *,
    shard: int = 0,
    shards: int = 1,
) -> Answer:
    """Which expert tolerates a format less, which of its layers bear that and when, and whether the prediction is right.

    All changes are relative changes of the final latents in percent, of one format.

    Args:
        tolerance: from `expert_tolerance`. truth: from `end_to_end_agreement`, None where it was not made.
        format: the format that the answer is about.
        shard, shards: the part of the work that this run measured.
    """
    rows = found.ranked()
    rows = rows[rows["format"] == format]
    top = rows.iloc[0].to_dict()
    moved = change_percent(top["effect"])
    known = between_text(change_percent(top["effect_low"]), change_percent(top["effect_high"]))
    alike = int((rows["effect_high"].iloc[1:] >= top["effect_low"]).sum())
    head, tiles = _experts(tolerance, format)
    if not found.complete:
        head = f"Part {shard + 1} of {shards} only, so nothing is decided yet. {head}"
    where = f"{top['layer']} of the {component_text(top['component'])}, {steps_text(top)}"
    order = f"the order of the first {alike + 1} is undecided" if alike else "it is clearly ahead of the next"
    when = _when(rows) if found.complete else ""
    return answer(
        f"{head} {when}".strip(),
        f"Of single layers in {format}, {where}, changes the latents most, by {shown(moved, '%')}; {order}.",
        _formats(tolerance, format),
        f"{found.way.rstrip('.')}. What is seen of it in the videos was not measured here.",
        tiles=(
            *tiles,
            Tile(f"largest change by one layer, {format}", shown(moved, "%"), known),
            Tile("predicted ranks against real ones", *_prediction(truth, shards)),
        ),
        next=_next(found, truth, shards),
    )


def change_percent(effect: float) -> float:
    """An effect, which is a squared relative change of the latents, as the change itself in percent."""
    return 100 * math.sqrt(max(effect, 0.0))


def steps_text(row: Mapping[str, Any]) -> str:
    """The steps of a row in words, counted from 1: "step 3", "steps 1 to 2"."""
    first, last = row["first_step"] + 1, row["last_step"] + 1
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _experts(tolerance: ExpertTolerance, format: str) -> tuple[str, tuple[Tile, ...]]:
    """How far rounding each expert whole changes the latents, as a sentence and key figures."""
    frame = tolerance.frame[tolerance.frame["format"] == format].to_dict("records")
    moved = {row["component"]: shown(change_percent(row["effect"]), "%") for row in frame}
    known = {
        row["component"]: between_text(*(change_percent(row[f"effect_{end}"]) for end in ("low", "high")))
        for row in frame
    }
    tiles = tuple(
        Tile(f"{component_text(name)}, all in {format}", percent, known[name])
        for name, percent in moved.items()
    )
    expert = tolerance.less_tolerant(format)
    if expert is None:
        (name, percent), *_ = moved.items()
        return (
            f"One expert was measured: in {format} all its layers change the final latents by {percent} ({known[name]}).",
            tiles,
        )
    if expert == "neither":
        both = " and ".join(f"the {component_text(name)} by {percent}" for name, percent in moved.items())
        return (
            f"In {format} neither expert clearly tolerates less. Rounding all layers changes the final latents: {both}.",
            tiles,
        )
    other = next(name for name in moved if name != expert)
    return (
        f"In {format} the {component_text(expert)} tolerates less: rounding all its layers changes the final latents by"
        f" {moved[expert]} ({known[expert]}), those of the {component_text(other)} by {moved[other]}.",
        tiles,
    )


def _when(rows: pd.DataFrame) -> str:
    """The range of steps that bears most of the effect, of its own expert, where there are several."""
    sums = rows.groupby(["component", "first_step", "last_step"])["effect"].sum()
    component = sums.idxmax()[0]
    own = sums[component]
    if len(own) < 2 or own.sum() <= 0:
        return ""
    first, last = own.idxmax()
    share = 100 * own.max() / own.sum()
    when = steps_text({"first_step": first, "last_step": last})
    verb = "causes" if first == last else "cause"
    return f"{capital(when)} {verb} {share:.0f} % of what the {component_text(component)} adds."


def _formats(tolerance: ExpertTolerance, format: str) -> str:
    """The other formats in one sentence: both experts rounded whole."""
    sums = tolerance.frame.groupby("format", sort=False)["effect"].sum()
    others = [f"{name} {shown(change_percent(effect), '%')}" for name, effect in sums.items()]
    return f"All measured layers at once change the latents by: {listed(others)}." if len(sums) > 1 else ""


def _prediction(truth: Agreement | None, shards: int) -> tuple[str, str]:
    """How well predicted effects rank choices of layers in whole generations."""
    if truth is None:
        return "not checked", "no generation was made" if shards == 1 else "checked when all parts are merged"
    found = truth.correlation()
    value = "unknown" if found.value is None else f"{found.value:.2f}"
    ends = interval_text(found.low, found.high)
    return value, f"rank correlation of {counted(len(truth.frame), 'generated choice')}, 1 is perfect; {ends}"


def _next(found: Sensitivity, truth: Agreement | None, shards: int) -> Step:
    """What to do next."""
    if not found.complete:
        return step(f"merges the {shards} parts", shard=0, shards=1)
    if truth is None:
        return step("checks the prediction in whole generations", samples=18)
    return step(
        "chooses a format for every layer and measures the quality that it costs", "31_precision_plan"
    )
