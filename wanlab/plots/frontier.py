"""Plans from loose to tight: what they cost against what they do, with plans picked by hand beside them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from wanlab.plots.style import GREY, NAMES, ROW_PX, colour, needs, theme

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

CHOSEN = "#3d85c6"
OTHER = "#e07b39"
BITS = "bits_per_weight"
TITLES = {
    BITS: "bits per linear weight",
    "saved_percent": "saved (%)",
    "effect": "predicted effect on the final latents",
}


def frontier_plot(
    frontier: Any,
    presets: pd.DataFrame | None = None,
    *,
    selected: Any = None,
    budget: float | None = None,
    cost: str = BITS,
) -> go.Figure:
    """Predicted effect over cost of the frontier's plans, of presets, and of the plan that was chosen.

    Args:
        frontier: as `precision.frontier` gives it, or its table.
        presets: as `precision.predict` gives them.
        selected: a `Selection`, or its row.
        budget: of the effect, drawn as a line.
        cost: `"bits_per_weight"` or `"saved_percent"`.

    Raises:
        WanlabError: missing columns.
    """
    import plotly.graph_objects as go

    frame = getattr(frontier, "frame", frontier)
    needs(frame, "frontier_plot", "plan", "effect", cost)
    figure = go.Figure()
    shown = frame[frame["effect"] > 0].sort_values(cost)
    hover = f"%{{text}}<br>{TITLES[cost]} %{{x:.2f}}<br>effect %{{y:.2g}}<extra></extra>"
    figure.add_scatter(
        x=shown[cost].tolist(),
        y=shown["effect"].tolist(),
        text=shown["plan"].tolist(),
        mode="lines+markers",
        line={"color": CHOSEN, "width": 2},
        marker={"size": 7},
        name="cheapest within a budget",
        hovertemplate=hover,
    )
    if presets is not None and len(presets):
        needs(presets, "frontier_plot", "plan", "effect", cost)
        own = presets[presets["effect"] > 0].sort_values([cost, "effect"])
        figure.add_scatter(
            x=own[cost].tolist(),
            y=own["effect"].tolist(),
            text=own["plan"].tolist(),
            mode="markers+text",
            textposition=_sides(own[cost].tolist(), own["effect"].tolist()),
            textfont={"size": 11},
            marker={"color": OTHER, "size": 9, "symbol": "diamond"},
            name="picked by hand",
            hovertemplate=hover,
        )
    if selected is not None:
        row = selected.row() if hasattr(selected, "row") else dict(selected)
        figure.add_scatter(
            x=[row[cost]],
            y=[row["effect"]],
            text=[row["plan"]],
            mode="markers",
            marker={"color": CHOSEN, "size": 16, "symbol": "star", "line": {"color": GREY, "width": 1}},
            name="chosen",
            hovertemplate=hover,
        )
    if budget:
        figure.add_hline(y=budget, line={"color": GREY, "dash": "dash", "width": 1.2})
        figure.add_annotation(
            x=0.55, xref="x domain", y=math.log10(budget), text="budget", showarrow=False, yanchor="bottom"
        )
    figure.update_layout(template=theme(), height=440)
    figure.update_xaxes(title_text=TITLES[cost])
    figure.update_yaxes(title_text=TITLES["effect"], type="log", exponentformat="e", minexponent=1, dtick=1)
    return figure


def relation_plot(
    relation: Any, predictions: pd.DataFrame | None = None, limit_percent: float | None = None
) -> go.Figure:
    """Upper end of the quality loss over the predicted effect: plans that were tried, the fit, and the limit.

    Args:
        relation: as `precision.fit_relation` gives it.
        predictions: `Chosen.predictions()`, whose last row is the chosen plan.
    """
    import plotly.graph_objects as go

    points = relation.points
    largest = points["predicted"].max()
    least = min(
        points["predicted"].min(),
        *(predictions["predicted_effect"] if predictions is not None else [largest]),
    )
    xs = [least * (largest / least) ** (i / 60) for i in range(61)] if largest > least else [largest]
    figure = go.Figure()
    figure.add_scatter(
        x=xs,
        y=[relation.upper_percent(x) for x in xs],
        mode="lines",
        line={"color": GREY, "dash": "dot"},
        name=f"fit: {relation.form}, {relation.residual_percent:.2g} % off",
        hoverinfo="skip",
    )
    hover = "%{text}<br>effect %{x:.2g}<br>upper end %{y:.2f} %<extra></extra>"
    figure.add_scatter(
        x=points["predicted"].tolist(),
        y=points["upper_percent"].tolist(),
        text=points["plan"].tolist(),
        mode="markers",
        marker={"color": CHOSEN, "size": 10},
        name="plans tried",
        hovertemplate=hover,
    )
    if predictions is not None:
        last = predictions.iloc[-1]
        figure.add_scatter(
            x=[last["predicted_effect"]],
            y=[last["upper_percent"]],
            text=[last["plan"]],
            mode="markers",
            marker={"color": CHOSEN, "size": 16, "symbol": "star", "line": {"color": GREY, "width": 1}},
            name="chosen",
            hovertemplate=hover,
        )
    if limit_percent:
        figure.add_hline(y=limit_percent, line={"color": GREY, "dash": "dash", "width": 1.2})
        figure.add_annotation(
            x=0,
            xref="x domain",
            y=limit_percent,
            text="limit",
            showarrow=False,
            yanchor="bottom",
            xanchor="left",
        )
    figure.update_layout(template=theme(), height=360)
    figure.update_xaxes(title_text=TITLES["effect"], type="log", exponentformat="e", minexponent=1, dtick=1)
    figure.update_yaxes(title_text="quality loss, upper end (%)")
    return figure


def format_map(selection: Any) -> go.Figure:
    """The format of every layer: projections down, blocks across, a panel per expert; steps in the hover text.

    Args:
        selection: from `precision.select_plan`.
    """
    from plotly.subplots import make_subplots

    frame = selection.frame.dropna(subset=["block"])
    components = list(dict.fromkeys(frame["component"]))
    formats = sorted(set(frame["format"]), key=lambda name: (name != "default", name))
    projections = sorted(set(frame["projection"]))
    blocks = sorted(set(frame["block"].astype(int)))
    figure = make_subplots(
        rows=1,
        cols=len(components),
        subplot_titles=[NAMES.get(name, name) for name in components],
        shared_yaxes=True,
        horizontal_spacing=0.04,
    )
    shades = {name: _shade(name, index) for index, name in enumerate(formats)}
    for column, component in enumerate(components, 1):
        own = frame[frame["component"] == component]
        table = [[None] * len(blocks) for _ in projections]
        words = [[""] * len(blocks) for _ in projections]
        for (projection, block), rows in own.groupby(["projection", "block"]):
            line, place = projections.index(projection), blocks.index(int(block))
            # Where the format changes with the step, the first is drawn.
            table[line][place] = formats.index(rows["format"].iloc[0])
            words[line][place] = ", ".join(dict.fromkeys(rows["format"]))
        steps = [
            [i / len(formats) + at, shades[name]]
            for i, name in enumerate(formats)
            for at in (0, 1 / len(formats))
        ]
        figure.add_heatmap(
            x=[str(block) for block in blocks],
            y=projections,
            z=table,
            customdata=words,
            zmin=-0.5,
            zmax=len(formats) - 0.5,
            colorscale=steps,
            showscale=False,
            xgap=1,
            ygap=1,
            hovertemplate="block %{x}, %{y}<br>%{customdata}<extra></extra>",
            row=1,
            col=column,
        )
    for name in formats:
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker={"color": shades[name], "symbol": "square", "size": 11},
            name=name,
        )
    figure.update_layout(
        template=theme(),
        height=150 + int(0.7 * ROW_PX * len(projections)),
        margin={"t": 70},
        legend={"y": 1.1},
    )
    figure.update_xaxes(title_text="block", type="category", nticks=10)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_annotations(font={"size": 13})
    return figure


def _shade(name: str, index: int) -> str:
    """A format's own colour; weight-only and per-channel forms paler, as they share their numbers' colour."""
    if name == "default":
        return "#9aa3ad"
    base = colour(name)
    if "-" not in name:
        return base
    red, green, blue = (int(base[i : i + 2], 16) for i in (1, 3, 5))
    mix = 0.4 if "weight" in name and "int4" not in name else 0.0 if "int4" in name else 0.35
    return f"rgb({', '.join(str(round(c + (255 - c) * mix)) for c in (red, green, blue))})"


def _sides(xs: list[float], ys: list[float]) -> list[str]:
    """Where each name goes: above and below in turn where marks are near each other."""
    middle = (min(xs) + max(xs)) / 2 if xs else 0
    made: list[str] = []
    for index, (x, y) in enumerate(zip(xs, ys, strict=True)):
        near = (
            index and abs(x - xs[index - 1]) < 0.15 * (max(xs) - min(xs) or 1) and 0.5 < y / ys[index - 1] < 2
        )
        up = "bottom" if near and made[-1].startswith("top") else "top"
        made.append(f"{up} {'right' if x <= middle else 'left'}")
    return made
