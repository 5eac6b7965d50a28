"""Experts: when each runs, what flows between them, what a switch and a moved boundary cost, how far they disagree."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.plots.style import GREY, LINE, NAMES, ROW_PX, colour, theme

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Where nodes stand, in a picture of 1000 x 540; y grows upwards.
_WAY_NAMES = {
    "resident": "both resident",
    "pageable": "from pageable memory",
    "pinned": "from pinned memory",
    "prefetched": "prefetched",
}


def expert_steps(timeline: Any) -> go.Figure:
    """Noise, signal-to-noise ratio and measured time of every step in the colour of its expert, and the boundary.

    Args:
        timeline: as `diagnose.timeline` gives it.
    """
    from plotly.subplots import make_subplots

    steps, schedule = timeline.steps, timeline.schedule
    branches = [name for name in ("cond_ms", "uncond_ms") if name in steps]
    figure = make_subplots(
        rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.3, 0.3, 0.4]
    )
    for name, part in steps.groupby("component", sort=False):
        style = {"name": NAMES.get(name, name), "legendgroup": name}
        facts = part[["timestep", "sigma", "snr", "time_ms"]].to_numpy().tolist()
        for row, column in ((1, "sigma"), (2, "snr")):
            figure.add_scatter(
                x=part["step"].tolist(),
                y=part[column].tolist(),
                mode="markers",
                marker={"color": colour(name), "size": 9},
                customdata=facts,
                hovertemplate="step %{x}, timestep %{customdata[0]:.0f}<br>sigma %{customdata[1]:.4f}, SNR"
                " %{customdata[2]:.3g}<br>%{customdata[3]:,.1f} ms<extra>%{fullData.name}</extra>",
                showlegend=row == 1,
                row=row,
                col=1,
                **style,
            )
        for index, branch in enumerate(branches):
            said = {"cond_ms": "with the prompt", "uncond_ms": "without the prompt"}[branch]
            figure.add_bar(
                x=part["step"].tolist(),
                y=part[branch].tolist(),
                marker={"color": colour(name), "opacity": 0.95 - 0.4 * index},
                hovertemplate=f"step %{{x}}, {said}: %{{y:,.1f}} ms<extra>%{{fullData.name}}</extra>",
                showlegend=False,
                row=3,
                col=1,
                **style,
            )
    for row, column in ((1, "sigma"), (2, "snr")):
        line = {
            "x": steps["step"].tolist(),
            "y": steps[column].tolist(),
            "mode": "lines",
            "line": {"color": LINE},
        }
        figure.add_scatter(**line, hoverinfo="skip", showlegend=False, row=row, col=1)
    for step in schedule.switches:
        figure.add_vline(x=step - 0.5, line={"color": GREY, "dash": "dot", "width": 1.5})
    if schedule.boundary_ratio is not None:
        figure.add_hline(
            y=schedule.boundary_ratio, line={"color": GREY, "dash": "dash", "width": 1}, row=1, col=1
        )
        figure.add_annotation(
            x=0,
            y=schedule.boundary_ratio,
            xref="x domain",
            yref="y",
            text=f"boundary: timestep {schedule.boundary_timestep:g}",
            showarrow=False,
            xanchor="left",
            yanchor="top",
            xshift=4,
        )
    # Pure noise has a ratio near zero, which would press all others together.
    seen = steps[steps["snr"] >= 1e-6]["snr"]
    span = [math.log10(seen.min()) - 0.4, math.log10(seen.max()) + 0.4] if len(seen) else None
    for step, snr in steps.loc[steps["snr"] < 1e-6, ["step", "snr"]].to_numpy().tolist():
        figure.add_annotation(
            x=step, y=0, xref="x", yref="y2 domain", text=f"{snr:.0e} ↓", showarrow=False, yanchor="bottom"
        )
    figure.update_layout(template=theme(), height=560, barmode="stack", bargap=0.15)
    figure.update_yaxes(title_text="sigma", range=[0, 1.06], row=1, col=1)
    figure.update_yaxes(title_text="SNR", type="log", exponentformat="e", dtick=1, range=span, row=2, col=1)
    figure.update_yaxes(title_text="time per step (ms)", rangemode="tozero", row=3, col=1)
    figure.update_xaxes(title_text="denoising step", row=3, col=1)
    return figure


def disagreement_curve(found: Any) -> go.Figure:
    """Distance of the two experts' predictions at each step, beside what is no difference at all.

    Args:
        found: as `diagnose.disagreement` gives it.
    """
    import plotly.graph_objects as go

    steps = found.steps
    figure = go.Figure()
    for name, part in steps.groupby("component", sort=False):
        figure.add_scatter(
            x=part["timestep"].tolist(),
            y=part["relative_l2"].tolist(),
            mode="markers",
            name=f"{NAMES.get(name, name)}'s turn",
            marker={"color": colour(name), "size": 10},
            customdata=part[["step", "sigma", "cosine"]].to_numpy().tolist(),
            hovertemplate="step %{customdata[0]}, timestep %{x:.0f}, sigma %{customdata[1]:.3f}<br>relative L2 %{y:.4f},"
            " cosine %{customdata[2]:.4f}<extra>%{fullData.name}</extra>",
        )
    line = {"color": LINE, "width": 1.5}
    figure.add_scatter(
        x=steps["timestep"].tolist(), y=steps["relative_l2"].tolist(), mode="lines", line=line, showlegend=False,
        hoverinfo="skip",
    )  # fmt: skip
    floors = {
        "kernel_l2": f"floor: {found.kernel.replace('_', ' ')} kernel",
        "again_l2": "floor: the same again",
    }
    for column, said in floors.items():
        values = steps[column].where(steps[column] > 0)
        figure.add_scatter(
            x=steps["timestep"].tolist(),
            y=[None if value != value else value for value in values],
            mode="lines+markers",
            name=said if values.notna().any() else f"{said} (equal to the last bit)",
            line={"color": GREY, "dash": "dot" if column == "again_l2" else "dash", "width": 1.5},
            marker={"color": GREY, "size": 5},
            hovertemplate="timestep %{x:.0f}: %{y:.3g}<extra>%{fullData.name}</extra>",
        )
    figure.add_vline(
        x=found.boundary_timestep,
        line={"color": GREY, "dash": "dot", "width": 1.5},
        annotation_text=f"boundary {found.boundary_timestep:g}",
        annotation_position="top left",
    )
    figure.update_layout(template=theme(), height=380)
    figure.update_xaxes(title_text="timestep (noise falls to the right)", autorange="reversed")
    figure.update_yaxes(title_text="relative L2 distance", type="log", exponentformat="e")
    return figure


def boundary_curves(sweep: Any) -> go.Figure:
    """Time of the experts, and where it was scored LPIPS, over the boundary; every case as a dot.

    Args:
        sweep: as `diagnose.boundary_sweep` gives it.
    """
    from plotly.subplots import make_subplots

    videos = sweep.videos[~sweep.videos["control"]]
    panels = [("denoising_ms", "experts' time per video (ms)")]
    if "lpips" in videos:
        panels.append(("lpips", "LPIPS to the truth"))
    names = [
        f"{b:g}<br>{int(h)} + {int(n)}"
        for b, h, n in sweep.frame[["boundary", "high_steps", "low_steps"]].to_numpy()
    ]
    named = dict(zip(sweep.frame["boundary"], names, strict=True))
    figure = make_subplots(
        rows=1, cols=len(panels), subplot_titles=[title for _, title in panels], horizontal_spacing=0.09
    )
    for col, (column, _) in enumerate(panels, 1):
        tints = [colour("expert") if own else colour("other") for own in sweep.frame["own"]]
        values = [float(value) for value in sweep.frame[column]]
        figure.add_bar(
            x=names,
            y=values,
            marker={"color": tints, "opacity": 0.55},
            text=[f"{value:,.4g}" for value in values],
            textposition="inside",
            insidetextanchor="start",
            textangle=0,
            hovertemplate="%{x}: %{y:.5g}<extra></extra>",
            row=1,
            col=col,
        )
        figure.add_scatter(
            x=[named[boundary] for boundary in videos["boundary"]],
            y=videos[column].tolist(),
            mode="markers",
            marker={"color": GREY, "size": 7},
            customdata=videos["case"].tolist(),
            hovertemplate="case %{customdata}: %{y:.5g}<extra></extra>",
            row=1,
            col=col,
        )
    figure.update_layout(template=theme(), height=340, showlegend=False, margin={"t": 40})
    figure.update_xaxes(title_text="boundary, steps of the high-noise + low-noise expert")
    figure.update_yaxes(rangemode="tozero")
    figure.update_annotations(font={"size": 13})
    return figure


def switch_bars(cost: Any) -> go.Figure:
    """What the video waits for a switch in each way, with its noise, bandwidth and hidden share.

    Args:
        cost: as `diagnose.switch_cost` gives it.

    Raises:
        WanlabError: nothing was measured.
    """
    import plotly.graph_objects as go

    if cost.frame.empty:
        raise WanlabError(f"no switch to draw: {cost.note}")
    rows = cost.frame.to_dict("records")
    figure = go.Figure(
        go.Bar(
            x=[row["time_ms"] for row in rows],
            y=[_WAY_NAMES[row["way"]] for row in rows],
            orientation="h",
            marker={"color": [colour("expert_low")] * len(rows)},
            error_x={
                "type": "data",
                "array": [row["noise_ms"] for row in rows],
                "color": GREY,
                "thickness": 1.5,
            },
            hovertemplate="%{y}: %{x:,.4g} ms<extra></extra>",
        )
    )
    longest = max(row["time_ms"] + row["noise_ms"] for row in rows)
    for row in rows:
        figure.add_annotation(
            x=max(row["time_ms"] + row["noise_ms"], 0),
            y=_WAY_NAMES[row["way"]],
            text=_said(row),
            showarrow=False,
            xanchor="left",
            xshift=8,
        )
    figure.update_layout(template=theme(), height=90 + ROW_PX * len(rows), showlegend=False)
    least = min(0.0, *(row["time_ms"] - row["noise_ms"] for row in rows))
    figure.update_xaxes(
        title_text="what a video waits for one switch (ms), with its noise", range=[least, longest * 1.7]
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _said(row: dict[str, Any]) -> str:
    text = f"{row['time_ms']:,.1f} ms" + ("" if abs(row["time_ms"]) > row["noise_ms"] else ", within noise")
    if row["gb_per_s"] == row["gb_per_s"] and row["gb_per_s"] is not None:
        text += f" · {row['gb_per_s']:.3g} GB/s"
    if row["way"] == "prefetched":
        text += f" · {row['hidden_percent']:.0f} % hidden, forward {row['slowdown_percent']:+.1f} %"
    return text
