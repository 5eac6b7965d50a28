"""Quality loss: by how much the optimised output is worse than the original, measured against the ground truth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from wanlab.core.errors import WanlabError
from wanlab.core.stats import bootstrap_mean, interval_text
from wanlab.evaluate.metrics import compare_videos
from wanlab.evaluate.scores import Scores, same_backbone
from wanlab.evaluate.video import VideoLike, as_video

LIMIT_PERCENT = 3.0
SMALLEST_PERCENT = 0.01  # a smaller quality loss is said to be below it


@dataclass(frozen=True)
class QualityLoss:
    """Relative worsening of LPIPS to the ground truth, in percent; positive is worse.

    Attributes:
        percent: mean over cases of (LPIPS(Q,G) - LPIPS(O,G)) / LPIPS(O,G) x 100; None when unknown.
        low_percent, high_percent: its 95 % bootstrap interval over cases; None with fewer than three.
        cases: number of cases.
        backbone: LPIPS backbone of the scores, if known.
        per_case_percent: relative worsening of each case.
    """

    percent: float | None
    low_percent: float | None
    high_percent: float | None
    cases: int
    backbone: str | None = None
    per_case_percent: tuple[float, ...] = ()

    @classmethod
    def unknown(cls) -> QualityLoss:
        """The result without a ground truth: the loss cannot be computed."""
        return cls(None, None, None, 0)

    @property
    def known(self) -> bool:
        return self.percent is not None

    def within(self, limit_percent: float = LIMIT_PERCENT) -> str:
        """Whether the loss is under a limit: `"yes"` or `"no"` when the whole interval is on one side,
        `"undecided"` when it contains the limit or does not exist, `"unknown"` without ground truth."""
        if not self.known:
            return "unknown"
        if self.low_percent is None or self.high_percent is None:
            return "undecided"
        if self.high_percent <= limit_percent:
            return "yes"
        return "no" if self.low_percent > limit_percent else "undecided"

    @property
    def bound(self) -> str:
        """The upper end of the interval as text; the value itself, said to be so, where it is unknown."""
        if not self.known:
            return "unknown"
        if self.high_percent is None:
            return f"{_signed(self.percent)} %, from {self._cases} without an interval"
        high = max(self.high_percent, 0.0)
        return f"at most {high:.2f} %" if high >= 0.01 else "below 0.01 %"

    @property
    def text(self) -> str:
        """The loss and how sure it is, in a clause for readers."""
        if not self.known:
            return "the quality loss is unknown, as the true videos are"
        if self.low_percent is None:
            return f"quality loss {_shown(self.percent)}, from {self._cases}, too few to say how sure that is"
        if max(abs(self.low_percent), abs(self.high_percent)) < SMALLEST_PERCENT:
            return f"quality loss below {SMALLEST_PERCENT} %"
        return f"quality loss {_shown(self.percent)} ({interval_text(self.low_percent, self.high_percent, '+.2f')})"

    def tile(self, limit_percent: float = LIMIT_PERCENT) -> tuple[str, str]:
        """The value of a tile, and its interval beside the limit."""
        if not self.known:
            return "unknown", "no true video to hold it against"
        if self.low_percent is None:
            return _shown(self.percent), f"{self._cases}, too few for an interval; limit {limit_percent:g} %"
        ends = interval_text(self.low_percent, self.high_percent, "+.2f")
        if max(abs(self.low_percent), abs(self.high_percent or 0.0)) < SMALLEST_PERCENT:
            ends = f"95 % interval within ±{SMALLEST_PERCENT} %"
        return _shown(self.percent), f"{ends}; limit {limit_percent:g} %"

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
            "95 % interval unknown"
            if self.low_percent is None
            else f"95 % interval {_signed(self.low_percent)} to {_signed(self.high_percent)} %"
        )
        backbone = f", {self.backbone}" if self.backbone else ""
        return f"{_signed(self.percent)} % ({interval}, {self._cases}{backbone})"

    @property
    def _cases(self) -> str:
        return f"{self.cases} case" + "s" * (self.cases != 1)


def _shown(percent: float) -> str:
    """The value with its unit; one that nobody can see is not shown as 0.00."""
    return f"{_signed(percent)} %" if abs(percent) >= SMALLEST_PERCENT else f"< {SMALLEST_PERCENT} %"


def _signed(percent: float) -> str:
    """The value with a sign and two decimals; a value that rounds to 0 has no minus sign."""
    return f"{round(percent, 2) + 0.0:+.2f}"


def quality_loss(optimized_to_truth, original_to_truth, *, seed: int = 0) -> QualityLoss:
    """Relative worsening of LPIPS to the ground truth, averaged over held-out cases.

    Per case (LPIPS(Q,G) - LPIPS(O,G)) / LPIPS(O,G), with ground truth G, original output O and
    optimised output Q; the mean of these ratios, and its percentile bootstrap interval over cases.

    Args:
        optimized_to_truth: LPIPS(Q, G) of each case: numbers or `Scores`; None without ground truth.
        original_to_truth: LPIPS(O, G) of the same cases in the same order; None without ground truth.
        seed: seed of the bootstrap.

    Returns:
        QualityLoss: `QualityLoss.unknown()` when either argument is None.

    Raises:
        WanlabError: different numbers of cases, no case, a score that is negative or not finite, an
            LPIPS(O, G) of 0 (the ratio does not exist), or `Scores` of different backbones.
    """
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


def loss_to_truth(
    truths, originals, optimised, *, backbone: str = "auto", device="auto", seed: int = 0
) -> QualityLoss:
    """`quality_loss` of videos with their ground truths; unknown without a truth of the same length and size.

    Args:
        truths: the true video of each case, `[T, H, W, 3]`; None or empty without truth.
        originals, optimised: the videos of the same cases, as for `divergence`.
        backbone, device: as for `compare_videos`. seed: seed of the bootstrap.

    Raises:
        WanlabError: as for `compare_videos` and `quality_loss`, or different numbers of cases.
    """
    if truths is None or not len(truths):
        return QualityLoss.unknown()
    if not len(truths) == len(originals) == len(optimised):
        raise WanlabError(
            f"{len(truths)} truths, {len(originals)} original and {len(optimised)} optimised videos; give one of"
            " each per case"
        )
    truths, originals, optimised = (
        [_without_rate(video) for video in side] for side in (truths, originals, optimised)
    )
    if any(_size(g) != _size(o) for g, o in zip(truths, originals, strict=True)):
        return QualityLoss.unknown()
    sides = [
        [
            compare_videos(g, video, "lpips", backbone, device, progress=False)
            for g, video in zip(truths, side, strict=True)
        ]
        for side in (optimised, originals)
    ]
    return quality_loss(*sides, seed=seed)


def _without_rate(source) -> VideoLike:
    # A true video has no frame rate of its own, and nothing here depends on it.
    return replace(as_video(source), fps=None)


def _size(video: VideoLike) -> tuple[int, int, int]:
    return video.length, video.height, video.width


def _as_list(values) -> list:
    return [values] if isinstance(values, Scores | int | float) else list(values)
