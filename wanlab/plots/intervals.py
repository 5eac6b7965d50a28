"""Figures with their intervals, one row each, on one axis: the main figure of a report that compares things."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from wanlab.core.stats import ends_text
from wanlab.core.words import shown
from wanlab.plots.style import GREY, colour, needs, theme

ROW_PX = 46
MOST_ROWS = 7
"""Rows that stand on the first screen of a laptop below a headline and tiles."""


def interval_rows(
    frame: pd.DataFrame,
    *,
    name: str = "name",
    value: str = "value",
    low: str = "low",
    high: str = "high",
    tint: str | None = None,
    note: str | None = None,
    axis: str = "",
    form: str = ".2f",
    unit: str = "",
    reference: float | None = None,
    reference_text: str = "",
    limit: float | None = None,
    log: bool = False,
    most: int = MOST_ROWS,
) -> go.Figure:
    """A dot with its 95 % interval per row; figures and names stand above the dots, so that a phone has room for them.

    Args:
        frame: a row per thing that is compared, in the order of the figure; one without a value is left out.
        name, value, low, high: columns. An interval that is unknown (NaN) has no line, and the text says so; `low` may be
            missing, where no figure of the frame has an interval.
        tint: column that a row's colour is of; its name if None.
        note: column of words that stand after the name in place of the interval.
        axis: title of the axis. form, unit: format and unit of the figures; without a format three significant digits.
        reference: where a vertical line stands, such as 1 for "as fast as the baseline"; `reference_text` is its name.
        limit: where a dashed line named "limit" stands.
        log: a logarithmic axis.
        most: rows that are drawn, the first.
    """
    needs(frame, "interval_rows", name, value)
    rows = frame[frame[value].notna()].head(most).to_dict("records")
    figure = go.Figure()
    for place, row in enumerate(rows):
        at, ends = float(row[value]), _ends(row, low, high)
        known, shade = all(map(math.isfinite, ends)), colour(str(row[tint or name]))
        figure.add_scatter(
            x=[at],
            y=[place],
            mode="markers",
            marker={"size": 11, "color": shade},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [max(ends[1] - at, 0.0) if known else 0.0],
                "arrayminus": [max(at - ends[0], 0.0) if known else 0.0],
                "thickness": 2.5,
                "width": 6,
                "color": shade,
            },
            hovertemplate=f"%{{x:{form or ',.4g'}}}<extra>{_escaped(row[name])}</extra>",
        )
        between = "" if note or low not in frame else f" ({_between(ends, form)})"
        words = f" · {row[note]}" if note and row[note] else ""
        text = f"{at:{form}} {unit}".rstrip() if form else shown(at, unit)
        figure.add_annotation(
            x=0,
            xref="x domain",
            y=place,
            xanchor="left",
            yshift=17,
            showarrow=False,
            text=f"<b>{_escaped(text)}</b>{_escaped(between)} {_escaped(row[name])}{_escaped(words)}",
            font={"size": 12},
        )
    for line, words, dash in ((reference, reference_text, "solid"), (limit, "limit", "dash")):
        if line is not None:
            figure.add_vline(x=line, line={"color": GREY, "dash": dash, "width": 1.2}, layer="below")
            at = math.log10(line) if log else line
            figure.add_annotation(x=at, y=1, yref="paper", yanchor="bottom", text=words, showarrow=False)
    figure.update_layout(
        template=theme(),
        height=90 + ROW_PX * max(len(rows), 1),
        showlegend=False,
        margin={"t": 30, "l": 10, "r": 20},
    )
    figure.update_xaxes(title_text=axis, type="log" if log else "linear", zeroline=False)
    if log:
        seen = [end for row in rows for end in (row[value], *_ends(row, low, high)) if end > 0]
        seen += [line for line in (reference, limit) if line is not None]
        figure.update_xaxes(**_ticks(min(seen, default=1.0), max(seen, default=1.0)))
    figure.update_yaxes(
        range=[len(rows) - 0.6, -0.75], showticklabels=False, showgrid=False, zeroline=False, automargin=False
    )
    return figure


def _between(ends: tuple[float, float], form: str) -> str:
    """An interval behind its figure."""
    if not all(map(math.isfinite, ends)):
        return "interval unknown"
    return ends_text(*ends, form) if form else f"{shown(ends[0])} to {shown(ends[1])}"


def _ticks(low: float, high: float) -> dict[str, Any]:
    """Ticks of a logarithmic axis: a decade each, or 1, 2 and 5 of each decade on a short axis."""
    if high > 100 * low:
        return {"dtick": 1, "exponentformat": "none"}
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    at = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    return {"tickvals": at, "ticktext": [f"{value:,.10g}" for value in at]}


def _ends(row: dict[str, Any], low: str, high: str) -> tuple[float, float]:
    """The interval of a row; NaN where it has none."""
    first, second = (float(end) if (end := row.get(key)) is not None else math.nan for key in (low, high))
    return first, second


def _escaped(text: Any) -> str:
    """Text for plotly, whose labels read some HTML."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;")
