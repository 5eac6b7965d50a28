"""What a run of one configuration says at the top of its report."""

from __future__ import annotations

import math

from wanlab.core.answer import Answer, Tile, shown
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
    name = engine_text(row.engine)
    name += "" if row.plan in UNCHANGED else f" with plan {row.plan}"
    took = shown(row.time_ms, "ms")
    head = "The configuration was not applied, so its figures are the original's. " * (
        row.effect == NOT_APPLIED
    )
    if row.effect == BASELINE:
        headline = f"{name} makes a video in {took}: the baseline that other configurations are held against."
        following = "Next: -p engine=onnxruntime or a plan measures another configuration in the same way."
    else:
        headline = f"{head}{name} makes a video in {took}, {loss.text}."
        following = "Next: 50_before_after puts the runs of several configurations beside each other."
    far = f"{divergence.text[0].upper()}{divergence.text[1:]}."
    noise = math.nan if row.noise_percent is None else row.noise_percent
    sure = f"two series of it differ by up to {shown(noise, '%')}" if noise == noise else "noise not known"
    return Answer(
        headline,
        tuple(filter(None, [far, proof, following])),
        (
            Tile("time per video", took, sure),
            Tile("peak memory", shown(row.peak_memory_gib, "GiB"), "of a process of its own"),
            Tile("quality loss", *loss.tile()),
            divergence.tile(),
            Tile("load time", shown(row.load_ms, "ms"), "weights or files until it can run"),
        ),
    )
