"""What a comparison of quality says at the top of a report."""

from __future__ import annotations

from wanlab.core.answer import Answer, Step, Tile, answer, step
from wanlab.core.stats import interval_text
from wanlab.core.words import capital, counted, shown
from wanlab.evaluate.loss import LIMIT_PERCENT, QualityLoss
from wanlab.evaluate.quality import TIERS, Divergence, Tier

SAYS = {
    "exact": "{what} gives the same files",
    "numeric": "{what} gives the same videos",
    "near-lossless": "{what} gives the same videos to the eye",
    "faithful": "{what} keeps content and motion; details differ",
    "perceptual": "{what} gives other videos, as good as the original's",
    "undecided": "Whether {what} is good enough cannot be told yet",
    "degraded": "{what} gives worse videos",
}
"""Tier -> what holds, as the beginning of a sentence."""

TECHNIQUES = {
    "onnxruntime": "ONNX Runtime",
    "float8_e4m3fn": "rounding weights to FP8",
    "float16": "rounding weights to float16",
    "bfloat16": "rounding weights to bfloat16",
}
"""Name of a technique -> its name for readers."""


def quality_answer(what: str, tier: Tier, loss: QualityLoss, divergence: Divergence) -> Answer:
    """Whether an optimised video is as good as the original, how sure that is, and how different it is.

    Args:
        what: the technique, or what is compared, such as "the given file".
        tier: from `tier` of the two others.
    """
    name = TECHNIQUES.get(what, what)
    head = SAYS[tier.name].format(what=name if tier.name == "undecided" else capital(name))
    reason = loss.text if loss.known or tier.name not in ("exact", "numeric") else divergence.text
    if tier.name == "degraded" and not loss.known:
        head = f"{capital(name)} gives videos far from the original's"
    meaning = next(rule.meaning for rule in TIERS if rule.name == tier.name)
    meant = "Quality loss is how much farther from the true video the optimised one is; below 0 it is nearer to it."
    return answer(
        f"{head}: {reason}.",
        meant if loss.known else "",
        tiles=(
            Tile("quality loss", *loss.tile()),
            divergence.tile(),
            *_psnr(divergence),
            Tile("quality tier", tier.name, meaning),
            Tile(
                "held-out cases", str(loss.cases or len(divergence.scores)), "three or more give an interval"
            ),
        ),
        next=_next(what, tier, loss),
    )


def _psnr(divergence: Divergence) -> tuple[Tile, ...]:
    """PSNR as a key figure, where it was measured."""
    rows = divergence.frame[divergence.frame["metric"] == "psnr"].to_dict("records")
    return tuple(
        Tile(
            "PSNR to the original",
            "identical" if row["mean"] == float("inf") else shown(row["mean"], "dB"),
            interval_text(row["low"], row["high"], ".1f") if row["low"] == row["low"] else "higher is nearer",
        )
        for row in rows
    )


def _next(what: str, tier: Tier, loss: QualityLoss) -> Step:
    """What to do next, by how good the videos are and how sure that is."""
    if not loss.known:
        return step(
            "compares videos of a model on pictures whose true videos are known, which those of two files are not",
            "40_quality",
            technique=what if what in TECHNIQUES else "float8_e4m3fn",
            cases=8,
        )
    if loss.low_percent is None:
        return step(f"gives an interval, which {counted(loss.cases, 'case')} cannot give", cases=8)
    if tier.name == "undecided":
        return step(
            f"narrows the interval, which holds the limit of {LIMIT_PERCENT:g} %", cases=2 * loss.cases
        )
    if what == "onnxruntime":
        return step("measures what the same engine gains in time and memory", "41_configuration", engine=what)
    if tier.name == "degraded":
        return step("tells which layers to leave in more bits", "30_sensitivity")
    return step("chooses a format for every layer, within a limit on quality loss", "31_precision_plan")
