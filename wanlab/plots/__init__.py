"""Figures. Data in, plotly figure out; plotly is imported when the first one is drawn."""

from __future__ import annotations

from wanlab.plots.breakdown import CATEGORY_NAMES, category_bars
from wanlab.plots.experts import boundary_curves, disagreement_curve, expert_diagram, expert_steps, switch_bars
from wanlab.plots.flame import difference_bars, flame_icicle
from wanlab.plots.quality import per_frame_curves
from wanlab.plots.style import COMPONENT_COLOURS, NAMES, OTHERS, colour, label, theme
from wanlab.plots.times import before_after_bars, breakdown_bar, samples_strip, schedule_timeline

__all__ = [
    "CATEGORY_NAMES",
    "COMPONENT_COLOURS",
    "NAMES",
    "OTHERS",
    "before_after_bars",
    "boundary_curves",
    "breakdown_bar",
    "category_bars",
    "colour",
    "difference_bars",
    "disagreement_curve",
    "expert_diagram",
    "expert_steps",
    "flame_icicle",
    "label",
    "per_frame_curves",
    "samples_strip",
    "schedule_timeline",
    "switch_bars",
    "theme",
]
