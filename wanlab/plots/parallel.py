"""Parallel coordinates with plain lines: plotly's own need WebGL and `eval`, which a closed page does not allow."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.plots.runs import CHOSEN, plain, short
from wanlab.plots.style import GREY, LINE, colour, label, needs, theme

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

NAMED = 14  # values of one axis of words that are written out


def parallel_lines(
    frame: pd.DataFrame,
    columns: Mapping[str, str | None],
    *,
    highlighted: Collection[str] = (),
    baseline: str | None = None,
    tint: str = "engine",
) -> go.Figure:
    """One line per configuration over one axis per column; the better end of every axis is at the top.

    Args:
        frame: a row per configuration: configuration and the columns.
        columns: column -> `"min"` or `"max"`, whichever is better; None for an axis of words, such as a parameter.
        highlighted: configurations that are drawn strongly, e.g. the efficient ones.
        baseline: one that is drawn dashed.
        tint: column that gives the colour of the others, where there is one.

    Raises:
        WanlabError: missing columns, or fewer than two.
    """
    import plotly.graph_objects as go

    needs(frame, "parallel_lines", "configuration", *columns)
    if len(columns) < 2:
        raise WanlabError("parallel_lines needs at least two columns")
    figure = go.Figure()
    heights = {
        name: _axis(figure, place, frame[name], name, sense)
        for place, (name, sense) in enumerate(columns.items())
    }
    shown = {name: [_said(value) for value in frame[name]] for name in columns}
    strong, groups = set(highlighted), {}
    for row, name in enumerate(frame["configuration"]):
        if name == baseline:
            key = ("baseline", GREY, 2.2, "dash", 1.0)
        elif name in strong:
            key = ("efficient", CHOSEN, 2.6, "solid", 1.0)
        else:
            group = str(frame[tint].iloc[row]) if tint in frame else "others"
            key = (plain(group), colour(group), 1.0, "solid", 0.45)
        groups.setdefault(key, []).append(row)
    labels = [plain(name) for name in frame["configuration"]]
    for (name, line, width, dash, opacity), rows in sorted(groups.items(), key=lambda item: item[0][2]):
        xs, ys, texts = [], [], []
        for row in rows:  # all lines of a kind are one trace, with a gap after each
            xs += [*range(len(columns)), None]
            ys += [*(heights[column][row] for column in columns), None]
            texts += [*(f"{labels[row]}<br>{label(column)} {shown[column][row]}" for column in columns), ""]
        figure.add_scatter(
            x=xs,
            y=ys,
            text=texts,
            mode="lines+markers" if len(frame) <= 60 else "lines",
            name=name,
            line={"color": line, "width": width, "dash": dash},
            marker={"size": 5},
            opacity=opacity,
            connectgaps=False,
            hovertemplate="%{text}<extra></extra>",
        )
    figure.update_layout(
        template=theme(),
        height=500,
        margin={"t": 104, "b": 60, "l": 90, "r": 60},
        legend={"y": -0.12, "yanchor": "top"},
    )
    figure.update_xaxes(
        tickvals=[],
        showline=False,
        showgrid=False,
        zeroline=False,
        range=[-0.1, len(columns) - 0.7],
        fixedrange=True,
    )
    figure.update_yaxes(
        showticklabels=False,
        showline=False,
        showgrid=False,
        zeroline=False,
        range=[-0.06, 1.06],
        fixedrange=True,
    )
    return figure


def _axis(figure: go.Figure, place: int, values: Any, name: str, sense: str | None) -> list[float | None]:
    """Draw one axis with its title and ends; the height of each value, 0 to 1, None where there is none."""
    figure.add_shape(
        type="line", x0=place, x1=place, y0=0, y1=1, line={"color": LINE, "width": 1.5}, layer="below"
    )
    side = {"xanchor": "right", "xshift": -6} if place == 0 else {"xanchor": "left", "xshift": 6}
    write = {"x": place, "showarrow": False, "font": {"size": 11}, **side}
    if sense is None:
        words = list(dict.fromkeys(map(str, values)))
        steps = {word: 1 - (i + 0.5) / len(words) for i, word in enumerate(words)}
        heights: list[float | None] = [steps[str(value)] for value in values]
        if len(words) <= NAMED:
            for word, height in steps.items():
                figure.add_annotation(y=height, text=short(_cut(word)), **write)
        ends = ("", "" if len(words) <= NAMED else f"{len(words)} values")
    else:
        numbers = [float(value) if _finite(value) else None for value in values]
        known = [value for value in numbers if value is not None]
        low, high = (min(known), max(known)) if known else (0.0, 0.0)
        span = high - low
        heights = [None if v is None else 0.5 if not span else (v - low) / span for v in numbers]
        if sense == "min":
            heights = [None if height is None else 1 - height for height in heights]
        ends = (_said(low), _said(high)) if sense == "min" else (_said(high), _said(low))
        ends = ends if span else (_said(low) if known else "", "")
    figure.add_annotation(
        x=place,
        y=1,
        yshift=24,
        yanchor="bottom",
        text=f"<b>{_wrapped(label(name))}</b>",
        showarrow=False,
        font={"size": 12},
    )
    figure.add_annotation(
        x=place, y=1, yanchor="bottom", yshift=6, text=ends[0], showarrow=False, font={"size": 11}
    )
    figure.add_annotation(
        x=place, y=0, yanchor="top", yshift=-6, text=ends[1], showarrow=False, font={"size": 11}
    )
    return heights


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return plain(_cut(str(value)))


def _wrapped(words: str, width: int = 13) -> str:
    """A title in lines that fit between two axes."""
    return "<br>".join(plain(line) for line in textwrap.wrap(words, width, break_long_words=False))


def _cut(text: str, limit: int = 28) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
