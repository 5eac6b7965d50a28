"""What a sensitivity says at the top of a report."""

from __future__ import annotations

import math
from typing import Any

from wanlab.core.answer import Answer, Tile
from wanlab.core.stats import interval_text
from wanlab.core.words import between_text, component_text, shown
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
    """Which expert tolerates a format less, which layer is the most sensitive, and whether that is right.

    Args:
        tolerance: from `expert_tolerance`. truth: from `end_to_end_agreement`, None where it was not made.
        format: the format that the headline is about.
        shard, shards: the part of the work that this run measured.
    """
    top = found.ranked(1).iloc[0].to_dict()
    moved, ends = (
        change_percent(top["effect"]),
        (change_percent(top["effect_low"]), change_percent(top["effect_high"])),
    )
    most = f"{shown(moved, '%')} ({between_text(*ends)})"
    where = f"{top['layer']} of the {component_text(top['component'])} in {top['format']}"
    steps = f"steps {top['first_step']} to {top['last_step']}"
    head, tile = _experts(tolerance, format)
    if head is None:
        head = f"One expert was measured: its most sensitive layer alone moves the final latents by {most}"
    if not found.complete:
        head = f"Part {shard + 1} of {shards} only, so nothing is decided yet. {head}"
    cost = found.costs().iloc[0]
    return Answer(
        f"{head}.",
        (
            f"The most sensitive: {where} at {steps}; rounded alone it moves the final latents by {most}.",
            found.way,
            _next(found, truth, shards),
        ),
        (
            *tile,
            Tile(
                "largest change by a layer",
                shown(moved, "%"),
                f"{between_text(*ends)}; of the final latents",
            ),
            Tile("prediction", *_prediction(truth, shards)),
            Tile(
                "cost",
                f"{cost['forward_equivalents']:,.0f} forwards",
                f"{shown(cost['percent_of_brute_force'], '%')} of rounding one layer at a time",
            ),
        ),
    )


def change_percent(effect: float) -> float:
    """An effect, which is a squared relative change of the latents, as the change itself in percent."""
    return 100 * math.sqrt(max(effect, 0.0))


def _experts(tolerance: ExpertTolerance, format: str) -> tuple[str | None, tuple[Tile, ...]]:
    """Which expert tolerates a format less, as a clause and a key figure; None with one expert."""
    expert = tolerance.less_tolerant(format)
    if expert is None:
        return None, ()
    rows = tolerance.ratios[
        (tolerance.ratios["format"] == format) & (tolerance.ratios["quantity"] == "effect")
    ]
    row: dict[str, Any] = rows.iloc[0].to_dict()
    ratio, low, high = row["ratio"], row["low"], row["high"]
    if expert == "expert_low":
        ratio, low, high = 1 / ratio, 1 / high, 1 / max(low, 1e-300)
    known = between_text(low, high)
    if expert == "neither":
        head = f"In {format} neither expert clearly tolerates less: rounding the high-noise expert has {shown(ratio)} times"
        tile = Tile(f"high-noise to low-noise expert, {format}", f"{shown(ratio)}×", known)
        return f"{head} the effect of rounding the low-noise one ({known})", (tile,)
    other = {"expert_high": "expert_low", "expert_low": "expert_high"}[expert]
    head = f"In {format} the {component_text(expert)} tolerates less: rounding it has {shown(ratio)} times the effect of"
    tile = Tile(
        f"effect of {format} on the {component_text(expert)}", f"{shown(ratio)}×", f"{known}; of the other's"
    )
    return f"{head} rounding the {component_text(other)} ({known})", (tile,)


def _prediction(truth: Agreement | None, shards: int) -> tuple[str, str]:
    """How well predicted effects rank choices of layers in whole generations."""
    if truth is None:
        return "not checked", "no generation was made" if shards == 1 else "checked when all parts are merged"
    found = truth.correlation()
    value = "unknown" if found.value is None else f"{found.value:.2f}"
    return value, f"rank correlation with generations; {interval_text(found.low, found.high)}"


def _next(found: Sensitivity, truth: Agreement | None, shards: int) -> str:
    """The next step in a sentence."""
    if not found.complete:
        return f"Next: a run with shards=1 merges the {shards} parts."
    if truth is None:
        return "Next: samples=18 checks the prediction in whole generations."
    return "Next: 31_precision_plan chooses a format for every layer by these numbers, within a limit on quality loss."
