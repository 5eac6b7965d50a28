"""Scores of one video against another: tables, JSON, and no mixing of backbones."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("lpips", "psnr", "ssim")
LOWER_IS_BETTER = {"lpips": True, "psnr": False, "ssim": False}
NO_BACKBONE = "-"


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of an optimised video against an original, frame by frame.

    Attributes:
        per_frame: DataFrame with frame, metric, backbone, value. PSNR in dB (infinite for equal
            frames), SSIM up to 1, LPIPS from 0. The backbone is `"-"` where there is none.
        original, optimized: what was compared, for reading.
        frames, height, width, fps: size of both; fps is None for plain arrays.
    """

    per_frame: pd.DataFrame
    original: str
    optimized: str
    frames: int
    height: int
    width: int
    fps: float | None = None

    @property
    def backbone(self) -> str | None:
        """The LPIPS backbone, or None when LPIPS was not asked for."""
        names = self.per_frame.loc[self.per_frame["metric"] == "lpips", "backbone"]
        return None if names.empty else str(names.iloc[0])

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row per metric: metric, backbone, mean, worst, worst_frame.

        The mean PSNR is over frames that differ (infinite only if none does), so that one equal
        frame does not hide the others.
        """
        import pandas as pd

        rows = []
        for (metric, backbone), group in self.per_frame.groupby(["metric", "backbone"], sort=False):
            values = group["value"].to_numpy()
            worst = int(values.argmax() if LOWER_IS_BETTER[metric] else values.argmin())
            rows.append(
                {
                    "metric": metric,
                    "backbone": backbone,
                    "mean": mean_score(values),
                    "worst": float(values[worst]),
                    "worst_frame": int(group["frame"].iloc[worst]),
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
        # Two perfect videos differ by nothing, although inf - inf is undefined.
        equal = table["mean"] == table["other_mean"]
        table["difference"] = (table["mean"] - table["other_mean"]).mask(equal, 0.0)
        return table[["metric", "backbone", "mean", "other_mean", "difference"]]

    def table(self) -> str:
        """The summary as aligned text for a terminal."""
        header = ("metric", "backbone", "mean", "worst", "worst frame")
        rows = [
            (
                row.metric,
                row.backbone,
                _number(row.metric, row.mean),
                _number(row.metric, row.worst),
                str(row.worst_frame),
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
        """JSON of everything, written to `path` as well when given. Infinity is the string `"inf"`."""
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
            "metrics": per_metric,
        }
        text = json.dumps(data, indent=2, allow_nan=False)
        if path is not None:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, path)
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike) -> Scores:
        """Read back what `to_json` made: the text itself or the path of its file.

        Raises:
            WanlabError: no such file, or not such JSON.
        """
        text, name = str(source), "the text"
        if not text.lstrip().startswith("{"):
            name = text
            try:
                text = Path(source).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
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
    """Mean of scores; infinite ones count only when there is no other."""
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float(values.mean())


def same_backbone(scores: Sequence[Scores]) -> str | None:
    """The one LPIPS backbone of several scores (None when none has LPIPS).

    Raises:
        WanlabError: there is more than one; their scales differ.
    """
    names = sorted({score.backbone for score in scores if score.backbone is not None})
    if len(names) > 1:
        raise WanlabError(
            f"scores of LPIPS backbones {' and '.join(names)} cannot be compared; score all with one backbone"
        )
    return names[0] if names else None


def long_table(values: dict) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        [
            {"frame": frame, "metric": metric, "backbone": backbone, "value": float(value)}
            for (metric, backbone), column in values.items()
            for frame, value in enumerate(column)
        ],
        columns=["frame", "metric", "backbone", "value"],
    )


def _number(metric: str, value: float) -> str:
    return f"{value:.2f} dB" if metric == "psnr" else f"{value:.5f}"


def _json_number(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))
