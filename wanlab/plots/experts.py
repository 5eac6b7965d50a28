"""Figures of experts: steps, boundary, disagreement, switch cost, and the diagram of the data flow."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from wanlab.core.errors import WanlabError
from wanlab.core.words import number_text, time_text
from wanlab.diagnose.experts.switching import WAY_NAMES
from wanlab.plots.bars import name_lines
from wanlab.plots.style import GREY, LINE, NAMES, ROW_PX, colour, theme

BRANCHES = {"cond_ms": ("with the prompt", 0.95), "uncond_ms": ("without the prompt", 0.5)}
"""Column of a branch -> its name, and how opaque its bars are."""


def expert_steps(timeline: Any) -> go.Figure:
    """Noise and measured time of every step in the colour of its expert, and the boundary; steps count from 1.

    Args:
        timeline: from `diagnose.timeline`.
    """
    steps, schedule = timeline.steps.assign(number=timeline.steps["step"] + 1), timeline.schedule
    branches = [name for name in BRANCHES if name in steps]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.42, 0.58])
    for name, part in steps.groupby("component", sort=False):
        style = {"name": NAMES.get(name, name), "legendgroup": name}
        figure.add_scatter(
            x=part["number"].tolist(),
            y=part["sigma"].tolist(),
            mode="markers",
            marker={"color": colour(name), "size": 9},
            customdata=part[["timestep", "sigma", "snr", "time_ms"]].to_numpy().tolist(),
            hovertemplate="step %{x}, timestep %{customdata[0]:.0f}<br>sigma %{customdata[1]:.4f}, SNR"
            " %{customdata[2]:.3g}<br>%{customdata[3]:,.1f} ms<extra>%{fullData.name}</extra>",
            row=1,
            col=1,
            **style,
        )
        for branch in branches:
            branch_name, opacity = BRANCHES[branch]
            figure.add_bar(
                x=part["number"].tolist(),
                y=part[branch].tolist(),
                marker={"color": colour(name), "opacity": opacity},
                hovertemplate=f"step %{{x}}, {branch_name}: %{{y:,.1f}} ms<extra>%{{fullData.name}}</extra>",
                showlegend=False,
                row=2,
                col=1,
                **style,
            )
    for branch in branches if len(branches) > 1 else ():  # only for the legend
        branch_name, opacity = BRANCHES[branch]
        tint = f"rgba(128,138,149,{opacity})"
        figure.add_bar(x=[None], y=[None], name=branch_name, marker={"color": tint}, row=2, col=1)
    line = {
        "x": steps["number"].tolist(),
        "y": steps["sigma"].tolist(),
        "mode": "lines",
        "line": {"color": LINE},
    }
    figure.add_scatter(**line, hoverinfo="skip", showlegend=False, row=1, col=1)
    for step in schedule.switches:
        figure.add_vline(x=step + 0.5, line={"color": GREY, "dash": "dot", "width": 1.5})
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
    figure.update_layout(template=theme(), height=380, barmode="stack", bargap=0.15)
    figure.update_yaxes(title_text="noise (sigma)", range=[0, 1.06], row=1, col=1)
    figure.update_yaxes(title_text="time per step (ms)", rangemode="tozero", row=2, col=1)
    few = {"dtick": 1} if len(steps) <= 12 else {}
    figure.update_xaxes(title_text="denoising step", row=2, col=1, **few)
    figure.update_xaxes(range=[0.5, len(steps) + 0.5], **few)
    return figure


def disagreement_curve(disagreement: Any) -> go.Figure:
    """Difference of the two experts' predictions at each step in percent, with that of equal calls.

    Args:
        disagreement: from `diagnose.disagreement`.
    """
    steps = disagreement.steps
    percent = 100 * steps["relative_l2"]
    figure = go.Figure()
    line = {"color": LINE, "width": 1.5}
    figure.add_scatter(
        x=steps["timestep"].tolist(),
        y=percent.tolist(),
        mode="lines",
        line=line,
        showlegend=False,
        hoverinfo="skip",
    )
    for name, part in steps.groupby("component", sort=False):
        figure.add_scatter(
            x=part["timestep"].tolist(),
            y=percent[part.index].tolist(),
            mode="markers+text" if len(steps) <= LABELLED else "markers",
            text=[f"{value:.2g}" for value in percent[part.index]],
            textposition="top center",
            name=NAMES.get(name, name),
            marker={"color": colour(name), "size": 10},
            customdata=[[row.step + 1, row.sigma, row.cosine] for row in part.itertuples()],
            hovertemplate="step %{customdata[0]}, timestep %{x:.0f}, sigma %{customdata[1]:.3f}<br>differ by %{y:.3g} %,"
            " cosine %{customdata[2]:.4f}<extra>%{fullData.name}</extra>",
        )
    floors = {
        "kernel_l2": f"{disagreement.kernel.replace('_', ' ')} kernel",
        "again_l2": "equal calls",
    }
    for column, title in floors.items():
        values = 100 * steps[column]
        figure.add_scatter(
            x=steps["timestep"].tolist(),
            y=values.tolist(),
            mode="lines",
            name=title,
            line={"color": GREY, "dash": "dot" if column == "again_l2" else "dash", "width": 1.5},
            hovertemplate="timestep %{x:.0f}: %{y:.3g} %<extra>%{fullData.name}</extra>",
        )
    figure.add_vline(
        x=disagreement.boundary_timestep,
        line={"color": GREY, "dash": "dot", "width": 1.5},
        annotation_text=f"boundary: timestep {disagreement.boundary_timestep:g}",
        annotation_position="top right",
    )
    figure.update_layout(template=theme(), height=380)
    figure.update_xaxes(title_text="timestep (noise falls to the right)", autorange="reversed")
    figure.update_yaxes(
        title_text="difference of the predictions (%)", range=[0, 1.18 * float(percent.max()) or 1]
    )
    return figure


LABELLED = 12  # steps up to which their figures have room beside them
OWN, OTHER = (
    "#b8581f",
    "#6b7682",
)  # bars of the model's own boundary and of others, dark enough for white text


def boundary_curves(sweep: Any) -> go.Figure:
    """Time of the experts and, where it was scored, LPIPS for each boundary; one dot per case.

    Args:
        sweep: from `diagnose.boundary_sweep`.
    """
    videos = sweep.videos[~sweep.videos["control"]]
    panels = [("denoising_ms", "experts' time per video (ms)")]
    if "lpips" in videos:
        panels.append(("lpips", "LPIPS to the true video"))
    names = [
        f"{sweep.title(b)}<br>{int(h)} + {int(n)} steps"
        for b, h, n in sweep.frame[["boundary", "high_steps", "low_steps"]].to_numpy()
    ]
    name_of = dict(zip(sweep.frame["boundary"], names, strict=True))
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        subplot_titles=[title for _, title in panels],
        vertical_spacing=0.2,
        shared_xaxes=True,
    )
    for place, (column, _) in enumerate(panels, 1):
        tints = [OWN if own else OTHER for own in sweep.frame["own"]]
        values = [float(value) for value in sweep.frame[column]]
        figure.add_bar(
            x=names,
            y=values,
            marker={"color": tints},
            text=[number_text(value) for value in values],
            textposition="inside",
            insidetextanchor="start",
            insidetextfont={"color": "#ffffff"},
            textangle=0,
            hovertemplate="%{x}: %{y:.5g}<extra></extra>",
            row=place,
            col=1,
        )
        figure.add_scatter(
            x=[name_of[boundary] for boundary in videos["boundary"]],
            y=videos[column].tolist(),
            mode="markers",
            marker={"color": "#ffffff", "size": 8, "line": {"color": "#14171a", "width": 1.5}},
            customdata=videos["case"].tolist(),
            hovertemplate="case %{customdata}: %{y:.5g}<extra></extra>",
            row=place,
            col=1,
        )
    figure.update_layout(template=theme(), height=160 + 150 * len(panels), showlegend=False, margin={"t": 40})
    figure.update_xaxes(
        title_text="boundary; steps of the high-noise + the low-noise expert", row=len(panels)
    )
    figure.update_yaxes(rangemode="tozero")
    figure.update_annotations(font={"size": 13})
    return figure


def switch_bars(cost: Any) -> go.Figure:
    """Time that a video waits for one switch, for each way to bring the weights, with noise, bandwidth and hidden share.

    Args:
        cost: from `diagnose.switch_cost`.

    Raises:
        WanlabError: nothing was measured.
    """
    if cost.frame.empty:
        raise WanlabError(f"no switch to draw: {cost.note}")
    rows = cost.frame.to_dict("records")
    figure = go.Figure(
        go.Bar(
            x=[row["time_ms"] for row in rows],
            y=[_way(row) for row in rows],
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
            y=_way(row),
            text=_switch_text(row),
            showarrow=False,
            xanchor="left",
            xshift=8,
        )
    figure.update_layout(
        template=theme(),
        height=120 + ROW_PX * len(rows),
        showlegend=False,
        title={"text": name_lines(cost.where, 48), "font": {"size": 13}, "x": 0.01},
        margin={"t": 50},
    )
    least = min(0.0, *(row["time_ms"] - row["noise_ms"] for row in rows))
    figure.update_xaxes(
        title_text="waiting time for one switch (ms), with its noise", range=[least, longest * 2.1], nticks=6
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _way(row: dict[str, Any]) -> str:
    return name_lines(WAY_NAMES[row["way"]])


def _switch_text(row: dict[str, Any]) -> str:
    lines = [time_text(row["time_ms"]) if abs(row["time_ms"]) > row["noise_ms"] else "within noise"]
    if row["gb_per_s"] == row["gb_per_s"] and row["gb_per_s"] is not None:
        lines[0] += f" · {row['gb_per_s']:.3g} GB/s"
    if row["way"] == "prefetched":
        lines.append(f"{row['hidden_percent']:.0f} % hidden")
    return "<br>".join(lines)


# Centres of the boxes of the diagram, in a picture of 1000 x 540; y grows upwards.
_CENTRES = {
    "prompt": (45, 440),
    "noise": (45, 270),
    "image": (45, 100),
    "text_encoder": (290, 440),
    "vae_encoder": (290, 100),
    "boundary": (482, 270),
    "expert_high": (655, 400),
    "expert_low": (655, 140),
    "expert": (575, 270),
    "scheduler": (868, 230),
    "vae_decoder": (868, 385),
    "video": (868, 505),
}
_WIDTH, _LINE_HEIGHT = 150, 17

# The same from top to bottom, in a picture of 360 x 850 for a phone.
_TALL_CENTRES = {
    "prompt": (78, 830),
    "image": (282, 830),
    "noise": (180, 715),
    "text_encoder": (75, 715),
    "vae_encoder": (285, 715),
    "boundary": (180, 540),
    "expert_high": (80, 370),
    "expert_low": (268, 370),
    "expert": (180, 370),
    "scheduler": (180, 215),
    "vae_decoder": (180, 105),
    "video": (180, 20),
}
_TALL_RIGHT = 354
"""Where the arrow that leads back goes up."""


def expert_diagram(flow: Any) -> go.Figure:
    """The loaded model as boxes and arrows: class, size and device of each part, shapes of the tensors between them.

    Args:
        flow: from `diagnose.data_flow`.

    Raises:
        WanlabError: a part that the diagram cannot draw.
    """
    unknown = [name for name in flow.nodes["node"] if name not in _CENTRES]
    if unknown:
        raise WanlabError(f"the diagram cannot draw {unknown[0]}; it draws {', '.join(_CENTRES)}")
    figure, tall = _drawn(flow, _CENTRES, (1000, 530)), _drawn(flow, _TALL_CENTRES, (360, 850))
    parts = tall.to_plotly_json()["layout"]
    phone = {name: parts[name] for name in ("shapes", "annotations", "xaxis", "yaxis")} | {"height": 860}
    return figure.update_layout(height=560, meta={"least_px": 900, "phone": phone})


def _drawn(flow: Any, centres: dict[str, tuple[int, int]], size: tuple[int, int]) -> go.Figure:
    """The boxes and arrows in a picture of a size, which stands upright where it is higher than wide."""
    figure, tall = go.Figure(), size[1] > size[0]
    boxes = {}
    for node in flow.nodes.to_dict("records"):
        lines = _lines(node, flow.schedule)
        height = 14 + _LINE_HEIGHT * len(lines)
        widths = {"input": 60 if tall else 84, "output": 84, "decision": 130, "scheduler": 165}
        width = widths.get(node["kind"], 138 if tall and not node["node"].startswith("expert") else _WIDTH)
        height += 44 if node["kind"] == "decision" else 0
        boxes[node["node"]] = (*centres[node["node"]], width / 2, height / 2)
        _box(figure, node, boxes[node["node"]], lines)
    for edge in flow.edges.to_dict("records"):
        (_arrow_down if tall else _arrow)(figure, edge, boxes)
    # A figure without any data draws nothing.
    corners = {"x": [0, size[0]], "y": [0, size[1]]}
    figure.add_scatter(**corners, mode="markers", marker={"opacity": 0}, hoverinfo="skip")
    figure.update_layout(template=theme(), showlegend=False, margin={"l": 0, "r": 0, "t": 4, "b": 4})
    figure.update_xaxes(visible=False, range=[0, size[0]], fixedrange=True)
    figure.update_yaxes(visible=False, range=[0, size[1]], fixedrange=True)
    return figure


def _lines(node: dict[str, Any], schedule: Any) -> list[str]:
    """The text of a box."""
    name = node["node"]
    if node["kind"] == "decision":
        return ["<b>timestep</b>", f"<b>≥ {schedule.boundary_timestep:g} ?</b>"]
    lines = [f"<b>{NAMES.get(name, name)}</b>"]
    if isinstance(node["class_name"], str):
        lines.append(f"<span style='font-size:10px'>{node['class_name']}</span>")
    if node["parameters"] == node["parameters"] and node["size_bytes"]:
        lines.append(f"{_short(node['parameters'])} · {_short(node['size_bytes'])}B")
        lines.append(f"{node['dtype']}, {node['device']}")
    if name.startswith("expert"):
        lines.append(f"{node['steps']} of {len(schedule.table)} steps")
    return lines


def _short(number: float) -> str:
    """1,234,567 -> "1.23 M"; a unit may follow."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g} "


def _box(figure: go.Figure, node: dict, box: tuple, lines: list[str]) -> None:
    x, y, half_x, half_y = box
    tint = colour(node["node"]) if node["kind"] == "network" else GREY
    if node["kind"] == "decision":
        path = f"M {x - half_x},{y} L {x},{y + half_y} L {x + half_x},{y} L {x},{y - half_y} Z"
        shape = {"type": "path", "path": path}
    else:
        shape = {"type": "rect", "x0": x - half_x, "x1": x + half_x, "y0": y - half_y, "y1": y + half_y}
    figure.add_shape(**shape, line={"width": 0}, fillcolor=tint, opacity=0.16, layer="below")
    figure.add_shape(**shape, line={"color": tint, "width": 1.5}, fillcolor="rgba(0,0,0,0)")
    figure.add_annotation(x=x, y=y, text="<br>".join(lines), showarrow=False, font={"size": 12})


def _arrow(figure: go.Figure, edge: dict, boxes: dict) -> None:
    """An arrow from border to border, along the line between the centres; one that leads back passes below the boxes."""
    source, target = boxes[edge["source"]], boxes[edge["target"]]
    text = f"{edge['tensor']}<br>{edge['shape'].replace('x', '×')}"
    if edge["source"] == "boundary":
        text = ("yes: " if target[1] > source[1] else "no: ") + text
    label = {"showarrow": False, "font": {"size": 10.5}, "text": text}
    if target[0] < source[0]:
        # Out to the right of the arrows that come in from the left.
        turn, right, (start, end) = (
            22,
            source[0] + source[2] / 2,
            (source[1] - source[3], target[1] - target[3]),
        )
        path = f"M {right},{start} L {right},{turn} L {target[0]},{turn} L {target[0]},{end - 12}"
        figure.add_shape(type="path", path=path, line={"color": GREY, "width": 1.5})
        figure.add_annotation(x=(source[0] + target[0]) / 2, y=turn, yanchor="bottom", **label)
        begin, tip = (target[0], end - 14), (target[0], end)
    else:
        begin = _border(source, target, edge["source"] == "boundary")
        tip = _border(target, source, edge["target"] == "boundary")
        dx, dy = tip[0] - begin[0], tip[1] - begin[1]
        beside = _beside(dx, dy, above=edge["source"] == "boundary")
        # A label right of a rising line is nearer its start, so that it does not touch the next box.
        share = 0.25 if beside.get("yanchor") == "top" and dy > 0 else 0.5
        figure.add_annotation(x=begin[0] + share * dx, y=begin[1] + share * dy, **beside, **label)
    line = {"arrowhead": 2, "arrowwidth": 1.5, "arrowcolor": GREY, "text": "", "axref": "x", "ayref": "y"}
    figure.add_annotation(x=tip[0], y=tip[1], ax=begin[0], ay=begin[1], **line)


def _arrow_down(figure: go.Figure, edge: dict, boxes: dict) -> None:
    """As `_arrow`, in the upright picture: what leads back passes to the right of the boxes."""
    source, target = boxes[edge["source"]], boxes[edge["target"]]
    text = f"{edge['tensor'].replace(', ', ',<br>')}<br>{edge['shape'].replace('x', '×')}"
    if edge["source"] == "boundary":
        text = ("yes: " if target[0] < source[0] else "no: ") + text
    elif edge["source"] == "noise":  # between two other arrows
        sizes = edge["shape"].split("x")
        text = f"{edge['tensor']}<br>{'×'.join(sizes[:3])}<br>×{'×'.join(sizes[3:])}"
    label = {"showarrow": False, "font": {"size": 10.5}, "text": text}
    if target[1] > source[1]:
        begin, tip = (float(_TALL_RIGHT), float(target[1])), (target[0] + target[2], float(target[1]))
        path = f"M {source[0] + source[2]},{source[1]} L {_TALL_RIGHT},{source[1]} L {begin[0]},{begin[1]}"
        figure.add_shape(type="path", path=path, line={"color": GREY, "width": 1.5})
        figure.add_annotation(x=(begin[0] + tip[0]) / 2, y=tip[1], yanchor="bottom", **label)
    else:
        begin = _border(source, target, edge["source"] == "boundary")
        tip = _border(target, source, edge["target"] == "boundary")
        share = {"noise": 0.5, "boundary": 0.36}.get(edge["source"], 0.5)
        left = tip[0] + begin[0] < 2 * _TALL_CENTRES["boundary"][0] or edge["source"] == "image"
        side = {"xanchor": "right", "xshift": -9} if left else {"xanchor": "left", "xshift": 9}
        at = {"x": begin[0] + share * (tip[0] - begin[0]), "y": begin[1] + share * (tip[1] - begin[1])}
        figure.add_annotation(**at, **side, **label)
    line = {"arrowhead": 2, "arrowwidth": 1.5, "arrowcolor": GREY, "text": "", "axref": "x", "ayref": "y"}
    figure.add_annotation(x=tip[0], y=tip[1], ax=begin[0], ay=begin[1], **line)


def _beside(dx: float, dy: float, *, above: bool) -> dict[str, Any]:
    """Anchor and shift of a label that does not touch its line."""
    if abs(dx) < 0.2 * abs(dy):
        return {"xanchor": "left", "xshift": 6}
    if abs(dy) < 0.3 * abs(dx):
        return {"yanchor": "bottom"}
    return {"yanchor": "bottom" if above else "top", "xanchor": "right" if (dy > 0) == above else "left"}


def _border(box: tuple, toward: tuple, diamond: bool) -> tuple[float, float]:
    """Point where the line from a box's centre to another's crosses its border."""
    dx, dy = toward[0] - box[0], toward[1] - box[1]
    across, up = abs(dx) / box[2], abs(dy) / box[3]
    scale = 1 / (across + up if diamond else max(across, up))
    return box[0] + dx * scale, box[1] + dy * scale
