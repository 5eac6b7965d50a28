"""Scores of one video against another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.plots.style import METRICS, OTHERS, colour, needs, theme

if TYPE_CHECKING:
    import plotly.graph_objects as go


def per_frame_curves(scores: Any) -> go.Figure:
    """Scores frame by frame, one panel per metric; the backbone is named.

    Args:
        scores: `Scores`, its `per_frame` table (frame, metric, backbone, value), or a dict of them by name.

    Raises:
        WanlabError: LPIPS of different backbones in one figure.
    """
    from plotly.subplots import make_subplots

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
        named = METRICS.get(metric, metric)
        titles.append(named if backbones <= {"-", ""} else f"{named}, {backbones.pop()}")
    figure = make_subplots(
        rows=len(metrics), cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.12
    )
    for row, metric in enumerate(metrics, 1):
        for index, (name, table) in enumerate(tables.items()):
            part = table[table["metric"] == metric]
            tint = colour(name) if name else OTHERS[index]
            figure.add_scatter(
                x=part["frame"].tolist(),
                y=[value if abs(value) != float("inf") else None for value in part["value"]],
                mode="lines+markers",
                name=name,
                legendgroup=name,
                showlegend=bool(name) and row == 1,
                line={"color": tint, "width": 2},
                marker={"size": 5, "color": tint},
                hovertemplate="frame %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
                row=row,
                col=1,
            )
    figure.update_xaxes(title_text="frame", row=len(metrics), col=1)
    figure.update_layout(template=theme(), height=60 + 190 * len(metrics), margin={"t": 50})
    figure.update_annotations(font={"size": 13})
    return figure
