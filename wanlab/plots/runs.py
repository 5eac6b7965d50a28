"""Runs of a sweep: how they ended, and the frontier of those that finished."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wanlab.plots.style import GREY, OTHERS, colour, label, needs, theme

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

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


def failure_bars(failures: pd.DataFrame, *, finished: int = 0) -> go.Figure:
    """How the runs of a sweep ended, as one bar.

    Args:
        failures: a row per run that did not finish, with its state.
        finished: how many did.
    """
    import plotly.graph_objects as go

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
) -> go.Figure:
    """Configurations by two figures, the efficient ones joined.

    Args:
        frame: a row per configuration: configuration, the two figures, and efficient, as `runs.comparison.pareto` gives it.
        x, y: columns of figures. size: another, for the size of the marks.
        baseline: configuration that is marked.
        tint: column that gives the colour, where there is one.
        limit: of y, drawn as a line.
    """
    import plotly.graph_objects as go

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
        figure.add_hline(y=limit, line={"color": GREY, "dash": "dash", "width": 1.2})
        figure.add_annotation(
            x=1, xref="x domain", y=limit, text="limit", showarrow=False, yanchor="bottom", xanchor="right"
        )
    figure.update_layout(
        template=theme(),
        height=470,
        margin={"r": 10, "t": 20},
        legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top", "xanchor": "left"},
    )
    figure.update_xaxes(title_text=label(x))
    figure.update_yaxes(title_text=label(y))
    return figure


def _efficient(figure: go.Figure, best: pd.DataFrame, x: str, y: str) -> None:
    """The line through the efficient ones, and a number at each, which the legend names."""
    figure.add_scatter(
        x=best[x].tolist(),
        y=best[y].tolist(),
        mode="lines",
        name="efficient",
        line={"color": CHOSEN, "width": 1.6, "dash": "dot"},
        hoverinfo="skip",
    )
    for place, (at, up, name) in enumerate(zip(best[x], best[y], best["configuration"], strict=True), 1):
        if len(best) > NAMED:
            break
        figure.add_scatter(
            x=[at],
            y=[up],
            mode="markers+text",
            marker={"symbol": "circle-open", "size": 13, "color": CHOSEN, "line": {"width": 2}},
            text=[f"<b>{place}</b>"],
            textposition="bottom center" if place % 2 else "top center",
            textfont={"size": 13, "color": CHOSEN},
            cliponaxis=False,
            name=f"<b>{place}</b> {short(name)}",
            hoverinfo="skip",
        )


def plain(text: Any) -> str:
    """Words of a run as plotly shows them letter by letter: its labels know some markup."""
    return html.escape(str(text), quote=False)


def short(configuration: str) -> str:
    """`"engine=eager, plan=plans/mine.yaml, steps=4"` as `"eager, mine, steps=4"`: values that speak for themselves."""
    words = re.sub(r"(^|, )\w+=(?=[A-Za-z])(?!None|True|False)", r"\1", configuration)
    return plain(re.sub(r"[^\s,=]*/([^\s,/]+)\.ya?ml", r"\1", words))


def _sizes(values: Sequence[float]) -> dict[Any, float]:
    """Diameters whose area follows the value, 8 to 24 px; the smallest where it is not known."""
    low, high = values.min(), values.max()
    spread = high - low
    return {
        index: 8 + 16 * ((value - low) / spread) ** 0.5 if spread > 0 and value == value else 8.0
        for index, value in values.items()
    }


def _hover(x: str, y: str, size: str | None) -> str:
    more = f"<br>{label(size)} %{{customdata[0]:.4g}}" if size else ""
    return f"%{{text}}<br>{label(x)} %{{x:,.4g}}<br>{label(y)} %{{y:.4g}}{more}<extra></extra>"
