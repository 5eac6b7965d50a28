"""Scores of one video against another: the catalogue of metrics, tables and JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from wanlab.core.errors import WanlabError
from wanlab.core.files import write_text
from wanlab.core.text import read_text
from wanlab.evaluate.catalogue import CATALOGUE

NO_BACKBONE = "-"


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of an optimised video against an original, frame by frame.

    Attributes:
        per_frame: DataFrame with frame, metric, backbone, value. PSNR in dB (infinite for equal
            frames), SSIM up to 1, LPIPS from 0; `CATALOGUE` lists all metrics. Metrics of two
            frames begin at frame 1. The backbone is the network of LPIPS, the number of scales of MS-SSIM,
            and `"-"` for other metrics.
        original, optimized: names of the two videos.
        frames, height, width, fps: size of both; fps is None for plain arrays.
        notes: what a reader of the scores should know of the files, such as a variable frame rate.
    """

    per_frame: pd.DataFrame
    original: str
    optimized: str
    frames: int
    height: int
    width: int
    fps: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def backbone(self) -> str | None:
        """The LPIPS backbone, or None when LPIPS was not measured."""
        names = self.per_frame.loc[self.per_frame["metric"] == "lpips", "backbone"]
        return None if names.empty else str(names.iloc[0])

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row per metric: metric, backbone, mean, worst, worst_frame, drift_per_frame.

        The mean PSNR is over frames that differ (infinite only if none does), so that one equal
        frame does not hide the others. The drift is the slope of a straight line through the
        frames' scores (least squares, finite ones): the change of the score per frame. A
        video whose difference from the original grows has a slope towards the worse.
        """
        rows = []
        for (metric, backbone), group in self.per_frame.groupby(["metric", "backbone"], sort=False):
            values, frames = group["value"].to_numpy(), group["frame"].to_numpy()
            errors = [CATALOGUE[metric].error(value) for value in values]
            worst = errors.index(max(errors))
            rows.append(
                {
                    "metric": metric,
                    "backbone": backbone,
                    "mean": mean_score(values),
                    "worst": float(values[worst]),
                    "worst_frame": int(frames[worst]),
                    "drift_per_frame": slope(frames, values),
                }
            )
        return pd.DataFrame(rows)

    def mean(self, metric: str = "lpips") -> float:
        """Mean of a metric over the frames (see `summary`).

        Raises:
            WanlabError: the metric was not measured.
        """
        row = self.summary[self.summary["metric"] == metric]
        if row.empty:
            measured = ", ".join(self.summary["metric"])
            raise WanlabError(f"these scores hold no {metric!r}; measured: {measured}")
        return float(row["mean"].iloc[0])

    def worst_frame(self, metric: str = "lpips") -> int:
        """The frame at which a metric is worst.

        Raises:
            WanlabError: the metric was not measured.
        """
        self.mean(metric)
        return int(self.summary.set_index("metric").loc[metric, "worst_frame"])

    def difference(self, other: Scores) -> pd.DataFrame:
        """These scores beside others: metric, backbone, mean, other_mean, difference (mean - other).

        Raises:
            WanlabError: the LPIPS backbones differ, or no metric is in both.
        """
        same_backbone([self, other])
        table = self.summary.merge(
            other.summary[["metric", "backbone", "mean"]].rename(columns={"mean": "other_mean"}),
            on=["metric", "backbone"],
        )
        if table.empty:
            raise WanlabError("the two scores have no metric in common; measure the same metrics for both")
        # Two perfect videos differ by 0, although inf - inf is undefined.
        equal = table["mean"] == table["other_mean"]
        table["difference"] = (table["mean"] - table["other_mean"]).mask(equal, 0.0)
        return table[["metric", "backbone", "mean", "other_mean", "difference"]]

    def table(self) -> str:
        """The summary as aligned text for a terminal."""
        header = ("metric", "backbone", "mean", "worst", "worst frame", "drift per frame")
        rows = [
            (
                row.metric,
                row.backbone,
                CATALOGUE[row.metric].text(row.mean),
                CATALOGUE[row.metric].text(row.worst),
                str(row.worst_frame),
                f"{row.drift_per_frame:+.2g}" if math.isfinite(row.drift_per_frame) else "-",
            )
            for row in self.summary.itertuples()
        ]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in [header, *rows]
        )

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """JSON of all scores, also written to `path` if given. Infinity is the string `"inf"`."""
        per_metric = {}
        for (metric, backbone), group in self.per_frame.groupby(["metric", "backbone"], sort=False):
            per_metric[metric] = {
                "backbone": None if backbone == NO_BACKBONE else backbone,
                "per_frame": [_json_number(value) for value in group["value"]],
            }
        for row in self.summary.itertuples():
            per_metric[row.metric] |= {
                "mean": _json_number(row.mean),
                "worst": _json_number(row.worst),
                "worst_frame": row.worst_frame,
            }
        data = {
            "original": self.original,
            "optimized": self.optimized,
            "frames": self.frames,
            "height": self.height,
            "width": self.width,
            "fps": self.fps,
            "notes": list(self.notes),
            "metrics": per_metric,
        }
        text = json.dumps(data, indent=2, allow_nan=False)
        if path is not None:
            write_text(path, text + "\n")
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike) -> Scores:
        """Scores from JSON made by `to_json`: its text or the path of its file.

        Raises:
            WanlabError: no such file, or not such JSON.
        """
        text, name = str(source), "the text"
        if not text.lstrip().startswith("{"):
            name = text
            try:
                text = read_text(source, "json_mib")
            except WanlabError as error:
                raise WanlabError(f"cannot read scores from {name}: {error}") from error
        try:
            data = json.loads(text)
            values = {
                (metric, scores["backbone"] or NO_BACKBONE): [float(value) for value in scores["per_frame"]]
                for metric, scores in data["metrics"].items()
            }
            return cls(
                long_table(values),
                **{key: data[key] for key in ("original", "optimized", "frames", "height", "width", "fps")},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WanlabError(f"{name} holds no scores; make them with wanlab evaluate") from error


def mean_score(values) -> float:
    """Mean of scores; infinite ones are left out unless all are infinite."""
    values = np.asarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float(values.mean())


def slope(frames, values) -> float:
    """Least squares slope of the finite values over their frames; NaN with fewer than two."""
    frames, values = np.asarray(frames, dtype=np.float64), np.asarray(values, dtype=np.float64)
    frames, values = frames[np.isfinite(values)], values[np.isfinite(values)]
    if len(values) < 2:
        return math.nan
    frames = frames - frames.mean()
    return float((frames * (values - values.mean())).sum() / np.square(frames).sum())


def same_backbone(scores: Sequence[Scores]) -> str | None:
    """The one LPIPS backbone of several scores (None when none has LPIPS).

    Raises:
        WanlabError: there is more than one; scores of different backbones cannot be compared.
    """
    names = sorted({score.backbone for score in scores if score.backbone is not None})
    if len(names) > 1:
        raise WanlabError(
            f"scores of LPIPS backbones {' and '.join(names)} cannot be compared; score all with one backbone"
        )
    return names[0] if names else None


def long_table(values: dict) -> pd.DataFrame:
    """`Scores.per_frame` from (metric, backbone) -> the scores of its frames."""
    return pd.DataFrame(
        [
            {"frame": frame, "metric": metric, "backbone": backbone, "value": float(value)}
            for (metric, backbone), column in values.items()
            for frame, value in enumerate(column, CATALOGUE[metric].first_frame)
        ],
        columns=["frame", "metric", "backbone", "value"],
    )


def _json_number(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))
