"""Figures of runs: efficient configurations, speed-up of each technique, parameters as parallel lines, failures."""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from wanlab.core.errors import WanlabError
from wanlab.plots.style import GREY, LINE, OTHERS, ROW_PX, colour, label, limit_line, needs, theme

STATE_COLOURS = {
    "finished": "#5b8c5a",
    "running": "#3d85c6",
    "pending": "#c3c9d0",
    "failed": "#d9534f",
    "died": "#a94442",
    "timeout": "#e8a33d",
    "memory": "#8b7ec8",
    "flooded": "#b0679b",
    "aborted": "#8a93a0",
    "unreadable": "#6b5b4f",
}
STATE_WORDS = {
    "timeout": "timed out",
    "memory": "out of memory",
    "died": "kernel died",
    "pending": "not started",
}
NAMED = 12  # efficient points that are named in the picture
CHOSEN = "#3d85c6"


def failure_bars(failures: pd.DataFrame, finished: int = 0) -> go.Figure:
    """How the runs of a sweep ended, as one bar.

    Args:
        failures: one row per run that did not finish, with its state.
        finished: number of runs that finished.
    """
    needs(failures, "failure_bars", "state")
    counts = {"finished": finished} | failures["state"].value_counts(sort=False).to_dict()
    figure = go.Figure()
    order = [
        *(name for name in STATE_COLOURS if name in counts),
        *(n for n in counts if n not in STATE_COLOURS),
    ]
    for state in order:
        if not counts[state]:
            continue
        figure.add_bar(
            x=[int(counts[state])],
            y=["runs"],
            orientation="h",
            name=plain(STATE_WORDS.get(state, state)),
            text=[str(counts[state])],
            textposition="inside",
            insidetextanchor="middle",
            marker={"color": STATE_COLOURS.get(state, OTHERS[-1])},
            hovertemplate="%{x} %{fullData.name}<extra></extra>",
        )
    figure.update_layout(template=theme(), barmode="stack", height=130, showlegend=True)
    figure.update_xaxes(showgrid=False, showticklabels=False, zeroline=False)
    figure.update_yaxes(showticklabels=False)
    return figure


def run_frontier(
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    baseline: str | None = None,
    size: str | None = None,
    tint: str = "engine",
    limit: float | None = None,
    ends: Mapping[str, tuple[str, str]] | None = None,
) -> go.Figure:
    """Configurations by two figures with their intervals; a line joins the efficient ones, the best are named beside it.

    Args:
        frame: one row per configuration: configuration, the two figures, and efficient, from `runs.pareto`.
        x, y: columns of the two figures.
        size: column for the area of the marks.
        baseline: configuration that is marked.
        tint: column for the colour, where the frame has it.
        limit: largest allowed value of y, drawn as a line.
        ends: figure -> columns of the ends of its interval, which is drawn where it is known.
    """
    needs(frame, "run_frontier", "configuration", x, y)
    known = frame[frame[x].notna() & frame[y].notna()]
    figure = go.Figure()
    groups = known.groupby(known[tint].map(str), sort=False) if tint in known else [("configurations", known)]
    areas = _sizes(known[size]) if size in known else dict.fromkeys(known.index, 9.0)
    for name, rows in groups:
        figure.add_scatter(
            x=rows[x].tolist(),
            y=rows[y].tolist(),
            mode="markers",
            name=plain(name),
            text=[plain(each) for each in rows["configuration"]],
            customdata=rows[[size]].to_numpy().tolist() if size in known else None,
            marker={"color": colour(name), "size": [areas[i] for i in rows.index], "opacity": 0.75},
            error_x=_error_bars(rows, x, (ends or {}).get(x)),
            error_y=_error_bars(rows, y, (ends or {}).get(y)),
            hovertemplate=_hover(x, y, size if size in known else None),
        )
    if "efficient" in known:
        _efficient(figure, known[known["efficient"].astype(bool)].sort_values([x, y]), x, y)
    start = known[known["configuration"] == baseline]
    if len(start):
        figure.add_scatter(
            x=start[x].tolist(),
            y=start[y].tolist(),
            mode="markers",
            name=f"baseline: {short(str(baseline))}",
            text=[plain(baseline)],
            marker={"symbol": "star", "size": 15, "color": GREY},
            hovertemplate=_hover(x, y, None),
        )
    if limit is not None:
        limit_line(figure, limit, "limit")
    figure.update_layout(
        template=theme(),
        height=370,
        margin={"r": 10, "t": 40},
        legend={"font": {"size": 12}},
    )
    figure.update_xaxes(title_text=label(x))
    figure.update_yaxes(title_text=label(y))
    return figure


def _error_bars(rows: pd.DataFrame, name: str, ends: tuple[str, str] | None) -> dict[str, Any] | None:
    """Intervals as plotly draws them; 0 where one is unknown, None without any."""
    if ends is None or not set(ends) <= set(rows):
        return None
    low, high = (rows[end].astype(float) for end in ends)
    return {
        "type": "data",
        "symmetric": False,
        "array": (high - rows[name]).clip(lower=0).fillna(0.0).tolist(),
        "arrayminus": (rows[name] - low).clip(lower=0).fillna(0.0).tolist(),
        "thickness": 1.2,
        "width": 3,
        "color": LINE,
    }


def _efficient(figure: go.Figure, best: pd.DataFrame, x: str, y: str) -> None:
    """A line through the efficient configurations, each with its name."""
    figure.add_scatter(
        x=best[x].tolist(),
        y=best[y].tolist(),
        mode="lines",
        name="none is better in both",
        line={"color": CHOSEN, "width": 1.6, "dash": "dot"},
        hoverinfo="skip",
    )
    if len(best) > NAMED:
        return
    names = _distinct(best["configuration"])
    for place, (at, up, name) in enumerate(zip(best[x], best[y], names, strict=True)):
        figure.add_annotation(
            x=at, y=up, text=f"<b>{name}</b>", xanchor="left", ax=26, ay=(-16, -62, -40, 34)[place % 4],
            arrowwidth=1, arrowhead=0, arrowcolor=CHOSEN, font={"size": 12, "color": CHOSEN},
        )  # fmt: skip


def _distinct(names: Iterable[str]) -> list[str]:
    """Short names without the words that all of them have: no "onnxruntime, " where every name begins with it."""
    words = [short(name).split(", ") for name in names]
    shared = set.intersection(*map(set, words)) if len(words) > 1 else set()
    return [", ".join(word for word in each if word not in shared) or ", ".join(each) for each in words]


def plain(text: Any) -> str:
    """Text escaped for plotly, whose labels read some HTML."""
    return html.escape(str(text), quote=False)


def short(configuration: str) -> str:
    """`"engine=eager, plan=plans/mine.yaml, steps=4"` as `"eager, mine, steps=4"`: no names before words, no folders."""
    words = re.sub(r"(^|, )\w+=(?=[A-Za-z])(?!None|True|False)", r"\1", configuration)
    return plain(re.sub(r"[^\s,=]*/([^\s,/]+)\.ya?ml", r"\1", words))


def _sizes(values: pd.Series) -> dict[Any, float]:
    """Diameters of marks, 8 to 24 px, with an area proportional to the value; 8 px where it is not known."""
    low, high = values.min(), values.max()
    spread = high - low
    return {
        index: 8 + 16 * ((value - low) / spread) ** 0.5 if spread > 0 and value == value else 8.0
        for index, value in values.items()
    }


def _hover(x: str, y: str, size: str | None) -> str:
    more = f"<br>{label(size)} %{{customdata[0]:.4g}}" if size else ""
    return f"%{{text}}<br>{label(x)} %{{x:,.4g}}<br>{label(y)} %{{y:.4g}}{more}<extra></extra>"


def technique_bars(matrix: pd.DataFrame) -> go.Figure:
    """Speed-up of each technique and combination with its interval, and the product of the techniques alone where known.

    Args:
        matrix: from `runs.technique_matrix`.
    """
    needs(matrix, "technique_bars", "techniques", "moved", "speedup", "low", "high", "product")
    names = [short(name.replace(" + ", ", ")).replace(", ", " + ") for name in matrix["techniques"]]
    figure = go.Figure()
    figure.add_bar(
        x=matrix["speedup"].tolist(),
        y=names,
        orientation="h",
        name="measured",
        marker={"color": [colour(name.split(" + ")[0]) for name in names]},
        error_x=_interval(matrix, "speedup", "low", "high"),
        text=[f"{value:.2f}x" for value in matrix["speedup"]],
        textposition="inside",
        insidetextanchor="start",
        textfont={"color": "white"},
        hovertemplate="%{y}<br>%{x:.2f}x<extra>measured</extra>",
    )
    combined = matrix[matrix["product"].notna()]
    if len(combined):
        figure.add_scatter(
            x=combined["product"].tolist(),
            y=[names[matrix.index.get_loc(index)] for index in combined.index],
            mode="markers",
            name="product of each alone",
            marker={
                "symbol": "diamond",
                "size": 12,
                "color": "#d9534f",
                "line": {"width": 1, "color": "white"},
            },
            text=[plain(each) for each in combined["verdict"]],
            hovertemplate="%{y}<br>%{x:.2f}x<br>%{text}<extra>product</extra>",
        )
    ends = [*matrix["high"], *combined["product"]]
    top = max((end for end in ends if end == end and end != float("inf")), default=1.0)
    figure.add_vline(x=1, line={"color": GREY, "width": 1.2, "dash": "dash"})
    figure.update_layout(template=theme(), height=110 + ROW_PX * max(len(names), 1))
    figure.update_xaxes(title_text="times as fast as the baseline", range=[0, 1.15 * top])
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return figure


def _interval(rows: pd.DataFrame, value: str, low: str, high: str) -> dict:
    up, down = (
        [length if math.isfinite(length) else None for length in lengths]  # no bar where it is unknown
        for lengths in (rows[high] - rows[value], rows[value] - rows[low])
    )
    return {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "color": GREY,
        "thickness": 1.4,
        "width": 4,
    }


BEHIND = "rgba(255,255,255,0.8)"  # pages draw it in their own colour
NAMED_PARALLEL = 14  # most values of an axis of words that are written


def parallel_lines(
    frame: pd.DataFrame,
    columns: Mapping[str, str | None],
    *,
    highlighted: Collection[str] = (),
    baseline: str | None = None,
    tint: str = "engine",
) -> go.Figure:
    """One line per configuration and one axis per column; the better end of every axis is at the top.

    Args:
        frame: one row per configuration: configuration and the columns.
        columns: column -> `"min"` or `"max"`, whichever is better; None for an axis of words, such as a parameter.
        highlighted: configurations drawn with thick lines, e.g. the efficient ones.
        baseline: configuration drawn with a dashed line.
        tint: column for the colour of the other lines, where the frame has it.

    Raises:
        WanlabError: missing columns, or fewer than two.
    """
    needs(frame, "parallel_lines", "configuration", *columns)
    if len(columns) < 2:
        raise WanlabError("parallel_lines needs at least two columns")
    figure = go.Figure()
    heights = {
        name: _axis(figure, place, frame[name], name, sense)
        for place, (name, sense) in enumerate(columns.items())
    }
    shown = {name: [_value_text(value) for value in frame[name]] for name in columns}
    strong = set(highlighted)
    groups: dict[tuple[str, str, float, str, float], list[int]] = {}
    for row, name in enumerate(frame["configuration"]):
        if name == baseline:
            key: tuple[str, str, float, str, float] = ("baseline", GREY, 2.2, "dash", 1.0)
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
        meta={"least_px": 130 * len(columns)},
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
    """Draw one axis with its title and ends; returns the height of each value, 0 to 1, None where there is no value."""
    figure.add_shape(
        type="line", x0=place, x1=place, y0=0, y1=1, line={"color": LINE, "width": 1.5}, layer="below"
    )
    side = {"xanchor": "right", "xshift": -6} if place == 0 else {"xanchor": "left", "xshift": 6}
    write = {"x": place, "showarrow": False, "font": {"size": 11}, **side}
    if sense is None:
        words = list(dict.fromkeys(map(str, values)))
        steps = {word: 1 - (i + 0.5) / len(words) for i, word in enumerate(words)}
        heights: list[float | None] = [steps[str(value)] for value in values]
        if len(words) <= NAMED_PARALLEL:
            for word, height in steps.items():
                figure.add_annotation(y=height, text=short(_cut(word)), **write, bgcolor=BEHIND, borderpad=0)
        ends = ("", "" if len(words) <= NAMED_PARALLEL else f"{len(words)} values")
    else:
        numbers = [float(value) if _finite(value) else None for value in values]
        known = [value for value in numbers if value is not None]
        low, high = (min(known), max(known)) if known else (0.0, 0.0)
        span = high - low
        heights = [None if v is None else 0.5 if not span else (v - low) / span for v in numbers]
        if sense == "min":
            heights = [None if height is None else 1 - height for height in heights]
        ends = (
            (_value_text(low), _value_text(high)) if sense == "min" else (_value_text(high), _value_text(low))
        )
        ends = ends if span else (_value_text(low) if known else "", "")
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


def _value_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return plain(_cut(str(value)))


def _wrapped(words: str, width: int = 13) -> str:
    """A title in lines that fit between two axes."""
    return "<br>".join(plain(line) for line in textwrap.wrap(words, width, break_long_words=False))


def _cut(text: str, limit: int = 28) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
