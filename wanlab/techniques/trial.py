"""Techniques tried out on one model: time, skipped calls, quality and proof of each variant, on the same cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from wanlab.core.errors import WanlabError
from wanlab.evaluate.loss import QualityLoss, loss_to_truth
from wanlab.measure.in_turn import InTurn, until_told
from wanlab.measure.stages import stages
from wanlab.measure.timing import Comparison
from wanlab.models.pipeline import Generation, Model
from wanlab.models.spec import EXPERTS
from wanlab.techniques.db_cache import DBCache
from wanlab.techniques.easy_cache import EasyCache
from wanlab.techniques.mag_cache import MagCache
from wanlab.techniques.registry import technique_of
from wanlab.techniques.switch_on import Chosen, Switched, lacks, shares_by_operations, switch_on
from wanlab.techniques.technique import TIERS, Bound, Shares

ORIGINAL = "original"
CACHES = (EasyCache, MagCache, DBCache)
TITLES = {EasyCache.name: "EasyCache", MagCache.name: "MagCache", DBCache.name: "DBCache"}
"""Step cache -> how its authors write it."""


@dataclass(frozen=True, eq=False)
class Tried:
    """One variant.

    Attributes:
        label: its name. switched: the model with its techniques.
        videos: of every case. loss: quality loss over the cases.
        calls: as `Switched.calls`, of all cases, with the column case.
        decisions: of a step cache: case, threshold, step, component, change, summed_change, skipped; empty without one.
        proof: what its techniques did in the last case. passed: whether each did what it says in every case.
        bounds: what each technique can buy at most.
    """

    label: str
    switched: Switched
    videos: tuple[Generation, ...]
    loss: QualityLoss
    calls: pd.DataFrame
    decisions: pd.DataFrame
    proof: str
    passed: bool
    bounds: tuple[Bound, ...]

    @property
    def skipped_percent(self) -> float:
        """Percent of the denoiser's calls in which no network ran; where a part of its blocks did, by this part."""
        return 100 * float(self.calls["skipped"].mean())

    @property
    def times_faster_at_most(self) -> float:
        """Bound of its techniques together, as if what they save were apart."""
        left = math.prod(1 - bound.saved for bound in self.bounds)
        return Bound(1 - left, "").times_faster


@dataclass(frozen=True, eq=False)
class Trial:
    """Variants beside the original.

    Attributes:
        variants: in the given order. originals: videos of the original, of every case.
        timed: times of all in turn, the original first. shares: where the original's time goes.
    """

    variants: tuple[Tried, ...]
    originals: tuple[Generation, ...]
    timed: InTurn
    shares: Shares

    def comparison(self, label: str) -> Comparison:
        """The speed-up of a variant over the original."""
        return self.timed.comparisons[label]

    def frame(self) -> pd.DataFrame:
        """One row per variant: variant, techniques, tier (the loosest of its techniques), skipped_percent, speedup, low,
        high (95 % interval), verdict, times_faster_at_most, quality_loss_percent, loss_low, loss_high, did_what_it_says."""
        order, rows = list(TIERS), []
        for tried in self.variants:
            gain, loss = self.comparison(tried.label), tried.loss
            tiers = [technique.tier for technique in tried.switched.techniques]
            rows.append(
                {
                    "variant": tried.label,
                    "techniques": ", ".join(technique.name for technique in tried.switched.techniques),
                    "tier": max(tiers, key=order.index),
                    "skipped_percent": tried.skipped_percent,
                    "speedup": gain.speedup,
                    "low": gain.low,
                    "high": gain.high,
                    "verdict": gain.verdict,
                    "times_faster_at_most": tried.times_faster_at_most,
                    "quality_loss_percent": loss.percent,
                    "loss_low": loss.low_percent,
                    "loss_high": loss.high_percent,
                    "did_what_it_says": tried.passed,
                }
            )
        return pd.DataFrame(rows)

    def calls(self) -> pd.DataFrame:
        """The calls of all variants: variant and the columns of `Tried.calls`."""
        return _joined({tried.label: tried.calls for tried in self.variants})

    def decisions(self) -> pd.DataFrame:
        """The decisions of all step caches: variant and the columns of `Tried.decisions`."""
        return _joined({tried.label: tried.decisions for tried in self.variants})

    def within(self, limit_percent: float) -> list[Tried]:
        """Variants whose loss is within a limit at the upper end of its interval and that did what they say."""
        return [
            tried for tried in self.variants if tried.passed and tried.loss.within(limit_percent) == "yes"
        ]


def cache_variants(
    model: Model, thresholds: Mapping[str, Sequence[float]], gates: Sequence[float] = ()
) -> tuple[dict[str, Chosen], list[str]]:
    """Variants of step caches and guidance gates, for `try_out`.

    Args:
        model: what they are for.
        thresholds: name of a cache -> its thresholds; none leaves it out.
        gates: percent of the steps after which a gate ends the branch without text.

    Returns:
        Label, such as `"EasyCache at 0.1"`, -> a technique with its settings; and a line for each technique that is left
        out, as it cannot run on this model or machine.
    """
    wanted: list[tuple[str, str, dict[str, float]]] = [
        (f"{TITLES[name]} at {value:g}", name, {"threshold": value})
        for name, values in thresholds.items()
        for value in values
    ]
    wanted += [(f"gate after {value:g} %", "guidance_gate", {"after_percent": value}) for value in gates]
    reasons = {name: lacks(technique_of(name)(), model.spec, model.device) for _, name, _ in wanted}
    left_out = [f"{name} is left out: it needs {reason}." for name, reason in reasons.items() if reason]
    return {label: {name: own} for label, name, own in wanted if not reasons[name]}, left_out


def _joined(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([table.assign(variant=label) for label, table in tables.items()], ignore_index=True)


def measured_shares(model: Model, ask: Mapping[str, Any]) -> tuple[Shares, Generation]:
    """Where the time of a video goes, and the video, from one recorded generation; shares inside a forward are those of its
    operations.

    Args:
        ask: arguments of `Model.generate`.
    """
    with stages(model) as record:
        generation = model.generate(**ask)
    calls = record.frame()
    times = calls.groupby("component")["time_ms"].sum() / record.wall_ms
    denoiser = calls[calls["component"].isin(EXPERTS)]
    size = {name: ask.get(name) for name in ("height", "width", "frames")}
    shares = replace(
        shares_by_operations(model.spec, **size),
        source="a recorded video",
        denoising=float(sum(times.get(name, 0.0) for name in EXPERTS)),
        decoding=float(times.get("vae_decoder", 0.0)),
        branches=2 if (denoiser["branch"] == "uncond").any() else 1,
        steps=int(denoiser["step"].nunique()),
    )
    return shares, generation


def try_out(
    model: Model,
    variants: Mapping[str, Chosen],
    asked: Sequence[Mapping[str, Any]],
    truths: Sequence[np.ndarray] | None = None,
    *,
    rounds: int = 3,
    precision: float | None = 10.0,
    limit_s: float | None = None,
    progress: bool = True,
) -> Trial:
    """Generate the same cases with the original and with every variant, then time one case of all in turn.

    Args:
        model: from `wanlab.models.load`; it stays as it is.
        variants: label -> techniques with their settings.
        asked: arguments of `Model.generate`, of each case. truths: their true videos; the loss is unknown without.
        rounds, precision, limit_s: as `wanlab.measure.until_told`; precision in percent.

    Raises:
        WanlabError: no variant, one that is called "original", no case, or as `switch_on`.
    """
    if not variants or not asked:
        raise WanlabError("a trial needs at least one variant and one case")
    if ORIGINAL in variants:
        raise WanlabError(f"a variant is called {ORIGINAL!r}, which is the model without techniques")
    opened = {label: switch_on(model, chosen) for label, chosen in variants.items()}
    bar = tqdm(total=len(asked) * (1 + len(opened)), desc="cases", unit="video", disable=not progress)
    shares, first = measured_shares(model, asked[0])
    bar.update()
    originals = [first]
    for each in asked[1:]:
        originals.append(model.generate(**each))
        bar.update()
    tried = []
    for label, switched in opened.items():
        tried.append(_tried(label, switched, asked, truths, originals, shares, bar))
    bar.close()
    calls = {ORIGINAL: partial(model.generate, **asked[0])}
    calls |= {label: partial(switched.model.generate, **asked[0]) for label, switched in opened.items()}
    timed = until_told(
        calls,
        warmup=0,  # all of them have made videos of this size
        rounds=rounds,
        precision=precision,
        limit_s=limit_s,
        device=model.device,
        progress=progress,
    )
    return Trial(tuple(tried), tuple(originals), timed, shares)


def _tried(
    label: str,
    switched: Switched,
    asked: Sequence[Mapping[str, Any]],
    truths: Sequence[np.ndarray] | None,
    originals: Sequence[Generation],
    shares: Shares,
    bar: tqdm,
) -> Tried:
    videos, calls, decisions, passed, proof = [], [], [], True, ""
    for case, each in enumerate(asked):
        videos.append(switched.model.generate(**each))
        bar.update()
        proofs = switched.proofs().values()
        passed = passed and all(one.passed for one in proofs)
        proof = " ".join(one.sentence for one in proofs)
        calls.append(switched.calls.assign(case=case))
        for cache in (one for one in switched.techniques if isinstance(one, CACHES)):
            decisions += [
                decision._asdict() | {"case": case, "threshold": cache.settings.threshold}
                for decision in cache.decisions
            ]
    columns = ["case", "threshold", "step", "component", "change", "summed_change", "skipped"]
    return Tried(
        label,
        switched,
        tuple(videos),
        loss_to_truth(truths, originals, videos),
        pd.concat(calls, ignore_index=True),
        pd.DataFrame(decisions, columns=columns),
        proof,
        passed,
        tuple(technique.bound(shares) for technique in switched.techniques),
    )
