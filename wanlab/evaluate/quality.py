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
from wanlab.evaluate.metrics import compare_videos
from wanlab.evaluate.scores import LOWER_IS_BETTER, METRICS, Scores, mean_score, same_backbone

if TYPE_CHECKING:
    import pandas as pd

LIMIT_PERCENT = 3.0


@dataclass(frozen=True, eq=False)
class Divergence:
    """How far the optimised outputs are from the originals, beside the floor.

    Attributes:
        frame: one row per metric: metric, backbone, cases, mean, low, high (95 % bootstrap interval
            over cases, undefined for one case), worst, floor, floor_name (the loosest floor),
            times_floor (error over the floor's error; error is LPIPS, 1 - SSIM or MSE), and verdict:
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
            times = f", {row['times_floor']:.3g} times the floor" if row["verdict"] != "identical" else ""
            floor = f"; floor {row['floor']:.4g} ({row['floor_name']}){times}"
        backbone = f" ({row['backbone']})" if row["metric"] == "lpips" else ""
        return f"divergence {row['metric']}{backbone} {row['mean']:.4g}{floor}: {row['verdict']}"


@dataclass(frozen=True)
class QualityLoss:
    """Relative worsening of LPIPS to the ground truth, in percent; positive is worse.

    Attributes:
        percent: mean over cases of (LPIPS(Q,G) - LPIPS(O,G)) / LPIPS(O,G) x 100; None when unknown.
        low_percent, high_percent: its 95 % bootstrap interval over cases; None with fewer than two.
        cases: number of cases.
        backbone: LPIPS backbone of the scores, when known.
        per_case_percent: the relative worsening of each case.
    """

    percent: float | None
    low_percent: float | None
    high_percent: float | None
    cases: int
    backbone: str | None = None
    per_case_percent: tuple[float, ...] = ()

    @classmethod
    def unknown(cls) -> QualityLoss:
        """No ground truth exists, so nothing can be said."""
        return cls(None, None, None, 0)

    @property
    def known(self) -> bool:
        return self.percent is not None

    def within(self, limit_percent: float = LIMIT_PERCENT) -> str:
        """Is the loss under a limit? `"yes"` or `"no"` when the whole interval is on one side,
        `"undecided"` when it straddles the limit or cannot be had, `"unknown"` without ground truth."""
        if not self.known:
            return "unknown"
        if self.low_percent is None or self.high_percent is None:
            return "undecided"
        if self.high_percent <= limit_percent:
            return "yes"
        return "no" if self.low_percent > limit_percent else "undecided"

    @property
    def bound(self) -> str:
        """The upper end of the interval in words; the value itself where no interval can be had."""
        if not self.known:
            return "unknown"
        if self.high_percent is None:
            return f"{_signed(self.percent)} %, from one case"
        return f"at most {max(self.high_percent, 0.0):.2f} %"

    def row(self) -> dict:
        return {
            "quality_loss_percent": self.percent,
            "low_percent": self.low_percent,
            "high_percent": self.high_percent,
            "cases": self.cases,
            "backbone": self.backbone,
            "within_limit": self.within(),
        }

    def __str__(self) -> str:
        if not self.known:
            return "unknown: no ground truth"
        interval = (
            "interval unknown"
            if self.low_percent is None
            else f"95 % interval {_signed(self.low_percent)} to {_signed(self.high_percent)} %"
        )
        cases = f"{self.cases} case" + ("s" if self.cases != 1 else "")
        backbone = f", {self.backbone}" if self.backbone else ""
        return f"{_signed(self.percent)} % ({interval}, {cases}{backbone})"


def _signed(percent: float) -> str:
    """Two digits and a sign; what rounds to nothing is not called negative."""
    return f"{round(percent, 2) + 0.0:+.2f}"


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
            floors, each one of these. With several, the loosest counts. None: no floor.
        metrics, backbone, device, progress: as `compare_videos`.
        seed: of the bootstrap over cases.

    Raises:
        WanlabError: as `compare_videos`; different numbers of cases; no case; a floor that was
            scored with another backbone or lacks a metric.
    """
    import pandas as pd

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
        worst_of = max if LOWER_IS_BETTER[row.metric] else min
        low, high = bootstrap_mean(values, seed) or (math.nan, math.nan)
        known = {name: mean_score([s.mean(row.metric) for s in group]) for name, group in floors.items()}
        name = worst_of(known, key=known.get) if known else None
        mean = mean_score(values)
        kindest = mean if math.isnan(low) else low if LOWER_IS_BETTER[row.metric] else high
        times, least_times = (
            _times_floor(row.metric, value, known[name]) if known else math.nan for value in (mean, kindest)
        )
        rows.append(
            {
                "metric": row.metric,
                "backbone": row.backbone,
                "cases": len(scores),
                "mean": mean,
                "low": low,
                "high": high,
                "worst": worst_of(values),
                "floor": known[name] if known else math.nan,
                "floor_name": name,
                "times_floor": times,
                "verdict": _verdict(row.metric, mean, least_times),
            }
        )
    return Divergence(pd.DataFrame(rows), scores, floors)


def quality_loss(optimized_to_truth, original_to_truth, *, seed: int = 0) -> QualityLoss:
    """Relative worsening of LPIPS to the ground truth, averaged over held-out cases.

    Per case (LPIPS(Q,G) - LPIPS(O,G)) / LPIPS(O,G), with ground truth G, original output O and
    optimised output Q; the mean of these ratios, and its percentile bootstrap interval over cases.

    Args:
        optimized_to_truth: LPIPS(Q, G) of each case: numbers or `Scores`; None without ground truth.
        original_to_truth: LPIPS(O, G) of the same cases in the same order; None without ground truth.
        seed: of the bootstrap.

    Returns:
        QualityLoss: `QualityLoss.unknown()` when either argument is None.

    Raises:
        WanlabError: different numbers of cases, no case, a score that is negative or not finite, an
            LPIPS(O, G) of 0 (nothing to be relative to), or `Scores` of different backbones.
    """
    import numpy as np

    if optimized_to_truth is None or original_to_truth is None:
        return QualityLoss.unknown()
    sides = [_as_list(optimized_to_truth), _as_list(original_to_truth)]
    backbone = same_backbone([item for side in sides for item in side if isinstance(item, Scores)])
    q, o = (
        np.array([s.mean("lpips") if isinstance(s, Scores) else s for s in side], dtype=float)
        for side in sides
    )
    if q.shape != o.shape:
        raise WanlabError(
            f"quality loss of {q.size} optimised and {o.size} original cases; score the same cases"
        )
    if q.size == 0:
        raise WanlabError("quality loss of no case; give LPIPS to the ground truth of at least one")
    for label, values in (("optimised", q), ("original", o)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if bad.size:
            raise WanlabError(f"{label} LPIPS of case {bad[0]} is {values[bad[0]]}; scores are 0 or more")
    if (o == 0).any():
        raise WanlabError(
            f"original LPIPS of case {np.flatnonzero(o == 0)[0]} is 0, so no relative worsening exists; "
            "is it the ground truth itself?"
        )
    percent = 100 * (q - o) / o
    low, high = bootstrap_mean(percent, seed) or (None, None)
    return QualityLoss(float(percent.mean()), low, high, q.size, backbone, tuple(percent.tolist()))


def _as_list(values) -> list:
    return [values] if isinstance(values, Scores | int | float) else list(values)


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
    items = floor if isinstance(floor, list) else [floor]
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


def _error(metric: str, value: float) -> float:
    """A score as an error that is 0 for a perfect copy."""
    return {"lpips": value, "ssim": 1 - value, "psnr": 10 ** (-value / 10)}[metric]


def _times_floor(metric: str, value: float, floor: float) -> float:
    error, least = _error(metric, value), _error(metric, floor)
    if error <= 0:
        return 0.0
    return error / least if least > 0 else math.inf


def _verdict(metric: str, value: float, times_floor: float) -> str:
    if _error(metric, value) <= 0:
        return "identical"
    if math.isnan(times_floor):
        return "no floor"
    return "within floor" if times_floor <= 1 else "above floor"
