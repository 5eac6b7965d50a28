"""Flame graphs, and what changed between two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wanlab.plots.style import COMPONENT_COLOURS, ROW_PX, colour, theme

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def flame_icicle(flame: Any, *, smallest_percent: float = 0.1) -> go.Figure:
    """A flame graph that opens where it is clicked: width is time, below a frame stands what it called.

    Frames take the colour of the component they run in. In a report it has a search box.

    Args:
        flame: `diagnose.Flame`.
        smallest_percent: frames with less of the whole are left out; their time stays in the frame above.
    """
    import plotly.graph_objects as go

    table = flame.frame.assign(component=_components_of(flame.frame))
    # A child is never larger than what is above it, so what is kept hangs together.
    kept = table[(table["total_us"] >= flame.total_us * smallest_percent / 100) | (table.index == 0)]
    figure = go.Figure(
        go.Icicle(
            ids=[str(i) for i in kept.index],
            parents=["" if parent < 0 else str(parent) for parent in kept["parent"]],
            labels=[
                # What stands above need not be said again.
                name.removeprefix(f"{table['name'][parent]}.") if parent > 0 else name
                for name, parent in zip(kept["name"], kept["parent"], strict=True)
            ],
            values=kept["total_us"].tolist(),
            branchvalues="total",
            sort=False,
            tiling={"orientation": "v"},
            marker={
                "colors": [colour(component) for component in kept["component"]],
                "line": {"width": 0.5, "color": "rgba(255,255,255,0.35)"},
            },
            customdata=[
                [name, total / 1e3, own / 1e3, count]
                for name, total, own, count in zip(
                    kept["name"], kept["total_us"], kept["self_us"], kept["count"], strict=True
                )
            ],
            hovertemplate="%{customdata[0]}<br>%{customdata[1]:,.3f} ms, own %{customdata[2]:,.3f} ms, "
            "%{customdata[3]} times<br>%{percentRoot:.1%} of all, %{percentParent:.1%} of the frame above"
            "<extra></extra>",
            textposition="middle left",
            pathbar={"thickness": 20},
        )
    )
    figure.update_layout(template=theme(), height=90 + 26 * (2 + int(kept["depth"].max())), margin={"t": 30})
    return figure


def _components_of(table: pd.DataFrame) -> list[str]:
    """For every frame of a flame graph the component it runs in, "other" outside of all."""
    found: list[str] = []
    for name, parent in zip(table["name"], table["parent"], strict=True):
        own = str(name).partition(".")[0]
        above = found[parent] if parent >= 0 else "other"
        found.append(own if own in COMPONENT_COLOURS else above)
    return found


def difference_bars(difference: Any, *, rows: int = 20) -> go.Figure:
    """The stacks that changed most between two flame graphs, in milliseconds; the rest as one bar.

    Args:
        difference: `diagnose.Difference`.
        rows: how many stacks to name.
    """
    import plotly.graph_objects as go

    table = difference.frame
    shown, rest = table.head(rows), table.iloc[rows:]
    names = [" › ".join(path[-2:]) for path in shown["path"]] + [f"{len(rest)} more stacks"] * bool(len(rest))
    changes = [*shown["change_us"], *([rest["change_us"].sum()] if len(rest) else [])]
    notes = [*shown["status"], *([""] if len(rest) else [])]
    figure = go.Figure(
        go.Bar(
            x=[change / 1e3 for change in changes],
            y=list(range(len(names))),
            orientation="h",
            marker={"color": ["#1d7a46" if change < 0 else "#d9534f" for change in changes]},
            text=[f"{change / 1e3:+,.3f} ms {note}" for change, note in zip(changes, notes, strict=True)],
            customdata=[[" › ".join(path)] for path in shown["path"]] + [[""]] * bool(len(rest)),
            hovertemplate="%{customdata[0]}<br>%{text}<extra></extra>",
        )
    )
    figure.update_layout(template=theme(), height=80 + ROW_PX * len(names), showlegend=False)
    figure.update_xaxes(title_text=f"change (ms); all rows together {difference.change_us / 1e3:+,.2f} ms")
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=names, autorange="reversed", showgrid=False
    )
    return figure
