"""What recorded figures mean: which way is better, and whether two are divided or subtracted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from wanlab.errors import WanlabError, did_you_mean

SUMMARY = "summary"
SHOWN = (
    "time_per_video_ms",
    "peak_memory_gib",
    "load_ms",
    "weights_gib",
    "divergence_lpips",
    "quality_loss_percent",
)
"""Figures of a configuration's `summary` that are shown when nobody says which."""

MOST_SHOWN = 8
TIMED = ("time_per_video_ms", "time_per_frame_ms")
"""Figures that the recorded samples are samples of."""

_MORE_IS_BETTER = re.compile(r"(psnr|ssim|throughput|speedup|fps|per_s$|cosine|tflops|_db$)")
_SUBTRACTED = re.compile(r"(percent|lpips|psnr|ssim|_db$|cosine|flicker)")


def better(column: str) -> str:
    """`"max"` where more of a figure is better (a throughput, PSNR), else `"min"`."""
    return "max" if _MORE_IS_BETTER.search(_last(column)) else "min"


def is_ratio(column: str) -> bool:
    """Whether two values are divided (a time, a size) or subtracted (a percentage, decibels, LPIPS)."""
    return not _SUBTRACTED.search(_last(column))


def ratio(column: str, value: float, baseline: float) -> float:
    """How many times better than the baseline, above 1 is better; NaN where there is nothing to divide."""
    top, bottom = (value, baseline) if better(column) == "max" else (baseline, value)
    if not (known(top) and known(bottom)) or bottom == 0 or top == 0:
        return math.nan
    return top / bottom


def known(value: Any) -> bool:
    """Whether it is a number other than NaN; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def flat(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded scalars under the names that a person would ask for: entries of `summary` have no prefix."""
    from wanlab.runs.store import scalars

    found = scalars(metrics.items())
    return {name.removeprefix(f"{SUMMARY}."): value for name, value in found.items()}


def resolve(name: str, columns: Iterable[str]) -> str:
    """The column that a name means: itself, or the only one that ends in it (`speedup` of `gain.speedup`).

    Raises:
        WanlabError: none or several.
    """
    columns = list(dict.fromkeys(columns))
    if name in columns:
        return name
    short = name.removeprefix("m.").removeprefix(f"{SUMMARY}.")
    if short in columns:
        return short
    ends = [column for column in columns if column.endswith(f".{short}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise WanlabError(f"{name!r} could be {', '.join(ends)}; give one of them")
    near = did_you_mean(name, [*columns, *(column.rpartition(".")[2] for column in columns)])
    known_names = (
        f"; there is {', '.join(columns[:12])}{' ...' if len(columns) > 12 else ''}" if columns else ""
    )
    raise WanlabError(f"no recorded number {name!r}{near}{'' if near else known_names}")


def _last(column: str) -> str:
    return str(column).rpartition(".")[2].lower()
