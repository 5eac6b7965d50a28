"""Figures of a search within a quality budget: time against quality loss of every stack, and the one that held."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from wanlab.core.words import shown
from wanlab.plots.style import GREY, LINE, limit_line, needs, theme

FATES = {
    "within": ("holds the limit", "#3d85c6", "circle"),
    "undecided": ("not known to hold it", "#e8a33d", "circle"),
    "beyond": ("loses too much", "#d9534f", "circle"),
    "idle": ("did nothing", "#8a93a0", "x"),
}
"""What a mark says of a stack on the clips of the choice -> its words, colour and symbol."""
CHOSEN = "#3d85c6"
COLUMNS = ("stack", "speedup", "low", "high", "quality_loss_percent", "loss_low", "loss_high")


def budget_frontier(stacks: pd.DataFrame, verified: pd.DataFrame, limit_percent: float) -> go.Figure:
    """Times as fast against quality loss, a mark with its intervals per stack, and a line through those that none beats in
    both; stars are the verified ones, on clips that nothing was chosen by. One that lost too much there was not timed again,
    and stands at the time of the search.

    Args:
        stacks: `Search.frame`. verified: `Budget.verified_frame`, which may be empty.
        limit_percent: limit of the quality loss.
    """
    needs(stacks, "budget_frontier", *COLUMNS, "did_what_it_says", "within_limit", "efficient")
    known = stacks[stacks["speedup"].notna() & stacks["quality_loss_percent"].notna()]
    figure = go.Figure()
    kinds = [_kind(row, limit_percent) for row in known.to_dict("records")]
    for kind, (words, tint, symbol) in FATES.items():
        rows = known[[each == kind for each in kinds]]
        if len(rows):
            _marks(figure, rows, words, {"color": tint, "symbol": symbol, "size": 9})
    figure.add_scatter(
        x=[1.0],
        y=[0.0],
        mode="markers",
        name="the original",
        marker={"symbol": "diamond", "size": 11, "color": GREY},
        hovertemplate="the original<extra></extra>",
    )
    best = known[known["efficient"].astype(bool)].sort_values("speedup")
    if len(best):
        figure.add_scatter(
            x=[*best["speedup"]],
            y=[*best["quality_loss_percent"]],
            mode="lines",
            name="none is better in both",
            line={"color": GREY, "width": 1.4, "dash": "dot"},
            hoverinfo="skip",
        )
    if len(verified):
        needs(verified, "budget_frontier", *COLUMNS, "held", "selection_speedup")
        shown_at = verified.assign(speedup=verified["speedup"].fillna(verified["selection_speedup"]))
        for holds, words, symbol in (
            (True, "verified", "star"),
            (False, "failed the verification", "star-open"),
        ):
            rows = shown_at[shown_at["held"].astype(bool) == holds]
            if len(rows):
                tint = CHOSEN if holds else FATES["beyond"][1]
                _marks(figure, rows, words, {"symbol": symbol, "size": 17, "color": tint})
        for place, row in enumerate(shown_at.to_dict("records")):
            _name(figure, row, ("top", "bottom")[place % 2])
    limit_line(figure, limit_percent, "limit", x=0.0, xanchor="left")
    figure.update_layout(
        template=theme(), height=430, margin={"t": 60, "r": 20}, legend={"font": {"size": 12}}
    )
    figure.update_xaxes(title_text="times as fast, more is better", zeroline=False)
    figure.update_yaxes(title_text="quality loss (%), less is better")
    return figure


def _kind(row: dict[str, Any], limit_percent: float) -> str:
    if not row["did_what_it_says"]:
        return "idle"
    if row["quality_loss_percent"] > limit_percent:
        return "beyond"
    high = row["loss_high"]
    return "within" if high is not None and high <= limit_percent else "undecided"


def _marks(figure: go.Figure, rows: pd.DataFrame, words: str, marker: dict[str, Any]) -> None:
    figure.add_scatter(
        x=rows["speedup"].tolist(),
        y=rows["quality_loss_percent"].tolist(),
        mode="markers",
        name=words,
        text=rows["stack"].tolist(),
        marker=marker,
        error_x=_bars(rows, "speedup", "low", "high"),
        error_y=_bars(rows, "quality_loss_percent", "loss_low", "loss_high"),
        hovertemplate="%{text}<br>%{x:.2f} times as fast<br>quality loss %{y:+.2f} %<extra>%{fullData.name}</extra>",
    )


def _bars(rows: pd.DataFrame, value: str, low: str, high: str) -> dict[str, Any]:
    """Intervals as plotly draws them; none where one is unknown."""
    ends = rows[[value, low, high]].astype(float)
    return {
        "type": "data",
        "symmetric": False,
        "array": (ends[high] - ends[value]).clip(lower=0).fillna(0.0).tolist(),
        "arrayminus": (ends[value] - ends[low]).clip(lower=0).fillna(0.0).tolist(),
        "thickness": 1.1,
        "width": 3,
        "color": LINE,
    }


def _name(figure: go.Figure, row: dict[str, Any], side: str) -> None:
    figure.add_annotation(
        x=row["speedup"],
        y=row["quality_loss_percent"],
        text=f"<b>{shown(row['speedup'])}×</b> {row['stack']}",
        showarrow=False,
        yshift=20 if side == "top" else -20,
        xanchor="right",
        font={"size": 12},
    )
