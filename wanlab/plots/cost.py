"""Figures of what a video costs: time by component, category and code, samples, before and after, memory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from wanlab.core.errors import WanlabError
from wanlab.core.words import shown, time_text
from wanlab.diagnose.breakdown import CATEGORY_NAMES as CATEGORY_NAMES
from wanlab.diagnose.memory.account import PART_NAMES as PART_NAMES
from wanlab.diagnose.profile_answer import whole_percent
from wanlab.models.spec import ENCODERS
from wanlab.plots.bars import BESIDE, name_lines
from wanlab.plots.style import (
    COMPONENT_COLOURS,
    NAMES,
    OTHERS,
    ROW_PX,
    colour,
    label,
    needs,
    theme,
    variant_name,
)

BOTH_HALVES = "#94a83c"  # weights of the whole VAE, beside those that one half allocates
BEFORE = "#a1785c"  # what was allocated before the profile, beside the grey of what no component allocates
SMALLEST_ROW_PERCENT = 1.0
"""Rows below it are drawn as one, when there are several of them."""


def category_bars(breakdown: Any) -> go.Figure:
    """Share of the wall clock: one bar per category, divided by component; time hidden behind other work is hatched.

    Categories with less than a percent are one bar. The bars add up to the wall clock. In a report with a live view
    (`plots.explorer`) a click on a bar selects its work there.

    Args:
        breakdown: `diagnose.Breakdown`.
    """
    table = breakdown.frame
    small = table["share_percent"] < SMALLEST_ROW_PERCENT
    small = small & (table["hidden_ms"] < SMALLEST_ROW_PERCENT / 100 * breakdown.wall_ms)
    rest = f"{small.sum()} smaller rows" if small.sum() > 1 else ""
    names = {
        category: name_lines(rest if rest and little else breakdown.name_of(category))
        for category, little in zip(table["category"], small, strict=True)
    }
    rows = table.assign(name=table["category"].map(names))
    sums = rows.groupby("name", sort=False)[["time_ms", "share_percent", "hidden_ms"]].sum()
    parts = breakdown.parts.assign(name=breakdown.parts["category"].map(names))
    shown = {name: category for category, name in names.items() if name != rest}
    figure = go.Figure()
    by_component = parts.groupby("component")["time_ms"].sum().sort_values(ascending=False)
    for component, time_ms in by_component.items():
        part = parts[parts["component"] == component].groupby("name", sort=False)["time_ms"].sum()
        named = (
            component in set(table["category"]) or time_ms < SMALLEST_ROW_PERCENT / 100 * breakdown.wall_ms
        )
        figure.add_bar(
            x=part.tolist(),
            y=part.index.tolist(),
            orientation="h",
            name=_name(str(component)),
            marker={"color": _colour(str(component))},
            showlegend=not named,  # a row has its name, or there is almost nothing of it
            hovertemplate="%{y}, %{fullData.name}: %{x:,.2f} ms<extra></extra>",
            meta={
                "explore": [
                    {"component": str(component)} | ({"category": shown[name]} if name in shown else {})
                    for name in part.index
                ]
            },
        )
    hidden = sums[sums["hidden_ms"] > 0.001 * breakdown.wall_ms]
    if len(hidden):
        figure.add_bar(
            x=hidden["hidden_ms"].tolist(),
            y=hidden.index.tolist(),
            orientation="h",
            name="hidden behind other work",
            marker={"color": "rgba(128,138,149,0.25)", "pattern": {"shape": "/"}},
            hovertemplate="%{y}: %{x:,.2f} ms more, hidden behind other work<extra></extra>",
        )
    ends = sums["time_ms"] + hidden["hidden_ms"].reindex(sums.index, fill_value=0.0)
    for name, end, row in zip(sums.index, ends, sums.itertuples(), strict=True):
        text = f"{time_text(row.time_ms)} · {whole_percent(row.share_percent)}"
        figure.add_annotation(x=end, y=name, text=text, xanchor="left", xshift=4, showarrow=False)
    order = [*(name for name in sums.index if name != rest), *([rest] if rest else [])]
    figure.update_layout(
        template=theme(), barmode="stack", height=120 + COMPACT_ROW_PX * len(order), margin={"t": 40}
    )
    figure.update_layout(legend={"traceorder": "normal"})
    figure.update_xaxes(title_text="wall clock (ms)", range=[0, BESIDE * float(ends.max())], nticks=6)
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1], showgrid=False)
    return figure


def flame_icicle(flame: Any, *, smallest_percent: float = 0.1) -> go.Figure:
    """Flame graph: width is time, the frames that a frame called are below it, a click opens a frame.

    The colour of a frame is that of the component it runs in. In a report the figure has a search box.

    Args:
        flame: `diagnose.Flame`.
        smallest_percent: frames with a smaller share of the total are left out; their time stays in the frame above.
    """
    table = flame.frame.assign(component=_components_of(flame.frame))
    # A child is never larger than its parent, so the parent of every frame that is drawn is drawn too.
    kept = table[(table["total_us"] >= flame.total_us * smallest_percent / 100) | (table.index == 0)]
    figure = go.Figure(
        go.Icicle(
            ids=[str(i) for i in kept.index],
            parents=["" if parent < 0 else str(parent) for parent in kept["parent"]],
            labels=[
                # Without the parent's name.
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
    """For every frame of a flame graph the component it runs in, "other" outside all components."""
    components: list[str] = []
    for name, parent in zip(table["name"], table["parent"], strict=True):
        own = str(name).partition(".")[0]
        above = components[parent] if parent >= 0 else "other"
        components.append(own if own in COMPONENT_COLOURS else above)
    return components


GREW, SHRANK = "#d9534f", "#1d7a46"
LONGEST_NAME = 48


def short_name(name: str, longest: int = LONGEST_NAME) -> str:
    """A frame's name without template arguments and parameters; the middle of a long name is left out.

    PyTorch's elementwise kernels are one template; the operation is kept in their names: "elementwise_kernel MulFunctor".
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
        rows: number of bars with a name of their own.
    """
    table = difference.frame
    shown, rest = table.head(rows), table.iloc[rows:]
    names = [_row_name(path) for path in shown["path"]] + [f"{len(rest)} more"] * bool(len(rest))
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
    """Two flame graphs in one: a frame's width is the longer of its two times, red where it grew, green where it shrank.

    After Gregg, "Differential Flame Graphs" (2014); frames that vanished are drawn too.

    Args:
        difference: `diagnose.Difference` by stack.
        smallest_percent: frames with a smaller share of the total are left out.
    """
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
    """A frame's name without that of its parent."""
    if not path:
        return "all"
    return path[-1].removeprefix(f"{path[-2]}.") if len(path) > 1 else path[-1]


def _change_colour(before: float, after: float) -> str:
    """Grey where nothing changed, full red for a new frame, full green for one that vanished."""
    most = max(before, after)
    change = (after - before) / most if most else 0.0
    full = (217, 83, 79) if change > 0 else (29, 122, 70)
    share = min(1.0, abs(change))
    mixed = [round(160 + share * (channel - 160)) for channel in full]
    return f"rgb({mixed[0]},{mixed[1]},{mixed[2]})"


def breakdown_bar(df: pd.DataFrame) -> go.Figure:
    """Time per component as bars, each with its milliseconds and its share.

    Args:
        df: columns component, time_ms and, if known, share_percent and calls; from `StageRecorder.breakdown`.
    """
    needs(df, "breakdown_bar", "component", "time_ms")
    total = float(df["time_ms"].sum())
    share = df["share_percent"] if "share_percent" in df else 100.0 * df["time_ms"] / (total or 1.0)
    calls = df["calls"] if "calls" in df else [None] * len(df)
    names = [NAMES.get(name, str(name)) for name in df["component"]]
    texts = [
        f"{time_text(ms)} · {whole_percent(part)}" for ms, part in zip(df["time_ms"], share, strict=True)
    ]
    figure = go.Figure(
        go.Bar(
            x=df["time_ms"].tolist(),
            y=names,
            orientation="h",
            text=texts,
            textposition="outside",
            cliponaxis=False,
            marker={"color": [colour(name) for name in df["component"]]},
            customdata=[["" if c is None else f"<br>{c} calls"] for c in calls],
            hovertemplate="%{y}<br>%{text}%{customdata[0]}<extra></extra>",
        )
    )
    longest = float(df["time_ms"].max()) if len(df) else 1.0
    figure.update_layout(template=theme(), height=70 + ROW_PX * max(len(df), 1), showlegend=False)
    # Space for the text right of the longest bar.
    figure.update_xaxes(title_text="time (ms)", range=[0, longest * 1.32 or 1.0])
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def samples_strip(samples: Sequence[Any]) -> go.Figure:
    """Every sample of each timing as a dot, in order, with the median as a line.

    Args:
        samples: `Samples`, each with `label`, `values_ms` and `median`.
    """
    if not samples:
        raise WanlabError("samples_strip needs at least one timing")
    figure = go.Figure()
    for row, sample in enumerate(samples):
        tint = colour(sample.label)
        n = len(sample.values_ms)
        # Dots are ordered by time of measurement: a drift of the machine is a slope.
        spread = [row + 0.5 * ((i + 0.5) / n - 0.5) for i in range(n)]
        figure.add_trace(
            go.Scatter(
                x=list(sample.values_ms),
                y=spread,
                mode="markers",
                name=sample.label,
                marker={"color": tint, "size": 7, "opacity": 0.7},
                customdata=[[i + 1, n] for i in range(n)],
                hovertemplate="%{x:.3f} ms<br>sample %{customdata[0]} of %{customdata[1]}"
                "<extra>%{fullData.name}</extra>",
            )
        )
        figure.add_shape(
            type="line",
            x0=sample.median,
            x1=sample.median,
            y0=row - 0.36,
            y1=row + 0.36,
            line={"color": tint, "width": 3},
        )
        figure.add_annotation(
            x=sample.median, y=row - 0.42, text=time_text(sample.median), showarrow=False, yanchor="bottom"
        )
    figure.update_layout(template=theme(), height=80 + 64 * len(samples), showlegend=False)
    figure.update_xaxes(title_text="time (ms), median marked")
    figure.update_yaxes(
        tickvals=list(range(len(samples))),
        ticktext=[name_lines(variant_name(sample.label)) for sample in samples],
        range=[len(samples) - 0.5, -0.7],
        showgrid=False,
        zeroline=False,
    )
    return figure


def before_after_bars(df: pd.DataFrame) -> go.Figure:
    """One panel per measure, one bar per row, with the ratio to the first row.

    Args:
        df: the first column names what is compared ("eager", "onnxruntime", ...), the first row is the
            baseline; each numeric column is a measure with its unit in its name (frame_ms, load_ms).
    """
    measures = [c for c in df.columns[1:] if pd.api.types.is_numeric_dtype(df[c]) and df[c].notna().any()]
    if df.empty or not measures:
        raise WanlabError(
            "before_after_bars needs a column of names, at least one row and one numeric column"
        )
    rows = len(measures)
    height = 50 * rows + 26 * rows * len(df)
    figure = make_subplots(
        rows=rows,
        cols=1,
        subplot_titles=[label(measure) for measure in measures],
        vertical_spacing=34 / height if rows > 1 else 0,
    )
    labels = [str(name) for name in df.iloc[:, 0]]
    names = list(map(variant_name, labels))
    for row, measure in enumerate(measures, 1):
        values = [float(value) for value in df[measure]]
        figure.add_bar(
            x=values,
            y=names,
            orientation="h",
            text=[_with_ratio(value, values[0]) for value in values],
            textposition="outside",
            cliponaxis=False,
            marker={"color": [colour(name) for name in labels]},
            hovertemplate="%{y}: %{text}<extra></extra>",
            showlegend=False,
            row=row,
            col=1,
        )
        longest = max((value for value in values if value == value), default=1.0)
        # Space for the text right of the longest bar.
        figure.update_xaxes(range=[0, longest * 1.45 or 1.0], row=row, col=1)
    figure.update_layout(template=theme(), height=height, margin={"t": 30}, bargap=0.2)
    figure.update_xaxes(showticklabels=False, showgrid=False, zeroline=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_annotations(font={"size": 13}, x=0, xanchor="left")
    return figure


def _with_ratio(value: float, baseline: float) -> str:
    if value != value:
        return ""
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if value == baseline or not value or not baseline:
        return shown
    ratio = baseline / value
    return f"{shown} · {ratio:.2f}× less" if ratio > 1 else f"{shown} · {1 / ratio:.2f}× more"


COMPACT_ROW_PX = 28  # of figures with many rows that stand on the first screen
SMALLEST_SHARE = 0.005  # of the video; smaller components are drawn as one


def breakdown_bars(tables: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Time per component of several variants on one axis, with the ratio of each to the first variant.

    Args:
        tables: name of the variant, the original first -> its columns component and time_ms, as `breakdown_bar` takes them.
    """
    if not tables:
        raise WanlabError("breakdown_bars needs at least one variant")
    for table in tables.values():
        needs(table, "breakdown_bars", "component", "time_ms")
    times = pd.DataFrame(
        {name: table.groupby("component")["time_ms"].sum() for name, table in tables.items()}
    )
    order = [name for table in tables.values() for name in table["component"]]
    times = times.reindex(dict.fromkeys(order)).fillna(0.0)
    small = (times < SMALLEST_SHARE * times.sum()).all(axis=1) & (times.index != "other")
    if small.any():
        rest = times[small].sum() + (times.loc["other"] if "other" in times.index else 0.0)
        times = pd.concat([times[~small].drop(index="other", errors="ignore"), rest.to_frame("other").T])
    names = [NAMES.get(name, str(name)) for name in times.index]
    first, longest = times.iloc[:, 0], float(times.max().max())
    scale, unit = (1e3, "s") if longest >= 1e4 else (1.0, "ms")
    figure = go.Figure()
    for place, variant in enumerate(times):
        values = times[variant]
        figure.add_bar(
            x=(values / scale).tolist(),
            y=names,
            orientation="h",
            name=variant_name(variant),
            text=[
                f"{value / scale:,.{0 if value / scale >= 100 else 1}f} {unit}"
                + _times_as_fast(value, of, place)
                for value, of in zip(values, first, strict=True)
            ],
            textposition="outside",
            cliponaxis=False,
            marker={"color": colour(variant)},
            hovertemplate="%{y}: %{text}<extra>%{fullData.name}</extra>",
        )
    height = 90 + (12 + 18 * len(times.columns)) * len(times)
    figure.update_layout(template=theme(), height=height, barmode="group", bargap=0.25, margin={"t": 40})
    figure.update_xaxes(title_text=f"time in one video ({unit})", range=[0, 1.5 * longest / scale or 1.0])
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _times_as_fast(value: float, original: float, place: int) -> str:
    return f" · {original / value:.2f}× as fast" if place and value and original else ""


def schedule_timeline(df: pd.DataFrame) -> go.Figure:
    """Which component ran when, as a bar from its start to its end.

    Args:
        df: columns component, start_ms, time_ms and, for experts, step, timestep and branch; from
            `StageRecorder.frame`.
    """
    needs(df, "schedule_timeline", "component", "start_ms", "time_ms")
    names = list(dict.fromkeys(df["component"]))
    figure = go.Figure()
    for name in names:
        part = df[df["component"] == name]
        notes = []
        for row in part.to_dict(orient="records"):
            known = [(key, row.get(key)) for key in ("step", "timestep", "branch")]
            notes.append(
                "".join(f"<br>{key} {_number(v)}" for key, v in known if v is not None and not pd.isna(v))
            )
        figure.add_bar(
            x=part["time_ms"].tolist(),
            base=part["start_ms"].tolist(),
            y=[NAMES.get(name, str(name))] * len(part),
            orientation="h",
            name=NAMES.get(name, str(name)),
            marker={"color": colour(name), "line": {"width": 0.5, "color": "rgba(255,255,255,0.35)"}},
            customdata=[[note] for note in notes],
            hovertemplate="%{x:.1f} ms from %{base:.0f} ms%{customdata[0]}<extra>%{fullData.name}</extra>",
            showlegend=False,
        )
    figure.update_layout(template=theme(), height=80 + ROW_PX * max(len(names), 1), barmode="overlay")
    figure.update_xaxes(title_text="time since the start (ms)")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_COMPONENTS = (
    *ENCODERS,
    "vae_encoder",
    "vae",
    "expert",
    "expert_high",
    "expert_low",
    "vae_decoder",
    "outside",
)


def memory_bars(account: Any) -> go.Figure:
    """Parts of the peak as bars that add up to it, each divided by component.

    Args:
        account: `diagnose.MemoryAccount`.
    """
    table, (scale, unit) = account.frame, _unit(account.peak_bytes)
    sums = table.groupby("part")["size_bytes"].sum().sort_values(ascending=False)
    figure = go.Figure()
    for component in [name for name in _COMPONENTS if name in set(table["component"])]:
        rows = table[table["component"] == component]
        figure.add_bar(
            x=(rows["size_bytes"] / scale).tolist(),
            y=[name_lines(PART_NAMES[part]) for part in rows["part"]],
            orientation="h",
            name=_name(component),
            marker={"color": _colour(component)},
            showlegend=bool(rows["size_bytes"].sum() >= SMALLEST_ROW_PERCENT / 100 * account.peak_bytes),
            hovertemplate=f"%{{y}}, %{{fullData.name}}: %{{x:,.3f}} {unit}<extra></extra>",
        )
    for part, size in sums.items():
        text = f"{shown(size / scale, unit)} · {whole_percent(100 * size / account.peak_bytes)}"
        name = name_lines(PART_NAMES[part])
        figure.add_annotation(
            x=max(size, 0) / scale, y=name, text=text, xanchor="left", xshift=4, showarrow=False
        )
    figure.update_layout(template=theme(), barmode="stack", height=130 + ROW_PX * len(sums), margin={"t": 40})
    figure.update_layout(legend={"traceorder": "normal"})
    figure.update_xaxes(
        title_text=f"memory at the peak ({unit}); sum {shown(account.peak_bytes / scale)}",
        range=[0, BESIDE * float(sums.max()) / scale],
        nticks=6,
    )
    order = [name_lines(PART_NAMES[part]) for part in sums.index]
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1], showgrid=False)
    return figure


def memory_timeline(account: Any) -> go.Figure:
    """Allocated memory over time by component, above what was allocated before the profile; the peak is marked.

    Args:
        account: `diagnose.MemoryAccount`.
    """
    table, (scale, unit) = account.timeline, _unit(account.peak_bytes)
    seconds = table["time_ms"] / 1e3
    figure = go.Figure()
    for name in ["before", *(name for name in _COMPONENTS if name in table)]:
        figure.add_scatter(
            x=seconds.tolist(),
            y=(table[name] / scale).tolist(),
            stackgroup="memory",
            mode="lines",
            name="allocated before: weights" if name == "before" else _name(name),
            line={"width": 0.5, "shape": "hv", "color": BEFORE if name == "before" else _colour(name)},
            hovertemplate=f"%{{y:,.2f}} {unit}<extra>%{{fullData.name}}</extra>",
        )
    figure.add_vline(x=account.peak_ms / 1e3, line={"color": "#d9534f", "width": 1.5, "dash": "dot"})
    figure.add_annotation(
        x=account.peak_ms / 1e3, yref="paper", y=1.0, text="peak", showarrow=False, xanchor="right", xshift=-4
    )
    figure.update_layout(template=theme(), height=380, margin={"t": 50}, hovermode="x unified")
    figure.update_xaxes(title_text="time in the profile (s)")
    figure.update_yaxes(title_text=f"allocated ({unit})", rangemode="tozero")
    return figure


def memory_option_bars(table: Any) -> go.Figure:
    """Memory that each option saves, with its cost in time; options within the noise are grey.

    Args:
        table: from `diagnose.memory_options`.

    Raises:
        WanlabError: no option was measured.
    """
    measured = table[table["state"] == "measured"]
    if measured.empty:
        raise WanlabError("no option was measured; see the reasons in the table")
    scale, unit = _unit(float(table["peak_gib"].max()) * 2**30)
    saved = measured["saved_gib"] * 2**30 / scale
    texts = [
        f"{shown(value, unit)} · {ratio:.2f}× time"
        for value, ratio in zip(saved, measured["time_ratio"], strict=True)
    ]
    figure = go.Figure(
        go.Bar(
            x=saved.tolist(),
            y=[name_lines(option) for option in measured["option"]],
            orientation="h",
            text=texts,
            textposition="outside",
            cliponaxis=False,
            marker={"color": [OTHERS[2] if saves else "#9aa3ad" for saves in measured["saves"]]},
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
    )
    noise = float(table["noise_gib"].max()) * 2**30 / scale
    figure.update_layout(template=theme(), height=80 + ROW_PX * len(measured), showlegend=False)
    low, high = min(0.0, saved.min()), max(saved.max(), noise)
    figure.update_xaxes(
        title_text=f"memory saved at the peak ({unit}); noise {noise:,.3f} {unit}",
        range=[low - 0.05 * (high - low or 1), high + 0.75 * (high - low or 1)],
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _unit(most_bytes: float) -> tuple[int, str]:
    return (1 << 30, "GiB") if most_bytes >= 1 << 30 else (1 << 20, "MiB")


def _name(component: str) -> str:
    names = {"outside": "outside of them", "vae": "VAE, both halves"}
    return names.get(component, NAMES.get(component, component))


def _colour(component: str) -> str:
    return BOTH_HALVES if component == "vae" else colour({"outside": "other"}.get(component, component))
