"""Figures. Data in, plotly figure out; plotly is imported when the first one is drawn."""

from __future__ import annotations

from wanlab.plots.attention import head_map, head_type_bars, kernel_bars, layer_time_lines
from wanlab.plots.bench import bench_bars, operator_bars
from wanlab.plots.breakdown import CATEGORY_NAMES, category_bars
from wanlab.plots.diagram import expert_diagram
from wanlab.plots.engine import ROLE_NAMES, difference_waterfall, module_treemap, role_bars, site_dumbbells
from wanlab.plots.experts import boundary_curves, disagreement_curve, expert_steps, switch_bars
from wanlab.plots.flame import difference_bars, difference_icicle, flame_icicle, short_name
from wanlab.plots.frontier import format_map, frontier_plot, relation_plot
from wanlab.plots.memory import PART_NAMES, lever_bars, memory_bars, memory_timeline
from wanlab.plots.parallel import parallel_lines
from wanlab.plots.platforms import platform_bars
from wanlab.plots.quality import floor_intervals, heat_panels, per_frame_curves
from wanlab.plots.runs import failure_bars, run_frontier
from wanlab.plots.sensitivity import agreement_scatter, sensitivity_bars, sensitivity_map, tolerance_bars
from wanlab.plots.style import COMPONENT_COLOURS, NAMES, OTHERS, colour, label, theme
from wanlab.plots.techniques import technique_bars
from wanlab.plots.tensorrt import build_bars
from wanlab.plots.times import before_after_bars, breakdown_bar, samples_strip, schedule_timeline
from wanlab.plots.triage import decision_tree

__all__ = [
    "CATEGORY_NAMES",
    "COMPONENT_COLOURS",
    "NAMES",
    "OTHERS",
    "PART_NAMES",
    "ROLE_NAMES",
    "agreement_scatter",
    "before_after_bars",
    "bench_bars",
    "boundary_curves",
    "breakdown_bar",
    "build_bars",
    "category_bars",
    "colour",
    "decision_tree",
    "difference_bars",
    "difference_icicle",
    "difference_waterfall",
    "disagreement_curve",
    "expert_diagram",
    "expert_steps",
    "failure_bars",
    "flame_icicle",
    "floor_intervals",
    "format_map",
    "frontier_plot",
    "head_map",
    "head_type_bars",
    "heat_panels",
    "kernel_bars",
    "label",
    "layer_time_lines",
    "lever_bars",
    "memory_bars",
    "memory_timeline",
    "module_treemap",
    "operator_bars",
    "parallel_lines",
    "per_frame_curves",
    "platform_bars",
    "relation_plot",
    "role_bars",
    "run_frontier",
    "samples_strip",
    "schedule_timeline",
    "sensitivity_bars",
    "sensitivity_map",
    "short_name",
    "site_dumbbells",
    "switch_bars",
    "technique_bars",
    "theme",
    "tolerance_bars",
]
