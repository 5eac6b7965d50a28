"""Figures of a load test: throughput and waits by load, and where the time of a request goes."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from wanlab.plots.style import OTHERS, ROW_PX, colour, limit_line, needs, theme

WAY_COLOURS = {"one at a time": OTHERS[0], "in batches": OTHERS[1]}
PARTS = {
    "queue_wait_ms": ("waits for its turn", "#c3c9d0"),
    "encode_ms": ("picture and text", colour("vae_encoder")),
    "denoise_ms": ("denoising", colour("expert_high")),
    "decode_ms": ("decoding", colour("vae_decoder")),
}


def throughput_lines(frame: pd.DataFrame, most: float | None = None) -> go.Figure:
    """Videos per minute by the number of callers that wait, a line for each way of serving.

    Args:
        frame: `LoadTest.frame`.
        most: videos per minute that the model itself makes in batches.
    """
    needs(frame, "throughput_lines", "way", "callers", "videos_per_min")
    rows = frame[frame["callers"].notna()]
    figure = go.Figure()
    for way, own in rows.groupby("way", sort=False):
        figure.add_scatter(
            x=own["callers"],
            y=own["videos_per_min"],
            mode="lines+markers",
            name=str(way),
            line={"color": WAY_COLOURS.get(str(way), colour(str(way))), "width": 3},
            marker={"size": 9},
            hovertemplate="%{x} callers: %{y:.3g} videos a minute<extra>%{fullData.name}</extra>",
        )
    if most is not None:
        limit_line(figure, most, "the model itself in batches, without a service")
    figure.update_xaxes(title_text="callers at a time", tickvals=sorted(set(rows["callers"])))
    figure.update_yaxes(title_text="videos a minute", rangemode="tozero")
    return figure.update_layout(template=theme(), height=360, margin={"t": 40})


def wait_rows(frame: pd.DataFrame) -> go.Figure:
    """What callers wait, by load and way: a dot at the median, a line from there to the longest, a tick at 90 %.

    Args:
        frame: `LoadTest.frame`.
    """
    needs(frame, "wait_rows", "load", "way", "latency_p50_s", "latency_p90_s", "latency_max_s")
    figure = go.Figure()
    names = [f"{row.load}, {row.way}" for row in frame.itertuples()]
    for row, name in zip(frame.itertuples(), names, strict=True):
        tint = WAY_COLOURS.get(row.way, colour(row.way))
        figure.add_scatter(
            x=[row.latency_p50_s, row.latency_max_s],
            y=[name, name],
            mode="lines",
            line={"color": tint, "width": 2},
            showlegend=False,
            hoverinfo="skip",
        )
    for way, own in frame.assign(name=names).groupby("way", sort=False):
        tint = WAY_COLOURS.get(str(way), colour(str(way)))
        for column, symbol, words in (
            ("latency_p50_s", "circle", "half wait at most"),
            ("latency_p90_s", "line-ns-open", "90 % wait at most"),
            ("latency_max_s", "line-ns-open", "the longest"),
        ):
            figure.add_scatter(
                x=own[column],
                y=own["name"],
                mode="markers",
                name=str(way),
                showlegend=column == "latency_p50_s",
                legendgroup=str(way),
                marker={"size": 11, "color": tint, "symbol": symbol, "line": {"width": 2, "color": tint}},
                hovertemplate=f"{words} %{{x:.3g}} s<extra>%{{y}}</extra>",
            )
    figure.update_xaxes(title_text="wait of a caller (s): median, 90 %, longest", rangemode="tozero")
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], type="category")
    return figure.update_layout(template=theme(), height=110 + ROW_PX * len(names), margin={"t": 40})


def request_parts(frame: pd.DataFrame) -> go.Figure:
    """Where the time of a request goes, by load and way, from the medians of its parts.

    Args:
        frame: `LoadTest.frame`.
    """
    needs(frame, "request_parts", "load", "way", "queue_wait_p50_s", "encode_ms", "denoise_ms", "decode_ms")
    names = [f"{row.load}, {row.way}" for row in frame.itertuples()]
    figure = go.Figure()
    for column, (words, tint) in PARTS.items():
        values = 1e3 * frame["queue_wait_p50_s"] if column == "queue_wait_ms" else frame[column]
        figure.add_bar(
            x=values / 1e3,
            y=names,
            orientation="h",
            name=words,
            marker={"color": tint},
            hovertemplate=f"{words} %{{x:.3g}} s<extra>%{{y}}</extra>",
        )
    figure.update_xaxes(title_text="time of a request (s), medians of the parts")
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], type="category")
    return figure.update_layout(
        template=theme(), barmode="stack", height=110 + ROW_PX * len(names), margin={"t": 40}
    )
