"""Figures of one component by several candidates: time with its bounds, time by kind of kernel, memory."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from wanlab.core.errors import WanlabError
from wanlab.plots.style import GREY, ROW_PX, colour, label, needs, theme

KIND_COLOURS = {
    "linear": "#3d85c6",
    "attention": "#e07b39",
    "pointwise": "#3fa796",
    "transfer": "#b0679b",
    "allocation": "#8b7ec8",
    "other": GREY,
}
KIND_NAMES = {
    "linear": "matrix products",
    "attention": "attention",
    "pointwise": "elementwise, norms, copies",
    "transfer": "transfers",
    "allocation": "allocation",
    "other": "other",
}


def component_bars(df: pd.DataFrame) -> go.Figure:
    """Median time of a call by each candidate, with the ratio to the baseline, the roofline and Amdahl's bound as marks.

    Args:
        df: columns candidate, time_ms, speedup, verdict and, where known, roofline_ms and bound_speedup; as
            `ComponentCost.table`, the baseline first.
    """
    needs(df, "component_bars", "candidate", "time_ms", "speedup", "verdict")
    rows = df.to_dict("records")
    names, first = [row["candidate"] for row in rows], rows[0]["time_ms"]
    figure = go.Figure(
        go.Bar(
            x=df["time_ms"].tolist(),
            y=names,
            orientation="h",
            marker={"color": [colour(name) for name in names]},
            text=[_text(row) for row in rows],
            textposition="outside",
            cliponaxis=False,
            showlegend=False,
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
    )
    marks = {"roofline": ("roofline_ms", "line-ns-open", lambda value: value)}
    marks["Amdahl's bound of the plan"] = ("bound_speedup", "diamond-open", lambda value: first / value)
    for name, (column, symbol, time_of) in marks.items():
        known = df[df[column].notna()] if column in df else df.head(0)
        if len(known):
            figure.add_scatter(
                x=[time_of(value) for value in known[column]],
                y=known["candidate"].tolist(),
                mode="markers",
                name=name,
                marker={"symbol": symbol, "size": 15, "color": "#d9534f", "line": {"width": 2}},
                hovertemplate="%{x:,.3g} ms<extra>%{fullData.name}</extra>",
            )
    figure.update_layout(template=theme(), height=110 + ROW_PX * len(rows), margin={"t": 40})
    figure.update_xaxes(title_text="time of a call (ms), median", range=[0, 1.5 * float(df["time_ms"].max())])
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _text(row: dict) -> str:
    shown = f"{row['time_ms']:,.4g} ms"
    if row["verdict"] == "baseline" or row["speedup"] != row["speedup"]:
        return f"{shown} · {row['verdict']}"
    return f"{shown} · {row['speedup']:.2f}x, {row['verdict']}"


def kernel_kind_bars(df: pd.DataFrame) -> go.Figure:
    """Time in kernels by kind, one stacked bar per candidate.

    Args:
        df: columns candidate, kind, time_ms; as `ComponentCost.kinds`.

    Raises:
        WanlabError: no candidate tells its kernels.
    """
    needs(df, "kernel_kind_bars", "candidate", "kind", "time_ms")
    if not len(df):
        raise WanlabError("none of these candidates tells its kernels, so there is nothing to draw")
    names = list(dict.fromkeys(df["candidate"]))
    figure = go.Figure()
    for kind, tint in KIND_COLOURS.items():
        own = df[df["kind"] == kind].set_index("candidate")["time_ms"]
        if len(own):
            figure.add_bar(
                x=[float(own.get(name, 0.0)) for name in names],
                y=names,
                orientation="h",
                name=KIND_NAMES[kind],
                marker={"color": tint},
                hovertemplate="%{y}, %{fullData.name}: %{x:,.3f} ms<extra></extra>",
            )
    figure.update_layout(
        template=theme(), barmode="stack", height=120 + ROW_PX * len(names), margin={"t": 40}
    )
    figure.update_xaxes(title_text="time in kernels under the profiler (ms)")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def component_memory_bars(df: pd.DataFrame) -> go.Figure:
    """Memory of each candidate: its weights, and what else there is at the peak of a call.

    Args:
        df: columns candidate, weights_gib, peak_memory_gib (None where it is not known); as `ComponentCost.table`.
    """
    needs(df, "component_memory_bars", "candidate", "weights_gib", "peak_memory_gib")
    names = df["candidate"].tolist()
    weights = df["weights_gib"].astype(float)
    peak = df["peak_memory_gib"].astype(float)
    parts = {"weights": weights, "more at the peak of a call": (peak - weights).clip(lower=0).fillna(0)}
    figure = go.Figure()
    for (name, values), tint in zip(parts.items(), ("#3d85c6", "#e8a33d"), strict=True):
        figure.add_bar(
            x=values.tolist(),
            y=names,
            orientation="h",
            name=name,
            marker={"color": tint},
            hovertemplate="%{y}, %{fullData.name}: %{x:,.3f} GiB<extra></extra>",
        )
    tops = peak.where(peak > weights, weights)
    for name, top, known in zip(names, tops, peak, strict=True):
        text = f"{top:,.3g} GiB" if known == known else f"{top:,.3g} GiB of weights; peak not known"
        figure.add_annotation(x=top, y=name, text=text, xanchor="left", xshift=4, showarrow=False)
    figure.update_layout(
        template=theme(), barmode="stack", height=110 + ROW_PX * len(names), margin={"t": 40}
    )
    figure.update_xaxes(title_text=label("memory_gib"), range=[0, 1.45 * float(tops.max()) or 1.0])
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure
