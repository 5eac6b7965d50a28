"""What a comparison of quality says at the top of a report."""

from __future__ import annotations

from wanlab.core.answer import Answer, Tile
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
    further = "" if reason == divergence.text else f"{capital(divergence.text)}."
    return Answer(
        f"{head}: {reason}.",
        tuple(filter(None, [further, _next(tier, loss)])),
        (
            Tile("quality loss", *loss.tile()),
            divergence.tile(),
            *_psnr(divergence),
            Tile("quality tier", tier.name, meaning),
            Tile(
                "held-out cases", str(loss.cases or len(divergence.scores)), "three or more give an interval"
            ),
        ),
    )


def _psnr(divergence: Divergence) -> tuple[Tile, ...]:
    """PSNR as a key figure, where it was measured."""
    rows = divergence.frame[divergence.frame["metric"] == "psnr"].to_dict("records")
    return tuple(
        Tile(
            "PSNR to the original",
            "identical" if row["mean"] == float("inf") else shown(row["mean"], "dB"),
            f"{interval_text(row['low'], row['high'], '.1f')}",
        )
        for row in rows
    )


def _next(tier: Tier, loss: QualityLoss) -> str:
    """The next step in a sentence."""
    if not loss.known:
        return "Next: 41_configuration judges the change on cases whose true videos are known; those of these files are not."
    if loss.low_percent is None:
        return f"Next: run it with cases=8; {counted(loss.cases, 'case')} give no interval."
    if tier.name == "undecided":
        return f"Next: run it with more cases; the interval holds the limit of {LIMIT_PERCENT:g} %."
    if tier.name == "degraded":
        return "Next: 30_sensitivity tells which layers to leave in more bits."
    return "Next: 41_configuration measures what it costs in time and memory."
