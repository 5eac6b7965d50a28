"""What techniques bought alone and combined."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanlab.plots.runs import plain, short
from wanlab.plots.style import GREY, ROW_PX, colour, needs, theme

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def technique_bars(matrix: pd.DataFrame) -> go.Figure:
    """Speed-up of each technique and combination with its interval; where there is one, the product of the single ones.

    Args:
        matrix: as `runs.comparison.technique_matrix` gives it.
    """
    import plotly.graph_objects as go

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
    both = matrix[matrix["product"].notna()]
    if len(both):
        figure.add_scatter(
            x=both["product"].tolist(),
            y=[names[matrix.index.get_loc(index)] for index in both.index],
            mode="markers",
            name="product of the single ones",
            marker={
                "symbol": "diamond",
                "size": 12,
                "color": "#d9534f",
                "line": {"width": 1, "color": "white"},
            },
            text=[plain(each) for each in both["verdict"]],
            hovertemplate="%{y}<br>%{x:.2f}x<br>%{text}<extra>product</extra>",
        )
    ends = [*matrix["high"], *both["product"]]
    top = max((end for end in ends if end == end and end != float("inf")), default=1.0)
    figure.add_vline(x=1, line={"color": GREY, "width": 1.2, "dash": "dash"})
    figure.update_layout(template=theme(), height=110 + ROW_PX * max(len(names), 1))
    figure.update_xaxes(title_text="times as fast as the baseline", range=[0, 1.15 * top])
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return figure


def _interval(rows: pd.DataFrame, value: str, low: str, high: str) -> dict:
    up = [
        None if abs(end) == float("inf") else end - at
        for at, end in zip(rows[value], rows[high], strict=True)
    ]
    down = (rows[value] - rows[low]).tolist()
    return {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "color": GREY,
        "thickness": 1.4,
        "width": 4,
    }
