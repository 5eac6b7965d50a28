"""Figures of engines: benchmark bars, layers by role, builds, platforms, candidates for one component."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from wanlab.core.errors import WanlabError
from wanlab.core.formats import element_name
from wanlab.core.stats import ends_text
from wanlab.core.words import number_text, time_text
from wanlab.engines.registry import engine_text
from wanlab.plots.bars import name_lines
from wanlab.plots.intervals import MOST_ROWS, interval_rows
from wanlab.plots.style import FORMAT_COLOURS, GREY, NAMES, ROW_PX, colour, label, needs, theme

PARTS = ("h2d", "device", "d2h")
COPIES = {"h2d": "copy to the device", "d2h": "copy back"}


def bench_bars(df: pd.DataFrame) -> go.Figure:
    """One bar per benchmark: its median latency and its speed-up; on a GPU divided into copies and computing.

    Args:
        df: columns engine, latency_ms and, where they were measured, h2d_ms, device_ms, d2h_ms, speedup, verdict,
            component; from `measure.bench_table` or `engines.bench_components`.
    """
    needs(df, "bench_bars", "engine", "latency_ms")
    rows = df.to_dict(orient="records")
    keys = ("component", "engine") if "component" in df else ("engine",)
    y = [
        "<br>".join(dict.fromkeys(NAMES.get(row[key], engine_text(str(row[key]))) for key in keys))
        for row in rows
    ]
    figure = go.Figure()
    parts = [name for name in PARTS if f"{name}_ms" in df] or ["latency"]
    for name in parts:
        copies = name in COPIES
        figure.add_bar(
            x=[row[f"{name}_ms"] for row in rows],
            y=y,
            orientation="h",
            name=COPIES.get(name, "computing" if name == "device" else "latency"),
            marker={"color": GREY if copies else [colour(row["engine"]) for row in rows]},
            hovertemplate="%{x:,.3f} ms<extra>%{fullData.name}</extra>",
            text=[_bench_text(row) for row in rows] if name == parts[-1] else None,
            textposition="outside",
            cliponaxis=False,
        )
    longest = max(row["latency_ms"] for row in rows)
    figure.update_layout(
        template=theme(), barmode="stack", height=80 + ROW_PX * len(rows), showlegend=False, margin={"r": 20}
    )
    # Space for the text right of the longest bar.
    figure.update_xaxes(title_text="latency (ms), median", range=[0, longest * 1.5 or 1.0])
    figure.update_yaxes(autorange="reversed", showgrid=False, showdividers=False)
    return figure


def operator_bars(df: pd.DataFrame, top: int = 10) -> go.Figure:
    """Operators that take most of an engine's time, as bars with their share; their number of nodes shows on hover.

    Args:
        df: columns operator, nodes, time_ms, share_percent, longest first; from `engines.operator_times`.
        top: number of operators with a bar of their own; the others are one bar.
    """
    needs(df, "operator_bars", "operator", "nodes", "time_ms", "share_percent")
    shown, rest = df.head(top), df.iloc[top:]
    if len(rest):
        sums = rest[["nodes", "time_ms", "share_percent"]].sum().to_dict()
        shown = pd.concat([shown, pd.DataFrame([{"operator": f"{len(rest)} others"} | sums])])
    texts = [f"{time_text(row.time_ms)} · {row.share_percent:.1f} %" for row in shown.itertuples()]
    figure = go.Figure(
        go.Bar(
            x=shown["time_ms"].tolist(),
            y=shown["operator"].tolist(),
            orientation="h",
            text=texts,
            textposition="outside",
            cliponaxis=False,
            marker={"color": colour("onnxruntime")},
            customdata=shown["nodes"].tolist(),
            hovertemplate="%{y}: %{text}, %{customdata:,} nodes<extra></extra>",
        )
    )
    figure.update_layout(template=theme(), height=70 + 28 * len(shown), showlegend=False)
    longest = float(shown["time_ms"].max()) if len(shown) else 1.0
    figure.update_xaxes(title_text=label("time_ms"), range=[0, longest * 1.5 or 1.0])
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _bench_text(row: dict) -> str:
    shown = time_text(row["latency_ms"])
    if "speedup" not in row or row.get("verdict") == "baseline":
        return shown
    return f"{shown} · {row['speedup']:.2f}x, {row['verdict']}"


ROLE_NAMES = {
    "attn1": "self-attention",
    "attn2": "cross-attention",
    "ffn": "feed-forward",
    "norm": "norm, modulation",
    "embeddings": "embeddings, output",
    "convolution": "convolution",
    "reformat_cast": "conversions",
    "other": "other",
    "several": "fused across these",
}
ROLE_COLOURS = {
    "attn1": "#3d85c6",
    "attn2": "#8b7ec8",
    "ffn": "#e07b39",
    "norm": "#3fa796",
    "embeddings": "#e8a33d",
    "convolution": "#b0679b",
    "reformat_cast": "#d9534f",
    "other": "#9aa3ad",
    "several": "#6c7885",
}


UNKNOWN = "rgba(128,138,149,0.35)"


def role_bars(layers: pd.DataFrame) -> go.Figure:
    """Time by role, divided by number format; where nothing was timed, the number of layers.

    Args:
        layers: `EngineLayers.frame`; columns role, precision, time_ms.
    """
    needs(layers, "role_bars", "role", "precision", "time_ms")
    timed = bool(layers["time_ms"].notna().any())
    table = layers.assign(value=layers["time_ms"].fillna(0.0) if timed else 1.0)
    totals = table.groupby("role")["value"].sum().sort_values(ascending=False)
    whole = float(totals.sum()) or 1.0
    order = [role for role in totals.index if totals[role] > 0] or list(totals.index)
    figure = go.Figure()
    precisions = _widest_first(table["precision"].unique())
    last: dict[str, str] = {}  # role -> the part at the end of its bar, which has the text
    for precision in precisions:
        last |= dict.fromkeys(table.loc[table["precision"] == precision, "role"], precision)
    for precision in precisions:
        rows = table[table["precision"] == precision].groupby("role")["value"].agg(["sum", "size"])
        rows = rows.reindex(order).dropna()
        texts = {
            role: f"{_ms(totals[role]) if timed else f'{totals[role]:,.0f}'} · {100 * totals[role] / whole:.1f} %"
            for role in rows.index
            if last[role] == precision
        }
        figure.add_bar(
            x=rows["sum"].tolist(),
            y=[ROLE_NAMES.get(role, role) for role in rows.index],
            text=[texts.get(role, "") for role in rows.index],
            textposition="outside",
            cliponaxis=False,
            orientation="h",
            name=str(precision).upper() if precision in FORMAT_COLOURS else precision or "unknown",
            marker={"color": colour(precision) if precision in FORMAT_COLOURS else UNKNOWN},
            customdata=rows["size"].astype(int).tolist(),
            hovertemplate="%{y}, %{fullData.name}: %{x:,.3f}"
            + (" ms" if timed else "")
            + ", %{customdata} layers<extra></extra>",
        )
    figure.update_layout(
        template=theme(), barmode="stack", height=110 + ROW_PX * len(order), margin={"t": 40}
    )
    figure.update_layout(showlegend=True)
    title = "sum of layers (ms)" if timed else "layers"
    figure.update_xaxes(title_text=title, range=[0, 1.3 * float(totals.max() or 1.0)])
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=[ROLE_NAMES.get(role, role) for role in order][::-1],
        showgrid=False,
    )
    return figure


def module_treemap(layers: pd.DataFrame) -> go.Figure:
    """Modules as nested areas in the colour of their role.

    The area is time; without times it is the bytes of the outputs, and without those the number of layers.

    Args:
        layers: `EngineLayers.frame`; columns modules, role, time_ms, activation_bytes. A layer of several modules is part
            of the common prefix of their names.
    """
    needs(layers, "module_treemap", "modules", "role", "time_ms", "activation_bytes")
    timed = bool(layers["time_ms"].notna().any())
    sized = bool(layers["activation_bytes"].sum())
    values, unit = (
        (layers["time_ms"].fillna(0.0), "ms") if timed else (layers["activation_bytes"] / 2**20, "MiB")
    )
    if not (timed or sized):
        values, unit = layers["time_ms"].isna().astype(float), "layers"
    own: dict[tuple[str, ...], float] = {}
    roles: dict[tuple[str, ...], dict[str, float]] = {}
    for modules, role, value in zip(layers["modules"], layers["role"], values, strict=True):
        path = _common([_parts(module) for module in modules.split(", ")])
        own[path] = own.get(path, 0.0) + float(value)
        for depth in range(len(path) + 1):
            values_by_role = roles.setdefault(path[:depth], {})
            values_by_role[role] = values_by_role.get(role, 0.0) + float(value)
    paths = sorted(roles, key=lambda path: (len(path), path))
    total = {path: sum(roles[path].values()) for path in paths}
    figure = go.Figure(
        go.Treemap(
            ids=["/".join(path) or "engine" for path in paths],
            labels=[path[-1] if path else "engine" for path in paths],
            parents=[("/".join(path[:-1]) or "engine") if path else "" for path in paths],
            values=[total[path] for path in paths],
            branchvalues="total",
            marker={
                "colors": [
                    ROLE_COLOURS.get(max(roles[path], key=roles[path].__getitem__), GREY)
                    if len(path) > 1 or (path and len(roles[path]) == 1)
                    else "rgba(128,138,149,0.15)"
                    for path in paths
                ]
            },
            customdata=[own.get(path, 0.0) for path in paths],
            hovertemplate=f"%{{id}}: %{{value:,.3f}} {unit}, of its own %{{customdata:,.3f}} {unit}<extra></extra>",
            texttemplate="%{label}<br>%{percentRoot:.1%}",
            tiling={"pad": 1},
            maxdepth=4,
        )
    )
    figure.update_layout(template=theme(), height=520, margin={"t": 10, "l": 0, "r": 0, "b": 0})
    figure.update_layout(uniformtext={"minsize": 9, "mode": "hide"})
    return figure


def difference_waterfall(differences: pd.DataFrame, a: str, b: str) -> go.Figure:
    """From the time of one engine to that of another, role by role, each with its noise.

    Args:
        differences: from `difference_by(matched, "role")`: role, time_a_ms, time_b_ms, difference_ms, noise_ms.
        a, b: names of the two engines.
    """
    needs(differences, "difference_waterfall", "role", "time_a_ms", "time_b_ms", "difference_ms", "noise_ms")
    steps = differences.to_dict(orient="records")
    first, last = float(differences["time_a_ms"].sum()), float(differences["time_b_ms"].sum())
    names = [a, *(ROLE_NAMES.get(step["role"], step["role"]) for step in steps), b if b != a else f"{b} "]
    figure = go.Figure(
        go.Waterfall(
            orientation="h",
            y=names,
            x=[first, *(step["difference_ms"] for step in steps), last],
            measure=["absolute", *("relative" for _ in steps), "total"],
            text=[_ms(first), *(_signed(step) for step in steps), _ms(last)],
            textposition="outside",
            cliponaxis=False,
            increasing={"marker": {"color": "#d9534f"}},
            decreasing={"marker": {"color": "#3fa796"}},
            totals={"marker": {"color": GREY}},
            connector={"line": {"color": GREY, "width": 1}},
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
    )
    levels, at = [first, last], first
    for step in steps:
        at += step["difference_ms"]
        levels.append(at)
    figure.update_layout(template=theme(), height=110 + ROW_PX * len(names), showlegend=False)
    figure.update_xaxes(title_text="sum of layers (ms)", range=[0, 1.2 * max(levels)])
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], showgrid=False)
    return figure


def site_dumbbells(differences: pd.DataFrame, a: str, b: str, top: int = 12) -> go.Figure:
    """Parts of a network that changed most, all blocks together: time in one engine and in the other.

    Args:
        differences: from `difference_by(matched, "site")`: site, time_a_ms, time_b_ms, difference_ms.
        a, b: names of the two engines.
        top: number of rows shown.
    """
    needs(differences, "site_dumbbells", "site", "time_a_ms", "time_b_ms", "difference_ms")
    rows = differences.head(top).to_dict(orient="records")
    names = [_short(row["site"], 48) or "no module" for row in rows]
    figure = go.Figure()
    for name, row in zip(names, rows, strict=True):
        figure.add_scatter(
            x=[row["time_a_ms"], row["time_b_ms"]], y=[name, name], mode="lines", showlegend=False, hoverinfo="skip",
            line={"color": "#d9534f" if row["difference_ms"] > 0 else "#3fa796", "width": 3},
        )  # fmt: skip
    for engine, column, symbol in ((a, "time_a_ms", "circle-open"), (b, "time_b_ms", "circle")):
        figure.add_scatter(
            x=[row[column] for row in rows], y=names, mode="markers", name=engine,
            marker={"symbol": symbol, "size": 10, "color": GREY if column == "time_a_ms" else "#3d85c6"},
            hovertemplate="%{y}: %{x:,.3f} ms<extra>" + engine + "</extra>",
        )  # fmt: skip
    figure.update_layout(template=theme(), height=130 + 26 * max(len(rows), 1), margin={"t": 40})
    figure.update_xaxes(title_text="time (ms)", rangemode="tozero")
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], tickfont={"size": 11})
    return figure


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _parts(module: str) -> tuple[str, ...]:
    """`blocks.7.attn1.to_q` -> ("blocks.7", "attn1", "to_q"): a number stays with what it counts."""
    parts: list[str] = []
    for part in module.split(".") if module else ["no module"]:
        if part.isdigit() and parts:
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return tuple(parts)


def _common(paths: list[tuple[str, ...]]) -> tuple[str, ...]:
    shared = paths[0]
    for path in paths[1:]:
        same = [one == other for one, other in zip(shared, path, strict=False)]
        shared = shared[: same.index(False) if False in same else len(same)]
    return shared or ("several modules",)


def _widest_first(precisions: Any) -> list[str]:
    known = [name for name in FORMAT_COLOURS if name in set(precisions)]
    return [*known, *sorted(set(precisions) - set(known))]


def _signed(step: dict[str, Any]) -> str:
    noise = step["noise_ms"]
    return f"{step['difference_ms']:+,.2f}" + (f" ± {noise:,.2f} ms" if noise == noise else " ms")


def _ms(time_ms: float) -> str:
    return f"{time_ms / 1e3:,.2f} s" if time_ms >= 1e4 else f"{time_ms:,.2f} ms"


SMALLEST_PERCENT = 1e-6  # where a distance of 0 stands on a logarithmic axis


def distance_rows(parity: pd.DataFrame, tolerance: float) -> go.Figure:
    """Largest distance of each component to PyTorch over all inputs, on one logarithmic axis with what is allowed.

    Args:
        parity: from `engines.parity_all`; columns component and relative_l2.
        tolerance: largest relative L2 distance that counts as agreement.
    """
    needs(parity, "distance_rows", "component", "relative_l2")
    worst = parity.groupby("component", sort=False)["relative_l2"].max().sort_values(ascending=False)
    table = pd.DataFrame({
        "name": [NAMES.get(name, str(name)) for name in worst.index],
        "value": [max(100 * float(value), SMALLEST_PERCENT) for value in worst],
        "component": list(worst.index),
    })  # fmt: skip
    return interval_rows(
        table,
        tint="component",
        axis="largest distance to PyTorch (%)",
        form="",
        unit="%",
        limit=100 * tolerance,
        log=True,
    )


def build_bars(df: pd.DataFrame) -> go.Figure:
    """Two panels with the same rows: time of each build, and size of each engine with a mark for its ONNX graph.

    Args:
        df: columns component, numbers, build_ms, size_mib, onnx_mib; from `engines.EngineBuilds.frame`.
    """
    needs(df, "build_bars", "component", "numbers", "build_ms", "size_mib", "onnx_mib")
    rows = df.to_dict(orient="records")
    labels = [
        name_lines(f"{NAMES.get(row['component'], row['component'])}, {row['numbers']}") for row in rows
    ]
    colours = [colour(format_of(row["numbers"])) for row in rows]
    figure = make_subplots(
        rows=1,
        cols=2,
        shared_yaxes=True,
        horizontal_spacing=0.06,
        subplot_titles=["build time (s)", "size (MiB)"],
    )
    seconds = [row["build_ms"] / 1e3 for row in rows]
    sizes = [row["size_mib"] for row in rows]
    onnx = [row["onnx_mib"] for row in rows]
    for column, values in ((1, seconds), (2, sizes)):
        figure.add_bar(
            x=values,
            y=labels,
            orientation="h",
            marker={"color": colours},
            text=[number_text(value) for value in values],
            textposition="outside",
            cliponaxis=False,
            showlegend=False,
            hovertemplate="%{y}<br>%{text}<extra></extra>",
            row=1,
            col=column,
        )
    figure.add_scatter(
        x=onnx,
        y=labels,
        mode="markers",
        name="its ONNX graph",
        marker={"symbol": "diamond", "size": 11, "color": GREY, "line": {"width": 1.5, "color": "white"}},
        hovertemplate="ONNX graph %{x:,.3g} MiB<extra></extra>",
        row=1,
        col=2,
    )
    figure.update_layout(
        template=theme(),
        height=120 + ROW_PX * max(len(rows), 1),
        margin={"t": 40, "r": 30},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": -0.12, "yanchor": "top"},
    )
    # Space for the numbers right of the longest bars.
    figure.update_xaxes(range=[0, max(seconds, default=1.0) * 1.25], row=1, col=1)
    figure.update_xaxes(range=[0, max(sizes + onnx, default=1.0) * 1.25], row=1, col=2)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def format_of(numbers: str) -> str:
    """Format that gives a row its colour: the quantised one where there is one, else the graph's dtype."""
    last = numbers.split(", ")[-1].split(" x ")[-1]
    return element_name(last) or last.removesuffix("-channel").removesuffix("-weight")


def platform_bars(df: pd.DataFrame) -> go.Figure:
    """Latency per machine and engine on one logarithmic axis, each with its interval; what did not run is left out.

    The interval is that of the ratio to eager on the same machine, as a time.

    Args:
        df: columns machine, engine, precision, state, latency_ms and ratio_to_eager, low and high where known; from
            `runs.platform_table`.
    """
    needs(df, "platform_bars", "machine", "engine", "precision", "state", "latency_ms", "ratio_to_eager")
    rows = df[df["latency_ms"].notna()].to_dict(orient="records")
    eager = [row["latency_ms"] * row["ratio_to_eager"] for row in rows]
    table = pd.DataFrame({
        "name": [f"{engine_text(row['engine'])} {row['precision']}" for row in rows],
        "engine": [row["engine"] for row in rows],
        "value": [row["latency_ms"] for row in rows],
        "low": [base / row.get("high", math.nan) for base, row in zip(eager, rows, strict=True)],
        "high": [base / row.get("low", math.nan) for base, row in zip(eager, rows, strict=True)],
        "note": [_platform_text(row) for row in rows],
    })  # fmt: skip
    axis = "latency (ms), logarithmic axis"
    return interval_rows(table, tint="engine", note="note", axis=axis, form="", unit="ms", log=True)


def _platform_text(row: dict) -> str:
    ratio = row["ratio_to_eager"]
    if row["engine"] == "eager" or ratio != ratio:
        return str(row["machine"])
    ends = f" ({ends_text(row.get('low'), row.get('high'))})" if "low" in row else ""
    return f"{ratio:.2f}× eager{ends}, {row['machine']}"


KIND_COLOURS = {
    "linear": "#3d85c6",
    "attention": "#e07b39",
    "pointwise": "#3fa796",
    "transfer": "#b0679b",
    "allocation": "#8b7ec8",
    "other": GREY,
}
KIND_NAMES = {
    "linear": "matrix products",
    "attention": "attention",
    "pointwise": "elementwise, norms, copies",
    "transfer": "transfers",
    "allocation": "allocation",
    "other": "other",
}


def component_bars(df: pd.DataFrame) -> go.Figure:
    """Median time of a call by each candidate with its interval, the roofline and Amdahl's bound as marks.

    The interval is that of the ratio to the baseline, as a time.

    Args:
        df: columns candidate, time_ms, speedup, verdict and, where known, low, high (of the speed-up), roofline_ms and
            bound_speedup, the baseline first; from `ComponentCost.table`.
    """
    needs(df, "component_bars", "candidate", "time_ms", "speedup", "verdict")
    rows, first = df.head(MOST_ROWS).to_dict("records"), float(df["time_ms"].iloc[0])
    table = pd.DataFrame({
        "name": [_candidate_name(row["candidate"]) for row in rows],
        "candidate": [row["candidate"] for row in rows],
        "value": [row["time_ms"] for row in rows],
        "low": [first / row["high"] if row.get("high") else math.nan for row in rows],
        "high": [first / row["low"] if row.get("low") else math.nan for row in rows],
        "note": [_candidate_text(row) for row in rows],
    })  # fmt: skip
    figure = interval_rows(
        table, tint="candidate", note="note", axis="time of a call (ms), median", form="", unit="ms"
    )
    marks = {"roofline": ("roofline_ms", "line-ns-open", lambda value: value)}
    marks["Amdahl's bound of the plan"] = ("bound_speedup", "diamond-open", lambda value: first / value)
    for name, (column, symbol, time_of) in marks.items():
        known = [
            (place, row[column])
            for place, row in enumerate(rows)
            if row.get(column, math.nan) == row.get(column)
        ]
        known = [(place, value) for place, value in known if value is not None]
        if known:
            figure.add_scatter(
                x=[time_of(value) for _, value in known],
                y=[place for place, _ in known],
                mode="markers",
                name=name,
                showlegend=True,
                marker={"symbol": symbol, "size": 11, "color": "#d9534f", "line": {"width": 2}},
                hovertemplate="%{x:,.3g} ms<extra>%{fullData.name}</extra>",
            )
            figure.update_layout(showlegend=True, margin={"t": 50})
    figure.update_traces(showlegend=False, selector=lambda trace: trace.name is None)
    figure.update_xaxes(rangemode="tozero")
    return figure


def _candidate_name(label: str) -> str:
    """A candidate for readers: its engine's name, and what follows it."""
    engine, space, more = label.partition(" ")
    return f"{engine_text(engine)}{space}{more}"


def _candidate_text(row: dict) -> str:
    if row["verdict"] == "baseline" or row["speedup"] != row["speedup"]:
        return str(row["verdict"])
    ends = f" ({ends_text(row.get('low'), row.get('high'))})" if "low" in row else ""
    return f"{row['speedup']:.2f}×{ends}, {row['verdict']}"


def kernel_kind_bars(df: pd.DataFrame) -> go.Figure:
    """Time in kernels by kind, one stacked bar per candidate.

    Args:
        df: columns candidate, kind, time_ms; from `ComponentCost.kinds`.

    Raises:
        WanlabError: no candidate reports its kernels.
    """
    needs(df, "kernel_kind_bars", "candidate", "kind", "time_ms")
    if not len(df):
        raise WanlabError("none of these candidates reports its kernels, so there is nothing to draw")
    names = list(dict.fromkeys(df["candidate"]))
    figure = go.Figure()
    for kind, tint in KIND_COLOURS.items():
        own = df[df["kind"] == kind].set_index("candidate")["time_ms"]
        if len(own):
            figure.add_bar(
                x=[float(own.get(name, 0.0)) for name in names],
                y=names,
                orientation="h",
                name=KIND_NAMES[kind],
                marker={"color": tint},
                hovertemplate="%{y}, %{fullData.name}: %{x:,.3f} ms<extra></extra>",
            )
    figure.update_layout(
        template=theme(), barmode="stack", height=120 + ROW_PX * len(names), margin={"t": 40}
    )
    figure.update_xaxes(title_text="time in kernels under the profiler (ms)")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def component_memory_bars(df: pd.DataFrame) -> go.Figure:
    """Memory of each candidate: its weights, and what a call adds at its peak.

    Args:
        df: columns candidate, weights_gib, peak_memory_gib (None where it is not known); from `ComponentCost.table`.
    """
    needs(df, "component_memory_bars", "candidate", "weights_gib", "peak_memory_gib")
    names = df["candidate"].tolist()
    weights = df["weights_gib"].astype(float)
    peak = df["peak_memory_gib"].astype(float)
    parts = {"weights": weights, "added at the peak of a call": (peak - weights).clip(lower=0).fillna(0)}
    figure = go.Figure()
    for (name, values), tint in zip(parts.items(), ("#3d85c6", "#e8a33d"), strict=True):
        figure.add_bar(
            x=values.tolist(),
            y=names,
            orientation="h",
            name=name,
            marker={"color": tint},
            hovertemplate="%{y}, %{fullData.name}: %{x:,.3f} GiB<extra></extra>",
        )
    tops = peak.where(peak > weights, weights)
    for name, top, known in zip(names, tops, peak, strict=True):
        text = f"{top:,.3g} GiB" if known == known else f"{top:,.3g} GiB of weights; peak not known"
        figure.add_annotation(x=top, y=name, text=text, xanchor="left", xshift=4, showarrow=False)
    figure.update_layout(
        template=theme(), barmode="stack", height=110 + ROW_PX * len(names), margin={"t": 40}
    )
    figure.update_xaxes(title_text=label("memory_gib"), range=[0, 1.45 * float(tops.max()) or 1.0])
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure
