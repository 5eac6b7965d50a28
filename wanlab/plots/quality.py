"""Figures of quality: scores per frame, noise floors, and maps of where a frame differs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from wanlab.core.errors import WanlabError
from wanlab.core.words import shown
from wanlab.evaluate.catalogue import CATALOGUE
from wanlab.evaluate.quality import floor_table
from wanlab.plots.style import FONT, GREY, OTHERS, ROW_PX, colour, needs, theme

PANELS_A_ROW = 4
NARROWEST = (1e-3, 1.0)
"""Least half of a panel: of a score from 0 to 1, of one in dB. Less is rounding, and nobody reads such ticks."""


LEAST_SCALE = 1e-4
"""Least end of the colour scale of a map: smaller differences are black."""


def per_frame_curves(scores: Any) -> go.Figure:
    """Scores of every frame, one panel per metric; the title names the backbone.

    Args:
        scores: `Scores`, its `per_frame` table (frame, metric, backbone, value), or a dict of them by name.

    Raises:
        WanlabError: LPIPS of different backbones in one figure.
    """
    many = scores if isinstance(scores, Mapping) else {"": scores}
    tables = {name: getattr(item, "per_frame", item) for name, item in many.items()}
    for table in tables.values():
        needs(table, "per_frame_curves", "frame", "metric", "backbone", "value")
    metrics = list(dict.fromkeys(metric for table in tables.values() for metric in table["metric"]))
    if not metrics:
        raise WanlabError("per_frame_curves needs at least one score")
    titles = []
    for metric in metrics:
        backbones = {b for t in tables.values() for b in t.loc[t["metric"] == metric, "backbone"]}
        if len(backbones) > 1:
            raise WanlabError(
                f"{metric} of different backbones cannot share a figure: {', '.join(sorted(backbones))}"
            )
        title = CATALOGUE[metric].title if metric in CATALOGUE else metric
        titles.append(title if backbones <= {"-", ""} else f"{title}, {backbones.pop()}")
    columns = 1 if len(metrics) <= 3 else 2
    rows = -(-len(metrics) // columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_xaxes=True,
        subplot_titles=titles,
        vertical_spacing=0.36 / max(rows, 3),
        horizontal_spacing=0.1,
    )
    for place, metric in enumerate(metrics):
        for index, (name, table) in enumerate(tables.items()):
            part = table[table["metric"] == metric]
            tint = colour(name) if name else OTHERS[index]
            figure.add_scatter(
                x=part["frame"].tolist(),
                y=[value if abs(value) != float("inf") else None for value in part["value"]],
                mode="lines+markers",
                name=name,
                legendgroup=name,
                showlegend=bool(name) and place == 0,
                line={"color": tint, "width": 2},
                marker={"size": 5, "color": tint},
                hovertemplate="frame %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
                row=place // columns + 1,
                col=place % columns + 1,
            )
        values = [v for table in tables.values() for v in table.loc[table["metric"] == metric, "value"]]
        ends = _readable_range([float(v) for v in values if math.isfinite(v)], metric)
        figure.update_yaxes(range=ends, nticks=5, row=place // columns + 1, col=place % columns + 1)
    for column in range(columns):
        lowest = -(-(len(metrics) - column) // columns)  # with an odd number of panels one place is empty
        figure.update_xaxes(title_text="frame", showticklabels=True, row=lowest, col=column + 1)
    figure.update_layout(template=theme(), height=60 + 190 * rows, margin={"t": 50})
    figure.update_annotations(font={"size": 13})
    return figure


def _readable_range(values: Sequence[float], metric: str) -> list[float] | None:
    """Ends of an axis whose ticks can be read although all values are alike; None leaves them to plotly."""
    if not values:
        return None
    low, high, least = min(values), max(values), NARROWEST[metric == "psnr"]
    if high - low >= least:
        return None
    facts = CATALOGUE.get(metric)
    low, high = (low + high) / 2 - least, (low + high) / 2 + least
    if facts and facts.better == "higher" and high > facts.perfect:
        return [facts.perfect - 2 * least, facts.perfect + 0.2 * least]
    if facts and facts.better == "lower" and low < facts.perfect:
        return [facts.perfect - 0.2 * least, facts.perfect + 2 * least]
    return [low, high]


def floor_intervals(divergence: Any, name: str = "optimised") -> go.Figure:
    """The optimised model and every noise floor: mean and 95 % interval over cases, one panel per metric.

    Args:
        divergence: from `wanlab.evaluate.divergence`, with noise floors.
        name: name of the optimisation, for the row of the optimised model.

    Raises:
        WanlabError: the divergence has no noise floor.
    """
    if not divergence.floors:
        raise WanlabError("floor_intervals needs a divergence with a floor; give one to evaluate.divergence")
    table = floor_table({name: divergence.scores} | divergence.floors)
    metrics = list(dict.fromkeys(table["metric"]))
    columns = min(len(metrics), PANELS_A_ROW)
    lines = -(-len(metrics) // columns)
    rows = table["floor"].nunique()
    panel_px = 2 * ROW_PX * rows
    figure = make_subplots(
        rows=lines,
        cols=columns,
        shared_yaxes=True,
        horizontal_spacing=0.1,
        vertical_spacing=0.3 / lines,
        subplot_titles=[CATALOGUE[metric].title for metric in metrics],
    )
    for place, metric in enumerate(metrics):
        for row in table[table["metric"] == metric].itertuples():
            tint = OTHERS[1] if row.floor == name else GREY
            same = row.identical_cases == row.cases
            # An infinite PSNR cannot be drawn: its row says "identical" at the largest finite value.
            at = row.mean if math.isfinite(row.mean) else _ends(table, metric)[1]
            spread = None if not row.high > row.low else [[row.high - row.mean], [row.mean - row.low]]
            figure.add_scatter(
                x=[at],
                y=[row.floor],
                mode="markers+text",
                marker={"size": 11, "color": tint, "symbol": "circle-open" if same else "circle"},
                error_x={"array": spread[0], "arrayminus": spread[1], "symmetric": False, "color": tint}
                if spread
                else None,
                text=["identical" if same else shown(row.mean)],
                textposition="top center",
                textfont={"size": 12, "color": GREY},
                cliponaxis=False,
                showlegend=False,
                hovertemplate=f"{row.floor}: %{{text}}<extra>{metric}</extra>",
                row=place // columns + 1,
                col=place % columns + 1,
            )
        # Space for the words beside the outermost points.
        low, high = _ends(table, metric)
        room = max(0.3 * (high - low), NARROWEST[metric == "psnr"])
        figure.update_xaxes(
            range=[low - room, high + room], row=place // columns + 1, col=place % columns + 1
        )
    figure.update_yaxes(range=[rows - 0.4, -0.7], type="category", categoryorder="array")
    figure.update_xaxes(nticks=3, tickangle=0)
    figure.update_layout(template=theme(), height=60 + lines * (panel_px + 60), margin={"t": 50, "r": 40})
    figure.update_annotations(font={"size": 13})
    return figure


def _ends(table: Any, metric: str) -> tuple[float, float]:
    """Smallest and largest finite number of a metric in a table of floors; 0 where there is none."""
    values = table.loc[table["metric"] == metric, ["mean", "low", "high"]].to_numpy().ravel()
    finite = [float(value) for value in values if math.isfinite(value)] or [0.0]
    return min(finite), max(finite)


def heat_panels(maps: Sequence[Any], longest_px: int = 240) -> go.Figure:
    """Where a frame differs, one panel per `wanlab.evaluate.HeatMap`, each with its own colour scale.

    Args:
        maps: heat maps of one frame.
        longest_px: pixels of the longer side; larger maps are averaged down to it.

    Raises:
        WanlabError: no map.
    """
    if not maps:
        raise WanlabError("heat_panels needs at least one map; make some with evaluate.heat_maps")
    gap = 0.12
    titles = [f"frame {each.frame}: {each.title}" for each in maps]
    figure = make_subplots(rows=1, cols=len(maps), horizontal_spacing=gap, subplot_titles=titles)
    width = (1 - gap * (len(maps) - 1)) / len(maps)
    for column, each in enumerate(maps, 1):
        values = _averaged(each.values, longest_px)
        figure.add_heatmap(
            z=values.round(6).tolist(),
            colorscale="Magma",
            zmin=0,
            zmax=max(float(values.max()), LEAST_SCALE),
            colorbar={
                "x": (column - 1) * (width + gap) + width + 0.005,
                "xanchor": "left",
                "thickness": 12,
                "len": 0.9,
                "tickfont": {"size": 11, "family": FONT, "color": GREY},
                "nticks": 5,
                "exponentformat": "none",
            },
            hovertemplate="%{z:.4g}<extra></extra>",
            row=1,
            col=column,
        )
        axis = figure.data[-1].xaxis or "x"
        figure.update_xaxes(visible=False, constrain="domain", row=1, col=column)
        figure.update_yaxes(
            visible=False, autorange="reversed", scaleanchor=axis, constrain="domain", row=1, col=column
        )
    rows, columns = maps[0].values.shape
    panel_px = 860 / len(maps) * rows / columns
    figure.update_layout(
        template=theme(), height=int(min(max(panel_px, 180), 520)) + 60, margin={"t": 40, "r": 60}
    )
    figure.update_annotations(font={"size": 13})
    return figure


def _averaged(values: Any, longest_px: int) -> np.ndarray:
    """Means over squares of pixels: a small spot is averaged, not skipped."""
    side = -(-max(values.shape) // longest_px)
    if side == 1:
        return np.asarray(values)
    height, width = (size // side for size in values.shape)
    squares = np.asarray(values)[: height * side, : width * side].reshape(height, side, width, side)
    return squares.mean(axis=(1, 3))
