"""Which columns of `wanlab.load_runs` a reader wants first: title, unit, which way is better, what it is about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wanlab.plots.style import UNITS
from wanlab.runs.comparison.metrics import better, is_ratio

MAIN = 8  # metrics that a table shows without being asked


@dataclass(frozen=True)
class Column:
    """One column of runs, as people read it."""

    name: str  # as in `wanlab.load_runs`: "m.summary.time_per_video_ms"
    title: str  # "time per video"
    unit: str = ""  # "ms"
    better: str | None = None  # "min" or "max", where one is
    about: str = ""  # latency, memory, load or quality
    low: str | None = None  # columns of its interval
    high: str | None = None

    @property
    def ratio(self) -> bool:
        """Whether a quotient of two values means anything: of times and bytes yes, of percentages and decibels no."""
        return self.better is not None and is_ratio(self.name)


# Most telling first: (ending of the name, title, unit, what it is about).
KNOWN = (
    ("time_per_video_ms", "time per video", "ms", "latency"),
    ("p95_ms", "95th percentile", "ms", "latency"),
    ("peak_memory_gib", "peak memory", "GiB", "memory"),
    ("weights_gib", "weights", "GiB", "memory"),
    ("load_ms", "load time", "ms", "load"),
    ("quality_loss_percent", "quality loss", "%", "quality"),
    ("divergence_lpips", "divergence", "LPIPS", "quality"),
    ("psnr_db", "PSNR", "dB", "quality"),
    ("time_per_frame_ms", "time per frame", "ms", "latency"),
)
# What is recorded to judge the others by: kept in the data, not shown beside them.
ASIDE = ("divergence_floor_lpips", "noise_percent", "cv_percent", "_low_percent", "_high_percent")
NOT_MEASURED = ("m.work.", "m.samples.")
# Endings by which a figure that nobody listed is known to have a better and a worse.
ABOUT = (
    ("_ms", "latency"),
    ("_s", "latency"),
    ("_per_s", "latency"),
    ("_fps", "latency"),
    ("_gib", "memory"),
    ("_mib", "memory"),
    ("_bytes", "memory"),
    ("lpips", "quality"),
    ("loss_percent", "quality"),
    ("_db", "quality"),
    ("ssim", "quality"),
)


def describe(name: str, having: Sequence[str] = ()) -> Column:
    """Title, unit and direction of a column, by its name alone; `having` are the columns it stands among."""
    bare = name[2:] if name[:2] in ("p.", "m.") else name
    bare = bare.removeprefix("summary.")
    if name.startswith("p."):
        words, unit = _words(bare)
        return Column(name, words, unit)
    for ending, title, unit, about in KNOWN:
        if bare == ending or bare.endswith("." + ending):
            owner = bare[: -len(ending)].rstrip(".").replace("_", " ")
            title = f"{owner}: {title}" if owner else title
            return Column(name, title, unit, better(name), about, *_interval(name, having))
    words, unit = _words(bare)
    about = next((about for ending, about in ABOUT if bare.endswith(ending)), "")
    return Column(name, words, unit, better(name) if about else None, about, *_interval(name, having))


def metrics(frame: Any, show: Sequence[str] | None = None) -> list[Column]:
    """Metric columns worth a place in a table, best known first.

    Args:
        frame: as `wanlab.load_runs` gives it.
        show: names to show instead, with or without `m.` and `summary.`; those that no run recorded are left out.
    """
    names = [name for name in frame.columns if name.startswith("m.") and _numbers(frame[name]) >= 1]
    if show:
        wanted = [_found(each, names) for each in show]
        return [describe(name, list(frame.columns)) for name in dict.fromkeys(filter(None, wanted))]
    names = [n for n in names if not n.startswith(NOT_MEASURED) and not n.endswith(ASIDE)]
    summary = [n for n in names if n.startswith("m.summary.")]
    described = [describe(name, list(frame.columns)) for name in summary or names]
    known = [_rank(column) for column in described]
    order = sorted(range(len(described)), key=lambda i: (known[i], -_numbers(frame[described[i].name]), i))
    return [described[i] for i in order][:MAIN]


def _found(wanted: str, names: Sequence[str]) -> str | None:
    """The column that a short name means: that of the summary before any other that ends so."""
    for name in (wanted, f"m.summary.{wanted}", f"m.{wanted}"):
        if name in names:
            return name
    return next((name for name in names if name.endswith("." + wanted)), None)


def axes(frame: Any, columns: Sequence[Column]) -> list[Column]:
    """Columns that a frontier can be drawn over: a known direction, and numbers in at least two runs."""
    return [c for c in columns if c.better and _numbers(frame[c.name]) >= 2]


def default_axes(columns: Sequence[Column]) -> tuple[str, str] | None:
    """Latency against quality, else against memory, else the first two."""
    if len(columns) < 2:
        return None
    x = next((c for c in columns if c.about == "latency"), columns[0])
    others = [c for c in columns if c is not x]
    for about in ("quality", "memory", "load"):
        for column in others:
            if column.about == about:
                return x.name, column.name
    return x.name, others[0].name


def varied(frame: Any, first: Sequence[str] = ()) -> list[str]:
    """Parameters (`p.<name>`) with more than one value among the runs; those in `first` come first."""
    named = [f"p.{name}" for name in first if f"p.{name}" in frame.columns]
    rest = [n for n in frame.columns if n.startswith("p.") and n not in named]
    return named + [n for n in rest if len({_key(v) for v in frame[n] if not missing(v)}) > 1]


def missing(value: Any) -> bool:
    """None and NaN, which is what pandas puts where a run has no value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def number(value: Any) -> float | None:
    """A measured value as a float; None for text, truth values and what is missing."""
    if isinstance(value, bool) or missing(value):
        return None
    try:
        return float(value) if not isinstance(value, str) else None
    except (TypeError, ValueError):
        return None


def _numbers(series: Any) -> int:
    return sum(found is not None and math.isfinite(found) for found in map(number, series))


def _rank(column: Column) -> int:
    bare = column.name.rsplit(".", 1)[-1]
    return next((i for i, row in enumerate(KNOWN) if row[0] == bare), len(KNOWN))


def _interval(name: str, having: Sequence[str]) -> tuple[str | None, str | None]:
    """`quality_loss_percent` has its interval in `quality_loss_low_percent` and `quality_loss_high_percent`."""
    stem, _, unit = name.rpartition("_")
    low, high = f"{stem}_low_{unit}", f"{stem}_high_{unit}"
    return (low, high) if low in having and high in having else (None, None)


def _words(name: str) -> tuple[str, str]:
    """A name as words and its unit: "peak_memory_gib" -> ("peak memory", "GiB")."""
    owner, _, last = name.rpartition(".")
    words = last.split("_")
    unit = ""
    if len(words) > 2 and words[-2:] == ["per", "s"]:
        words, unit = words[:-3] or words[:1], f"{words[-3]}/s"
    elif len(words) > 1 and words[-1] in UNITS:
        unit = UNITS[words.pop()]
    title = " ".join(words)
    return (f"{owner.replace('_', ' ').replace('.', ': ')}: {title}" if owner else title), unit


def _key(value: Any) -> str:
    return f"{type(value).__name__}:{value!r}"
