"""Proof of a plan by generations: quality loss, divergence beside its floor, memory, time, and that it took effect."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.precision.plans.plan import Plan
from wanlab.precision.selection.cases import METRICS, Originals, mean_effect

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.evaluate import Divergence, QualityLoss
    from wanlab.measure import Comparison
    from wanlab.precision.applied.apply import Applied

MIB = 2**20


@dataclass(frozen=True, eq=False)
class Verification:
    """What a plan really does on some cases.

    Attributes:
        plan: that was applied.
        quality: quality loss with its interval; unknown without truths.
        divergence: from the unchanged model, beside the floor.
        effect: squared relative change of the final latents, mean over cases: what the sensitivity predicts.
        frame: one row per case: case, lpips (to the original), lpips_truth, loss_percent (NaN without truth), effect.
        weight_bytes, before_bytes: of all linear layers of the experts, as held and as loaded.
        bits_per_weight, share_8bit: of linear weights.
        kernels: what multiplied, in a sentence. took_effect: the sentence of the effect check.
        times: component -> time of its forward against the unchanged one's; empty where not measured.
        purpose: set of the cases. generations: that were run.
    """

    plan: Plan
    quality: QualityLoss
    divergence: Divergence
    effect: float
    frame: pd.DataFrame
    weight_bytes: int
    before_bytes: int
    bits_per_weight: float
    share_8bit: float
    kernels: str
    took_effect: str
    times: dict[str, Comparison]
    purpose: str
    generations: int

    @property
    def upper_percent(self) -> float | None:
        """Upper end of the quality loss: of its interval, or the loss itself where none can be had."""
        return self.quality.percent if self.quality.high_percent is None else self.quality.high_percent

    def holds(self, limit_percent: float) -> bool:
        """Whether the upper end of the quality loss is within a limit; unknown is no."""
        return self.upper_percent is not None and self.upper_percent <= limit_percent

    def row(self) -> dict[str, Any]:
        """One table row."""
        lpips = self.divergence.frame.set_index("metric").loc["lpips"]
        return {
            "plan": self.plan.name,
            "loss_percent": self.quality.percent,
            "loss_low_percent": self.quality.low_percent,
            "loss_high_percent": self.quality.high_percent,
            "lpips": float(lpips["mean"]),
            "lpips_low": float(lpips["low"]),
            "lpips_high": float(lpips["high"]),
            "lpips_floor": float(lpips["floor"]),
            "effect": self.effect,
            "bits_per_weight": self.bits_per_weight,
            "share_8bit_percent": 100 * self.share_8bit,
            "weight_mib": self.weight_bytes / MIB,
            "cases": len(self.frame),
            **{f"{name}_speedup": each.speedup for name, each in self.times.items()},
        }

    def __str__(self) -> str:
        return (
            f"{self.plan.name}: quality loss {self.quality}; {self.divergence}; {self.weight_bytes / MIB:.2f} MiB of linear"
            f" weights instead of {self.before_bytes / MIB:.2f}"
        )


def verify_plan(
    model,
    plan: Plan | str | os.PathLike,
    cases: Sequence[Any] | Originals,
    *,
    calibrations: Mapping[str, Any] | None = None,
    timed: bool = False,
    rounds: int = 5,
    check: bool = True,
    progress: bool = True,
    seed: int = 0,
    **settings: Any,
) -> Verification:
    """Apply a plan, prove that it took effect, and generate held-out cases with it.

    Args:
        model: from `wanlab.models.load`, its experts as loaded; it stays as it is.
        plan: or a preset's name, or a file.
        cases: of `wanlab.nano.heldout`, or what `make_originals` made of them, which spares making the originals again.
        calibrations: as `apply_plan` takes them.
        timed: time one forward of every expert against the unchanged one, in turn, with its A/A control, both compiled
            on a GPU; of use where the plan has kernels.
        rounds: of these timings.
        check: run `effect_check`; a plan that changes nothing fails it.
        settings: as `make_originals` takes them, when `cases` are cases.

    Raises:
        WanlabError: a plan that does not fit or has no effect, or as `make_originals`.
    """
    import numpy as np
    import pandas as pd
    from tqdm.auto import tqdm

    from wanlab.evaluate import compare_videos, divergence, quality_loss
    from wanlab.precision.applied.apply import apply_plan
    from wanlab.precision.effects.effect import effect_check
    from wanlab.precision.selection.cases import make_originals

    if isinstance(cases, Originals) and settings:
        raise WanlabError(f"{next(iter(settings))} is settled by the originals; give cases, or leave it out")
    originals = (
        cases if isinstance(cases, Originals) else make_originals(model, cases, progress=progress, **settings)
    )
    applied = apply_plan(model, plan, calibrations)
    said = str(effect_check(model, applied)) if check else "not checked"
    name = applied.assignment.plan.name
    with tqdm(
        total=len(originals.made), desc=f"verify {name}", unit="video", leave=False, disable=not progress
    ) as bar:
        made = originals.batched.generate(applied.model, bar=bar)
    options = {"backbone": originals.backbone, "device": model.device, "progress": False}
    apart = divergence(
        [each.video for each in originals.made],
        [each.video for each in made],
        originals.floor or None,
        metrics=METRICS,
        seed=seed,
        **options,
    )
    to_truth = [
        compare_videos(truth, each.video, "lpips", **options)
        for truth, each in zip(originals.truths, made, strict=bool(originals.truths))
    ]
    loss = quality_loss(to_truth or None, list(originals.to_truth) or None, seed=seed)
    frame = pd.DataFrame(
        {
            "case": originals.names,
            "lpips": [scores.mean("lpips") for scores in apart.scores],
            "lpips_truth": [scores.mean("lpips") for scores in to_truth] or np.nan,
            "loss_percent": loss.per_case_percent or np.nan,
            "effect": [mean_effect([a], [b]) for a, b in zip(originals.made, made, strict=True)],
        }
    )
    linear = applied.frame[applied.frame["kind"] == "Linear"]
    held = linear.drop_duplicates(["component", "layer", "format"])
    whole = linear.drop_duplicates(["component", "layer"])
    elements = weights_of(applied)
    return Verification(
        plan=applied.assignment.plan,
        quality=loss,
        divergence=apart,
        effect=float(frame["effect"].mean()),
        frame=frame,
        weight_bytes=int(held["weight_bytes"].sum()),
        before_bytes=int(whole["weight_before_bytes"].sum()),
        bits_per_weight=8 * float(held["weight_bytes"].sum()) / elements,
        share_8bit=applied.assignment.share(8),
        kernels=applied.kernels,
        took_effect=said,
        times=_times(model, applied, originals, rounds) if timed else {},
        purpose=originals.purpose,
        generations=len(made),
    )


def weights_of(applied: Applied) -> int:
    """Elements of all linear weights."""
    rows = applied.assignment.frame
    rows = rows[rows["kind"] == "Linear"].drop_duplicates(["component", "layer"])
    return int(rows["shape"].map(lambda shape: shape[0] * shape[1]).sum())


def measured_effect(
    model,
    plan: Plan | str,
    originals: Originals,
    *,
    calibrations: Mapping[str, Any] | None = None,
    cases: int | None = None,
    progress: bool = True,
) -> float:
    """The true effect of a plan on the final latents of some cases: no video is decoded.

    Args:
        cases: so many of the originals; all if not given.
    """
    import copy

    from tqdm.auto import tqdm

    from wanlab.precision.applied.apply import apply_plan
    from wanlab.precision.selection.cases import for_choosing

    for_choosing(originals)
    applied = apply_plan(model, plan, calibrations)
    batched = copy.copy(originals.batched)
    count = min(cases or len(originals.made), len(originals.made))
    batched.asked, batched._given = batched.asked[:count], batched._given and batched._given[:count]
    with tqdm(total=count, desc="effect", unit="generation", leave=False, disable=not progress) as bar:
        made = batched.generate(applied.model, videos=False, bar=bar)
    return mean_effect(originals.made[:count], made)


def _times(model, applied: Applied, originals: Originals, rounds: int) -> dict[str, Comparison]:
    """Forwards of every expert at the size of the cases, unchanged and planned in turn."""
    import torch

    from wanlab.convert.clip import default_shape
    from wanlab.convert.components import recipe
    from wanlab.measure import compare, in_turn
    from wanlab.models import compile_blocks

    after = applied.model
    if model.device.type == "cuda":  # eager, rounding of inputs costs more than products save
        model, after = compile_blocks(model), compile_blocks(after)
    settings, found = originals.batched.settings, {}
    size = {name: settings[name] for name in ("height", "width", "frames")}
    with torch.no_grad(), applied.at(0):
        for component in applied.assignment.components:
            plain, planned = recipe(model, component), recipe(after, component)
            shape = default_shape(model, batch=1, **size)
            inputs = plain.inputs_for(shape, torch.Generator().manual_seed(0))
            calls = {
                "as loaded": lambda p=plain, i=inputs: p.reference(*i),
                applied.assignment.plan.name: lambda p=planned, i=inputs: p.reference(*i),
            }
            samples, control = in_turn(calls, warmup=2, rounds=rounds, device=model.device, progress=False)
            found[component] = compare(*samples.values(), control.noise_percent)
    return found
