"""An engine's layers by what they serve, and two engines laid over one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wanlab.plots.style import FORMAT_COLOURS, GREY, ROW_PX, colour, needs, theme

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

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
    """Time by role, divided by number format; the number of layers where nothing was timed.

    Args:
        layers: `EngineLayers.frame`; columns role, precision, time_ms.
    """
    import plotly.graph_objects as go

    needs(layers, "role_bars", "role", "precision", "time_ms")
    timed = bool(layers["time_ms"].notna().any())
    table = layers.assign(value=layers["time_ms"].fillna(0.0) if timed else 1.0)
    totals = table.groupby("role")["value"].sum().sort_values(ascending=False)
    whole = float(totals.sum()) or 1.0
    order = [role for role in totals.index if totals[role] > 0] or list(totals.index)
    figure = go.Figure()
    for precision in _widest_first(table["precision"].unique()):
        mine = table[table["precision"] == precision].groupby("role")["value"].agg(["sum", "size"])
        mine = mine.reindex(order).dropna()
        figure.add_bar(
            x=mine["sum"].tolist(),
            y=[ROLE_NAMES.get(role, role) for role in mine.index],
            orientation="h",
            name=str(precision).upper() if precision in FORMAT_COLOURS else precision or "unknown",
            marker={"color": colour(precision) if precision in FORMAT_COLOURS else UNKNOWN},
            customdata=mine["size"].astype(int).tolist(),
            hovertemplate="%{y}, %{fullData.name}: %{x:,.3f}"
            + (" ms" if timed else "")
            + ", %{customdata} layers<extra></extra>",
        )
    for role in order:
        amount = _ms(totals[role]) if timed else f"{totals[role]:,.0f}"
        figure.add_annotation(
            x=totals[role], y=ROLE_NAMES.get(role, role), text=f"{amount} · {100 * totals[role] / whole:.1f} %",
            xanchor="left", xshift=4, showarrow=False,
        )  # fmt: skip
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
    """Modules as areas, nested as their names are, in the colour of their role.

    An area is time; without times bytes of outputs, or layers where those are not known.

    Args:
        layers: `EngineLayers.frame`; columns modules, role, time_ms, activation_bytes. A layer of several modules lies in
            what their names share.
    """
    import plotly.graph_objects as go

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
            held = roles.setdefault(path[:depth], {})
            held[role] = held.get(role, 0.0) + float(value)
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
        differences: as `difference_by(matched, "role")` gives: role, time_a_ms, time_b_ms, difference_ms, noise_ms.
        a, b: names of the two.
    """
    import plotly.graph_objects as go

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
    """The parts of a network that changed most, blocks together: time in one engine and in the other.

    Args:
        differences: as `difference_by(matched, "site")` gives: site, time_a_ms, time_b_ms, difference_ms. a, b: names of
            the two. top: rows shown.
    """
    import plotly.graph_objects as go

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
