"""Figures. Data in, plotly figure out; plotly is imported when the first one is drawn."""

from __future__ import annotations

from wanlab.plots.flame import difference_bars, flame_icicle
from wanlab.plots.quality import per_frame_curves
from wanlab.plots.style import COMPONENT_COLOURS, NAMES, OTHERS, colour, label, theme
from wanlab.plots.times import before_after_bars, breakdown_bar, samples_strip, schedule_timeline

__all__ = [
    "COMPONENT_COLOURS",
    "NAMES",
    "OTHERS",
    "before_after_bars",
    "breakdown_bar",
    "colour",
    "difference_bars",
    "flame_icicle",
    "label",
    "per_frame_curves",
    "samples_strip",
    "schedule_timeline",
    "theme",
]
