"""The two definitions that quality rests on: divergence beside its floor, and quality loss.

Divergence is the distance between the optimised and the original output for the same seed and inputs.
It says how different, not how much worse, and is read against a floor: what the unchanged model does
when it is run twice, or once more with another exact attention kernel. Quality loss is how much worse
the optimised output is against the ground truth, relative to the original.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError
from wanlab.evaluate.bootstrap import bootstrap_mean
from wanlab.evaluate.catalogue import CATALOGUE, METRICS
from wanlab.evaluate.loss import LIMIT_PERCENT, QualityLoss, loss_to_truth, quality_loss
from wanlab.evaluate.metrics import compare_videos
from wanlab.evaluate.scores import Scores, mean_score, same_backbone

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LIMIT_PERCENT", "Divergence", "QualityLoss", "divergence", "loss_to_truth", "quality_loss"]


@dataclass(frozen=True, eq=False)
class Divergence:
    """How far the optimised outputs are from the originals, beside the floor.

    Attributes:
        frame: one row per metric: metric, backbone, cases, mean, low, high (95 % bootstrap interval
            over cases, undefined for one case), worst, floor, floor_name (the loosest floor),
            times_floor (error over the floor's error; error is LPIPS, 1 - SSIM, MSE, flicker, or the
            distance from a perfect copy's score), and verdict:
            `"identical"`, `"within floor"`, `"above floor"` (with several cases: the whole interval
            is above it) or `"no floor"`.
        scores: the scores of each case.
        floors: the scores of each floor, by name.
    """

    frame: pd.DataFrame
    scores: tuple[Scores, ...]
    floors: dict[str, tuple[Scores, ...]]

    def verdict(self, metric: str = "lpips") -> str:
        return self._row(metric)["verdict"]

    def worst_case(self, metric: str = "lpips") -> int:
        """Index of the case that differs most."""
        self._row(metric)
        error = CATALOGUE[metric].error
        return max(range(len(self.scores)), key=lambda case: error(self.scores[case].mean(metric)))

    def _row(self, metric: str) -> dict:
        rows = self.frame[self.frame["metric"] == metric]
        if rows.empty:
            raise WanlabError(
                f"this divergence holds no {metric!r}; measured: {', '.join(self.frame['metric'])}"
            )
        return rows.iloc[0].to_dict()

    def __str__(self) -> str:
        row = self._row("lpips" if "lpips" in set(self.frame["metric"]) else self.frame["metric"].iloc[0])
        floor = ""
        if row["floor_name"] is not None:
            times = f", {_times_text(row['times_floor'])} the floor" if row["verdict"] != "identical" else ""
            floor = f"; floor {row['floor']:.4g} ({row['floor_name']}){times}"
        backbone = f" ({row['backbone']})" if row["metric"] == "lpips" else ""
        return f"divergence {row['metric']}{backbone} {row['mean']:.4g}{floor}: {row['verdict']}"


def divergence(
    original,
    optimized,
    floor=None,
    *,
    metrics: Sequence[str] | str = METRICS,
    backbone: str = "auto",
    device="auto",
    progress: bool = True,
    seed: int = 0,
) -> Divergence:
    """Distance between optimised and original outputs, beside the floor it is read against.

    Args:
        original, optimized: a video (anything `compare_videos` takes), or lists of them, one per
            case, in the same order and made with the same seeds and inputs.
        floor: what is no change at all: a tuple `(video, video)` of two runs of the unchanged model,
            a list of such tuples, `Scores`, a list of `Scores`, or a dictionary that names several
            floors, each one of these; or `Floors`. With several, the loosest counts. None: no floor.
        metrics, backbone, device, progress: as `compare_videos`.
        seed: of the bootstrap over cases.

    Raises:
        WanlabError: as `compare_videos`; different numbers of cases; no case; a floor that was
            scored with another backbone or lacks a metric.
    """
    import pandas as pd

    floor = getattr(floor, "scores", floor) if not isinstance(floor, Scores) else floor
    options = {"metrics": metrics, "backbone": backbone, "device": device, "progress": progress}
    pairs = _pairs(original, optimized)
    scores = tuple(compare_videos(a, b, **options) for a, b in pairs)
    floors = {
        name: tuple(_floor_scores(value, options))
        for name, value in (floor if isinstance(floor, dict) else {"given": floor}).items()
        if value is not None
    }
    same_backbone([*scores, *(score for group in floors.values() for score in group)])
    rows = []
    for row in scores[0].summary.itertuples():
        values = [score.mean(row.metric) for score in scores]
        error = CATALOGUE[row.metric].error
        low, high = bootstrap_mean(values, seed) or (math.nan, math.nan)
        known = {name: mean_score([s.mean(row.metric) for s in group]) for name, group in floors.items()}
        name = max(known, key=lambda floor: error(known[floor])) if known else None
        mean = mean_score(values)
        times, least_times = (
            _times_floor(value, error(known[name])) if known else math.nan
            for value in (error(mean), _least_error(row.metric, mean, low, high))
        )
        rows.append(
            {
                "metric": row.metric,
                "backbone": row.backbone,
                "cases": len(scores),
                "mean": mean,
                "low": low,
                "high": high,
                "worst": max(values, key=error),
                "floor": known[name] if known else math.nan,
                "floor_name": name,
                "times_floor": times,
                "verdict": _verdict(max(map(error, values)), least_times),
            }
        )
    return Divergence(pd.DataFrame(rows), scores, floors)


def _pairs(original, optimized) -> list[tuple]:
    several = [isinstance(side, list | tuple) for side in (original, optimized)]
    if several == [False, False]:
        return [(original, optimized)]
    if several != [True, True] or len(original) != len(optimized):
        counts = [len(side) if many else 1 for side, many in zip((original, optimized), several, strict=True)]
        raise WanlabError(
            f"divergence of {counts[0]} original and {counts[1]} optimised videos; give one of each per case"
        )
    if not original:
        raise WanlabError("divergence of no video; give at least one case")
    return list(zip(original, optimized, strict=True))


def _floor_scores(floor, options: dict) -> list[Scores]:
    # A tuple of scores is one floor over several cases; any other tuple is a pair of videos.
    several = isinstance(floor, list) or (isinstance(floor, tuple) and floor and isinstance(floor[0], Scores))
    items = floor if several else [floor]
    if not items:
        raise WanlabError("the floor is an empty list; give pairs of videos or Scores, or None")
    scores = []
    for item in items:
        if isinstance(item, Scores):
            scores.append(item)
        elif isinstance(item, tuple) and len(item) == 2:
            scores.append(compare_videos(*item, **options))
        else:
            raise WanlabError(
                "a floor is a tuple of two videos or Scores; give two runs of the unchanged model"
            )
    return scores


def _least_error(metric: str, mean: float, low: float, high: float) -> float:
    """The error at the kindest value of an interval; of the mean where there is no interval."""
    facts = CATALOGUE[metric]
    if math.isnan(low):
        return facts.error(mean)
    if facts.better == "near" and low <= facts.perfect <= high:
        return 0.0
    return min(facts.error(low), facts.error(high))


def _times_text(times: float) -> str:
    return f"{times:.3g} times" if times < 1000 else "over 1,000 times"


def _times_floor(error: float, least: float) -> float:
    if error <= 0:
        return 0.0
    return error / least if least > 0 else math.inf


def _verdict(largest_error: float, times_floor: float) -> str:
    if largest_error <= 0:
        return "identical"
    if math.isnan(times_floor):
        return "no floor"
    return "within floor" if times_floor <= 1 else "above floor"
