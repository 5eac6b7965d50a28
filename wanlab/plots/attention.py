"""Figures of attention: statistics of heads, time of layers, rate of kernels."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.diagnose.attention.cost import LOOKS
from wanlab.plots.bars import name_lines
from wanlab.plots.style import GREY, NAMES, ROW_PX, colour, label, needs, theme

TYPE_COLOURS = {"spatial": "#3d85c6", "temporal": "#3fa796", "global": "#9aa3ad"}
STATISTICS = {
    "entropy_nats": "entropy (nats)",
    "density90_percent": "keys for 90 % of the mass (%)",
    "density95_percent": "keys for 95 % of the mass (%)",
    "density99_percent": "keys for 99 % of the mass (%)",
    "block_density95_percent": "blocks of keys for 95 % of the mass (%)",
    "own_frame_percent": "mass on the query's own frame (%)",
    "other_frames_percent": "mass on other frames (%)",
    "first_frame_percent": "mass on the first frame (%)",
    "same_position_percent": "mass on the same position in other frames (%)",
    "near_position_percent": "mass near the position, in all frames (%)",
    "within1_frames_percent": "mass within 1 latent frame (%)",
    "within2_frames_percent": "mass within 2 latent frames (%)",
    "within4_frames_percent": "mass within 4 latent frames (%)",
    "text_percent": "mass on the text, of that on video and text (%)",
    "prompt_percent": "mass on the words of the prompt (%)",
    "padding_percent": "mass on padding (%)",
    "type": "type",
}

REASON_LETTERS = 30
"""Letters of a line of the reason why a kernel has no bar."""
CELLS = 12
"""Heads and layers up to which the cells of a map have room for their figures."""

LEAST_PX = 130  # of a map with few heads: the ticks of its scale of colours need them


def head_ranking(skippable: Any) -> go.Figure:
    """Every head as a dot, those that need the fewest keys first, in the colour of what it looks at; the line is the share
    of keys that half of the heads need at most.

    Args:
        skippable: `diagnose.Skippable`.
    """
    table = skippable.table.assign(place=range(1, len(skippable.table) + 1))
    half = float(table["density_percent"].median())
    figure = go.Figure()
    for name, tint in TYPE_COLOURS.items():
        rows = table[table["type"] == name]
        figure.add_scatter(
            x=rows["place"].tolist(),
            y=rows["density_percent"].tolist(),
            mode="markers",
            marker={"color": tint, "size": 9},
            name=f"{LOOKS[name]}: {100 * len(rows) / len(table):.0f} %",
            customdata=[
                [NAMES.get(row.component, row.component), row.layer, row.head] for row in rows.itertuples()
            ],
            hovertemplate="%{customdata[0]}, layer %{customdata[1]}, head %{customdata[2]}: %{y:.1f} % of the keys"
            "<extra>%{fullData.name}</extra>",
        )
    figure.add_hline(half, line={"dash": "dash", "color": GREY, "width": 1})
    text = f"half of the heads need at most {half:.0f} %"
    figure.add_annotation(x=1, y=half, text=text, showarrow=False, xanchor="left", yanchor="bottom")
    figure.update_layout(template=theme(), height=340, margin={"t": 30}, legend={"y": 1.04})
    figure.update_xaxes(title_text="heads, fewest keys first", range=[0.4, len(table) + 0.6])
    share = f"keys for {skippable.level_percent} % of the attention (%)"
    figure.update_yaxes(title_text=share, range=[0, 102])
    return figure


def head_map(
    attention_map: Any, statistic: str = "density95_percent", *, kind: str = "self", branch: str = "cond"
) -> go.Figure:
    """A statistic of every head of every layer at one denoising step; a slider selects the step.

    Args:
        attention_map: `diagnose.AttentionMap`.
        statistic: a column of its frame, or "type".
        kind: "self" or "cross".
        branch: "cond" or "uncond".

    Raises:
        WanlabError: the map has no such statistic, or nothing of this kind and branch.
    """
    rows = attention_map.of(kind, branch)
    if statistic not in rows or rows[statistic].isna().all():
        known = [name for name in STATISTICS if name in rows and rows[name].notna().any()]
        raise WanlabError(
            f"no {statistic!r} of {kind}-attention, branch {branch}{did_you_mean(statistic, known)};"
            f" there are {', '.join(known) or 'none'}"
        )
    types = statistic == "type"
    names = list(TYPE_COLOURS)
    values = rows[statistic].map(names.index) if types else rows[statistic]
    heads, layers = sorted(rows["head"].unique()), sorted(rows["layer"].unique())
    shown = STATISTICS.get(statistic, label(statistic))
    scale = (
        {
            "colorscale": [[at / 3, TYPE_COLOURS[names[int(at - place)]]] for at, place in _edges()],
            "zmin": -0.5,
            "zmax": 2.5,
            "colorbar": {"tickvals": [0, 1, 2], "ticktext": names, "thickness": 12},
        }
        if types
        else {
            "colorscale": "Viridis",
            "zmin": 0.0 if statistic.endswith("_percent") else float(values.min()),
            "zmax": float(values.max()),
            "colorbar": {
                "title": {"text": "%" if statistic.endswith("_percent") else "nats"},
                "thickness": 12,
            },
        }
    )
    figure, marks = go.Figure(), []
    places = rows[["step", "component"]].drop_duplicates().sort_values("step").itertuples(index=False)
    for number, (step, component) in enumerate(places):
        step_rows = rows[(rows["step"] == step) & (rows["component"] == component)].assign(value=values)
        table = step_rows.pivot_table("value", "head", "layer").reindex(index=heads, columns=layers)
        texts = [[_cell(value, names if types else None) for value in line] for line in table.to_numpy()]
        figure.add_heatmap(
            x=[int(n) for n in layers],
            y=[int(n) for n in heads],
            z=table.to_numpy().tolist(),
            text=texts,
            texttemplate="%{text}" if max(len(heads), len(layers)) <= CELLS and not types else None,
            xgap=1,
            ygap=1,
            visible=number == 0,
            hovertemplate="layer %{x}, head %{y}: %{text}<extra></extra>",
            **scale,
        )
        step_name = f"step {step + 1}, {NAMES.get(component, component)}"
        marks.append((str(step + 1), f"{shown}:<br>{step_name}", component))
    figure.update_layout(
        template=theme(),
        height=190 + max((26 if len(heads) < 12 else 12) * len(heads), LEAST_PX),
        margin={"t": 56, "b": 10},
        title={"text": marks[0][1], "font": {"size": 14, "color": colour(marks[0][2])}},
        title_x=0.01,
        title_y=1.0,
        title_yref="paper",
        title_yanchor="bottom",
        title_pad={"b": 8},
    )
    figure.update_xaxes(
        title_text="layer", showgrid=False, zeroline=False, dtick=1 if len(layers) < 16 else 5
    )
    figure.update_yaxes(title_text="head", showgrid=False, zeroline=False, dtick=1 if len(heads) < 12 else 5)
    if len(marks) > 1:
        steps = [
            {
                "label": step,
                "method": "update",
                "args": [
                    {"visible": [other == number for other in range(len(marks))]},
                    {"title.text": title, "title.font.color": colour(component)},
                ],
            }
            for number, (step, title, component) in enumerate(marks)
        ]
        figure.update_layout(
            sliders=[
                {"steps": steps, "currentvalue": {"prefix": "denoising step "}, "pad": {"t": 45, "b": 5}}
            ]
        )
    return figure


def locality_dots(locality: Any, statistic: str = "within1_frames_percent") -> go.Figure:
    """Every head as a dot with its 95 % interval over cases, most local first; the dashed line is where a head is local.

    Args:
        locality: `diagnose.Locality`.
        statistic: one of its statistics, a mass in percent.
    """
    stem = statistic.removesuffix("_percent")
    figure = go.Figure()
    for component, rows in locality.heads.groupby("component", sort=False):
        ordered = rows.sort_values(statistic, ascending=False, kind="stable")
        mean, low, high = (
            ordered[name] for name in (statistic, f"{stem}_low_percent", f"{stem}_high_percent")
        )
        figure.add_scatter(
            x=list(range(1, len(ordered) + 1)),
            y=mean,
            error_y={"array": high - mean, "arrayminus": mean - low, "thickness": 1, "width": 2},
            mode="markers",
            marker={"color": colour(str(component))},
            name=NAMES.get(str(component), str(component)),
            customdata=ordered[["layer", "head"]],
            hovertemplate="layer %{customdata[0]}, head %{customdata[1]}: %{y:.1f} %<extra></extra>",
        )
    figure.add_hline(locality.local_percent, line={"dash": "dash", "color": GREY, "width": 1})
    figure.update_layout(
        template=theme(),
        height=340,
        xaxis={"title": "heads, most local first", "dtick": 4},
        yaxis={"title": STATISTICS[statistic], "range": [0, 102]},
    )
    return figure


def text_map(attention_map: Any, *, branch: str = "cond") -> go.Figure:
    """How much every head looks at the text, as `head_map`: its mass on the text in joint attention; else, of text with a
    softmax of its own, the mass on the words of the prompt, or the entropy where a mask leaves nothing but these.

    Args:
        attention_map: `diagnose.AttentionMap`.
        branch: "cond" or "uncond".

    Raises:
        WanlabError: the map has nothing of text in this branch.
    """
    if "text_percent" in attention_map.frame:
        return head_map(attention_map, "text_percent", branch=branch)
    # With all mass on the words, and rounding, the figure would be one colour.
    words = attention_map.of("cross", branch)["prompt_percent"].min()
    statistic = "prompt_percent" if words < 99.99 else "entropy_nats"
    return head_map(attention_map, statistic, kind="cross", branch=branch)


def head_type_bars(attention_map: Any, *, branch: str = "cond") -> go.Figure:
    """Share of head types among the self-attention heads at each denoising step, grouped by expert.

    Args:
        attention_map: `diagnose.AttentionMap`.
        branch: "cond" or "uncond".
    """
    table = attention_map.types()
    table = table[table["branch"] == branch]
    if table.empty:
        raise WanlabError(f"the map has no branch {branch!r}")
    experts = [NAMES.get(name, name) for name in table["component"]]
    figure = go.Figure()
    for name, tint in TYPE_COLOURS.items():
        shares = table[f"{name}_percent"].tolist()
        figure.add_bar(
            x=[experts, [str(step + 1) for step in table["step"]]],
            y=shares,
            name=LOOKS[name],
            marker={"color": tint},
            text=[f"{share:.0f}" if share >= 8 else "" for share in shares],
            textposition="inside",
            insidetextanchor="middle",
            hovertemplate=f"%{{x}}: %{{y:.1f}} % {LOOKS[name]}<extra></extra>",
        )
    figure.update_layout(template=theme(), barmode="stack", height=300, margin={"t": 40})
    figure.update_xaxes(title_text="denoising step")
    figure.update_yaxes(title_text="heads (%)", range=[0, 100])
    return figure


def layer_time_lines(table: pd.DataFrame) -> go.Figure:
    """Median time of each layer's attention per expert; error bars are the shortest and the longest sample. Joint attention
    of video and text is one kernel.

    Args:
        table: from `diagnose.layer_times`.
    """
    needs(table, "layer_time_lines", "component", "kind", "layer", "median_ms", "min_ms", "max_ms")
    kinds = list(dict.fromkeys(table["kind"]))
    figure = make_subplots(
        rows=1,
        cols=len(kinds),
        subplot_titles=[_title(table, kind) for kind in kinds],
        horizontal_spacing=0.09,
    )
    for column, kind in enumerate(kinds, 1):
        for component in table["component"].unique():
            rows = table[(table["kind"] == kind) & (table["component"] == component)].sort_values("layer")
            figure.add_scatter(
                x=[int(n) for n in rows["layer"]],
                y=rows["median_ms"].tolist(),
                mode="lines+markers",
                name=NAMES.get(component, component),
                legendgroup=component,
                showlegend=column == 1,
                line={"color": colour(component), "width": 2},
                marker={"size": 5},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": (rows["max_ms"] - rows["median_ms"]).tolist(),
                    "arrayminus": (rows["median_ms"] - rows["min_ms"]).tolist(),
                    "thickness": 1,
                    "width": 0,
                },
                hovertemplate="layer %{x}: %{y:.4g} ms<extra>%{fullData.name}</extra>",
                row=1,
                col=column,
            )
    figure.update_layout(template=theme(), height=300, margin={"t": 60}, legend={"y": 1.14})
    figure.update_xaxes(title_text="layer")
    for column, kind in enumerate(kinds, 1):
        longest = float(table.loc[table["kind"] == kind, "max_ms"].max())
        figure.update_yaxes(range=[0, 1.08 * longest or 1], row=1, col=column)
    figure.update_yaxes(title_text="time (ms)", col=1)
    figure.update_annotations(font={"size": 13})
    return figure


def kernel_bars(kernels: Any) -> go.Figure:
    """Rate and time of every attention kernel; for one that cannot run, the reason. The line is the device's ceiling.

    Args:
        kernels: `diagnose.AttentionKernels`.
    """
    table = kernels.table
    ran = table[table["time_ms"].notna()]
    figure = go.Figure(
        go.Bar(
            x=ran["tflop_per_s"].tolist(),
            y=ran["kernel"].tolist(),
            orientation="h",
            marker={"color": [_kernel_colour(full) for full in ran["density_percent"]]},
            text=[_bar_text(row) for row in ran.to_dict(orient="records")],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.4g} TFLOP/s<br>%{text}<extra></extra>",
        )
    )
    for row in table[table["time_ms"].isna()].itertuples():
        reason = name_lines(str(row.reason), REASON_LETTERS)
        figure.add_annotation(
            x=0,
            y=row.kernel,
            text=reason,
            xanchor="left",
            align="left",
            showarrow=False,
            font={"color": GREY},
        )
    ceiling = table["ceiling_tflop_per_s"].iloc[0]
    top = max([float(ran["tflop_per_s"].max()), *([float(ceiling)] if ceiling == ceiling else [])])
    if ceiling == ceiling:
        figure.add_vline(x=float(ceiling), layer="below", line={"color": GREY, "dash": "dash", "width": 1})
        figure.add_annotation(
            x=float(ceiling),
            y=1,
            yref="paper",
            text=f"matrix product: {ceiling:.3g} TFLOP/s",
            showarrow=False,
            xanchor="right" if float(ceiling) > 0.5 * top else "left",
            yanchor="bottom",
        )
    figure.update_layout(
        template=theme(), height=100 + ROW_PX * len(table), showlegend=False, margin={"t": 30}
    )
    figure.update_xaxes(title_text="TFLOP/s of the pairs that are computed", range=[0, 1.45 * top])
    figure.update_yaxes(
        categoryorder="array", categoryarray=table["kernel"].tolist()[::-1], showgrid=False, range=[-0.6, len(table) - 0.4]
    )  # fmt: skip
    return figure


def _kernel_colour(density_percent: float) -> str:
    return colour("eager") if density_percent == 100 else TYPE_COLOURS["spatial"]


def _bar_text(row: dict[str, Any]) -> str:
    part = "" if row["density_percent"] == 100 else f", {row['density_percent']:.0f} % of the pairs"
    ratio = "" if row["verdict"] == "baseline" else f" · {row['speedup']:.2f}×"
    return f"{row['time_ms']:,.3g} ms{ratio}{part}"


def _title(layers: pd.DataFrame, kind: str) -> str:
    joint = "joint" in layers and layers.loc[layers["kind"] == kind, "joint"].all()
    return "joint attention of video and text" if joint else f"{kind}-attention"


def _edges() -> list[tuple[int, int]]:
    """Ends of the three flat parts of a colour scale: (end in thirds, step back to the part's colour)."""
    return [(0, 0), (1, 1), (1, 0), (2, 1), (2, 0), (3, 1)]


def _cell(value: float, names: list[str] | None) -> str:
    if value != value:
        return "not measured"
    return names[int(value)] if names else f"{value:.3g}"
