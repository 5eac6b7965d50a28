"""What a run of one configuration says at the top of its report."""

from __future__ import annotations

import math

from wanlab.core.answer import Answer, Tile, capital, shown
from wanlab.core.effects import BASELINE, NOT_APPLIED
from wanlab.engines.registry import engine_text
from wanlab.evaluate.loss import QualityLoss
from wanlab.evaluate.quality import Divergence
from wanlab.runs.result import UNCHANGED, Result


def configuration_answer(
    row: Result, loss: QualityLoss, divergence: Divergence, *, proof: str = ""
) -> Answer:
    """What one configuration costs and how good it is; what was not applied is said first.

    Args:
        row: its result. proof: sentence that shows what was applied.
        loss, divergence: of its videos beside the original's.
    """
    name = capital(engine_text(row.engine))
    name += "" if row.plan in UNCHANGED else f" with plan {row.plan}"
    took, base = shown(row.time_ms, "ms"), row.effect == BASELINE
    noise = math.nan if row.noise_percent is None else row.noise_percent
    sure = f"repeats differ by up to {shown(noise, '%')}" if noise == noise else "noise not known"
    head = "The configuration was not applied, so its figures are the original's. " * (
        row.effect == NOT_APPLIED
    )
    if base:
        headline = (
            f"{name} makes a video in {took} ({sure}). It is the original that others are compared with."
        )
        following = (
            "Next: this notebook with engine=onnxruntime, or with a plan, measures another configuration."
        )
    else:
        headline = f"{head}{name} makes a video in {took} ({sure}), {loss.text}."
        following = "Next: 50_before_after puts the runs of several configurations beside each other."
    return Answer(
        headline,
        tuple(
            filter(None, ["" if base else f"{capital(divergence.text)}.", "" if base else proof, following])
        ),
        (
            Tile("time per video", took, sure),
            Tile("peak memory", shown(row.peak_memory_gib, "GiB"), "of a process of its own"),
            Tile("quality loss", *(("0 %", "it is the original") if base else loss.tile())),
            Tile("load time", shown(row.load_ms, "ms"), "until it can run") if base else divergence.tile(),
        ),
    )
