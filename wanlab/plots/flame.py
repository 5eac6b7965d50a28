"""Flame graphs, and what changed between two."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from wanlab.plots.breakdown import CATEGORY_NAMES
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


GREW, SHRANK = "#d9534f", "#1d7a46"
LONGEST_NAME = 48


def short_name(name: str, longest: int = LONGEST_NAME) -> str:
    """A frame's name without template arguments and parameters, its middle left out if it is still too long.

    Of PyTorch's elementwise kernels, which are one template, what they compute is kept: "elementwise_kernel MulFunctor".
    """
    plain = re.sub(r"\(anonymous namespace\)::", "", name.removeprefix("void "))
    while (less := re.sub(r"<[^<>]*>|\([^()]*\)", "", plain)) != plain:
        plain = less
    plain = (plain.strip() or name).removeprefix("at::native::")
    functor = re.search(r"\w*Functor\w*|\w+_kernel_(?:cuda|impl)\w*", name)
    if functor and functor[0] not in plain:
        plain = f"{plain} {functor[0]}"
    half = (longest - 1) // 2
    return plain if len(plain) <= longest else f"{plain[:half]}…{plain[-half:]}"


def difference_bars(difference: Any, *, rows: int = 14) -> go.Figure:
    """The rows that changed most between two profiles, in milliseconds; the rest as one bar.

    Args:
        difference: `diagnose.Difference`.
        rows: how many to name.
    """
    import plotly.graph_objects as go

    table = difference.frame
    shown, rest = table.head(rows), table.iloc[rows:]
    more = [f"{len(rest)} more"] * bool(len(rest))
    names = [_row_name(path) for path in shown["path"]] + more
    changes = [*shown["change_us"], *([rest["change_us"].sum()] if len(rest) else [])]
    notes = [*shown["status"], *([""] if len(rest) else [])]
    figure = go.Figure(
        go.Bar(
            x=[change / 1e3 for change in changes],
            y=list(range(len(names))),
            orientation="h",
            marker={"color": [SHRANK if change < 0 else GREW for change in changes]},
            text=[f"{change / 1e3:+,.1f} ms {note}" for change, note in zip(changes, notes, strict=True)],
            textposition="outside",
            cliponaxis=False,
            customdata=[[" › ".join(path)] for path in shown["path"]] + [[""]] * bool(len(rest)),
            hovertemplate="%{customdata[0]}<br>%{text}<extra></extra>",
        )
    )
    figure.update_layout(template=theme(), height=80 + ROW_PX * len(names), showlegend=False)
    low, high = min([0.0, *changes]) / 1e3, max([0.0, *changes]) / 1e3
    room = 0.55 * (high - low or 1.0)
    figure.update_xaxes(
        title_text=f"change (ms); all rows together {difference.change_us / 1e3:+,.2f} ms",
        range=[low - room, high + room],
    )
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=names, autorange="reversed", showgrid=False
    )
    return figure


def _row_name(path: tuple[str, ...]) -> str:
    if len(path) == 1:
        return CATEGORY_NAMES.get(path[0], short_name(path[0]))
    above = path[0] if len(path) == 2 else path[-2]
    return f"{short_name(above, 20)} › {short_name(path[-1])}"


def difference_icicle(difference: Any, *, smallest_percent: float = 0.2) -> go.Figure:
    """Both flame graphs in one: a frame is as wide as the longer of its two times, red where it grew, green where it shrank.

    After Gregg, "Differential Flame Graphs" (2014), with what vanished kept in its place.

    Args:
        difference: `diagnose.Difference` by stack.
        smallest_percent: frames with less of the whole are left out.
    """
    import plotly.graph_objects as go

    nodes: dict[tuple[str, ...], list[float]] = {(): [0.0, 0.0, 0.0]}
    for row in difference.frame.itertuples():
        if len(row.path) == 1 and row.path[0].startswith("("):
            continue
        for depth in range(len(row.path) + 1):
            node = nodes.setdefault(row.path[:depth], [0.0, 0.0, 0.0])
            node[0] += row.before_us
            node[1] += row.after_us
            node[2] += max(row.before_us, row.after_us)
    least = nodes[()][2] * smallest_percent / 100
    kept = {path: node for path, node in nodes.items() if node[2] >= least or not path}
    figure = go.Figure(
        go.Icicle(
            ids=["/".join(path) or "all" for path in kept],
            parents=["" if not path else "/".join(path[:-1]) or "all" for path in kept],
            labels=[_below(path) for path in kept],
            values=[node[2] for node in kept.values()],
            branchvalues="total",
            sort=False,
            tiling={"orientation": "v"},
            marker={
                "colors": [_change_colour(before, after) for before, after, _ in kept.values()],
                "line": {"width": 0.5, "color": "rgba(255,255,255,0.35)"},
            },
            customdata=[
                [path[-1] if path else "all", before / 1e3, after / 1e3, (after - before) / 1e3]
                for path, (before, after, _) in kept.items()
            ],
            hovertemplate="%{customdata[0]}<br>%{customdata[1]:,.2f} ms before, %{customdata[2]:,.2f} ms after: "
            "%{customdata[3]:+,.2f} ms<extra></extra>",
            textposition="middle left",
            pathbar={"thickness": 20},
        )
    )
    depth = max(len(path) for path in kept)
    figure.update_layout(template=theme(), height=90 + 26 * (2 + depth), margin={"t": 30})
    return figure


def _below(path: tuple[str, ...]) -> str:
    """What stands above need not be said again."""
    if not path:
        return "all"
    return path[-1].removeprefix(f"{path[-2]}.") if len(path) > 1 else path[-1]


def _change_colour(before: float, after: float) -> str:
    """Grey where nothing changed, full red or green where a frame is new or gone."""
    most = max(before, after)
    change = (after - before) / most if most else 0.0
    full = (217, 83, 79) if change > 0 else (29, 122, 70)
    share = min(1.0, abs(change))
    mixed = [round(160 + share * (channel - 160)) for channel in full]
    return f"rgb({mixed[0]},{mixed[1]},{mixed[2]})"
