"""Figures of sparse attention: quality against what is computed, time against density, and the pattern of every head."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from wanlab.core.words import NAMES
from wanlab.plots.style import GREY, OTHERS, needs, theme

CELLS = 12
"""Heads and blocks up to which the cells of a map have room for their figures."""


def loss_against_density(frame: pd.DataFrame, limit_percent: float) -> go.Figure:
    """Quality loss of each variant with its 95 % interval, against the scores of self-attention that it computes; a colour
    for patterns of each head, and for each pattern that all heads share.

    Args:
        frame: `SparseTrial.frame`. limit_percent: limit of the loss.
    """
    needs(frame, "loss_against_density", "variant", "kind", "computed_percent", "quality_loss_percent")
    figure = go.Figure()
    for number, (kind, own) in enumerate(frame.groupby("kind", sort=False)):
        rows = own.sort_values("computed_percent")
        loss = rows["quality_loss_percent"].astype(float)
        figure.add_scatter(
            x=rows["computed_percent"],
            y=loss,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": rows["loss_high"].astype(float) - loss,
                "arrayminus": loss - rows["loss_low"].astype(float),
                "thickness": 2,
                "width": 5,
            },
            mode="markers",
            name=_words(str(kind)),
            marker={"size": 10, "color": OTHERS[number % len(OTHERS)]},
            customdata=rows["variant"],
            hovertemplate="%{customdata}: %{x:.3g} % computed, quality loss %{y:+.2f} %<extra></extra>",
        )
        for row in rows.itertuples():
            figure.add_annotation(
                x=row.computed_percent,
                y=row.quality_loss_percent,
                text=row.variant,
                showarrow=False,
                xanchor="left",
                xshift=9,
                yshift=9,
                font={"size": 11, "color": GREY},
            )
    figure.add_hline(y=limit_percent, line={"color": GREY, "dash": "dash", "width": 1.2}, layer="below")
    figure.add_annotation(
        x=0, xref="paper", y=limit_percent, text="limit", showarrow=False, xanchor="left", yanchor="bottom"
    )
    figure.update_xaxes(title_text="scores of self-attention that are computed (%)", range=[0, 112])
    figure.update_yaxes(title_text="quality loss (%), less is better", zeroline=True)
    return figure.update_layout(template=theme(), height=380, margin={"t": 50})


def _words(kind: str) -> str:
    return kind if " " in kind else f"one {kind} pattern for all heads"


def time_against_density(frame: pd.DataFrame) -> go.Figure:
    """Time of the kernel at each density, with PyTorch's dense attention and the line of a time that falls in proportion.

    Args:
        frame: `KernelTimes.frame`.
    """
    needs(frame, "time_against_density", "attention", "density_percent", "time_ms", "of_all_blocks_percent")
    own = frame["of_all_blocks_percent"].notna()
    swept = own & frame["attention"].str.contains("of the blocks")
    rows = frame[swept].sort_values("density_percent")
    figure = go.Figure()
    whole = float(rows["time_ms"].iloc[-1])
    figure.add_scatter(
        x=[0, 100],
        y=[0, whole],
        mode="lines",
        name="in proportion",
        line={"color": GREY, "dash": "dash", "width": 1.5},
        hoverinfo="skip",
    )
    for name, part, symbol, tint in (
        ("this machine's kernel for blocks", rows, "circle", OTHERS[0]),
        ("a pattern for each head", frame[own & ~swept], "diamond", OTHERS[1]),
        ("PyTorch's own, dense", frame[~own], "square", OTHERS[2]),
    ):
        if part.empty:
            continue
        figure.add_scatter(
            x=part["density_percent"],
            y=part["time_ms"],
            mode="lines+markers" if len(part) > 1 else "markers",
            name=name,
            line={"color": tint, "width": 2},
            marker={"size": 10, "symbol": symbol, "color": tint},
            hovertemplate="%{x:.3g} % of the blocks: %{y:.3g} ms<extra>%{fullData.name}</extra>",
        )
    figure.update_xaxes(title_text="blocks that are computed (%)", range=[0, 105])
    figure.update_yaxes(title_text="time of one attention (ms)", rangemode="tozero")
    return figure.update_layout(template=theme(), height=340, margin={"t": 50})


def head_density_map(losses: pd.DataFrame) -> go.Figure:
    """Every head of every block, a map per expert: which part of its blocks is computed, and below it the error of its
    output.

    Args:
        losses: from `techniques.head_losses`.
    """
    needs(
        losses,
        "head_density_map",
        "component",
        "block",
        "head",
        "pattern",
        "density_percent",
        "relative_error",
    )
    experts = list(dict.fromkeys(losses["component"]))
    blocks, heads = losses["block"].max() + 1, losses["head"].max() + 1
    maps: tuple[tuple[str, str, str, Any, float], ...] = (
        ("density_percent", "blocks computed (%)", "Blues", 1.0, 100.0),
        ("relative_error", "error (%)", "Oranges", 100.0, 100 * float(losses["relative_error"].max()) or 1.0),
    )
    figure = make_subplots(
        rows=2,
        cols=len(experts),
        subplot_titles=[f"{NAMES.get(name, name)}: {title}" for _, title, *_ in maps for name in experts],
        horizontal_spacing=0.08,
        vertical_spacing=0.2,
    )
    for line, (column, title, scale, factor, top) in enumerate(maps, 1):
        for place, component in enumerate(experts, 1):
            own = losses[losses["component"] == component]
            values = factor * own.pivot_table(index="head", columns="block", values=column)
            words = own.pivot_table(index="head", columns="block", values="pattern", aggfunc="first")
            figure.add_heatmap(
                x=values.columns,
                y=values.index,
                z=values.to_numpy(),
                zmin=0,
                zmax=top,
                colorscale=scale,
                showscale=place == len(experts),
                colorbar={
                    "len": 0.42,
                    "y": 0.8 if line == 1 else 0.22,
                    "thickness": 12,
                    "title": {"text": "%"},
                },
                customdata=words.to_numpy(),
                text=[[_cell(value) for value in row] for row in values.to_numpy()],
                texttemplate="%{text}" if max(blocks, heads) <= CELLS else "",
                xgap=1,
                ygap=1,
                hovertemplate=f"block %{{x}}, head %{{y}}: %{{z:.3g}} %, %{{customdata}}<extra>{title}</extra>",
                row=line,
                col=place,
            )
    figure.update_xaxes(title_text="block", row=2, showgrid=False, dtick=1 if blocks <= 16 else 5)
    figure.update_yaxes(showgrid=False, dtick=1 if heads <= 12 else 5)
    figure.update_yaxes(title_text="head", col=1)
    figure.update_annotations(font={"size": 13})
    height = 2 * max(130, 15 * int(heads)) + 150
    return figure.update_layout(template=theme(), height=height, margin={"t": 40})


def _cell(percent: float) -> str:
    """A percentage in a cell; the rounding of sums is none."""
    return f"{percent:.0f}" if percent >= 10 else f"{percent:.2g}" if percent >= LEAST else "0"


LEAST = 1e-3
"""Percent of error from which it is not the rounding of float32."""
