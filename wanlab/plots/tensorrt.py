"""Engines that were built: what they cost and what they weigh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanlab.plots.style import GREY, NAMES, ROW_PX, colour, needs, theme

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def build_bars(df: pd.DataFrame) -> go.Figure:
    """Two panels over the same rows: time of each build, and size of each engine with a mark for its ONNX graph.

    Args:
        df: columns component, numbers, build_ms, size_mib, onnx_mib; as `convert.EngineBuilds.frame` gives.
    """
    from plotly.subplots import make_subplots

    needs(df, "build_bars", "component", "numbers", "build_ms", "size_mib", "onnx_mib")
    rows = df.to_dict(orient="records")
    places = [f"{NAMES.get(row['component'], row['component'])}, {row['numbers']}" for row in rows]
    colours = [colour(format_of(row["numbers"])) for row in rows]
    figure = make_subplots(
        rows=1,
        cols=2,
        shared_yaxes=True,
        horizontal_spacing=0.06,
        subplot_titles=["build time (s)", "size (MiB)"],
    )
    seconds = [row["build_ms"] / 1e3 for row in rows]
    sizes = [row["size_mib"] for row in rows]
    onnx = [row["onnx_mib"] for row in rows]
    for column, values in ((1, seconds), (2, sizes)):
        figure.add_bar(
            x=values,
            y=places,
            orientation="h",
            marker={"color": colours},
            text=[f"{value:,.3g}" for value in values],
            textposition="outside",
            cliponaxis=False,
            showlegend=False,
            hovertemplate="%{y}<br>%{text}<extra></extra>",
            row=1,
            col=column,
        )
    figure.add_scatter(
        x=onnx,
        y=places,
        mode="markers",
        name="its ONNX graph",
        marker={"symbol": "diamond", "size": 11, "color": GREY, "line": {"width": 1.5, "color": "white"}},
        hovertemplate="ONNX graph %{x:,.3g} MiB<extra></extra>",
        row=1,
        col=2,
    )
    figure.update_layout(
        template=theme(),
        height=120 + ROW_PX * max(len(rows), 1),
        margin={"t": 40, "r": 30},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": -0.12, "yanchor": "top"},
    )
    # Room for the numbers behind the longest bars.
    figure.update_xaxes(range=[0, max(seconds, default=1.0) * 1.25], row=1, col=1)
    figure.update_xaxes(range=[0, max(sizes + onnx, default=1.0) * 1.25], row=1, col=2)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def format_of(numbers: str) -> str:
    """The format that names a row's colour: the quantised one where there is one, else the graph's dtype."""
    last = numbers.split(", ")[-1].split(" x ")[-1]
    return SHORT.get(last, last.removesuffix("-channel").removesuffix("-weight"))
