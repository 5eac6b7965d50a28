"""The parts of a model and what flows between them, drawn from the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.plots.style import GREY, NAMES, colour, theme

if TYPE_CHECKING:
    import plotly.graph_objects as go

_PLACES = {
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


def expert_diagram(flow: Any) -> go.Figure:
    """The loaded model as boxes and arrows: class, size and place of each part, shapes of what goes between them.

    Args:
        flow: as `diagnose.data_flow` gives it.

    Raises:
        WanlabError: a part that the diagram has no place for.
    """
    import plotly.graph_objects as go

    unknown = [name for name in flow.nodes["node"] if name not in _PLACES]
    if unknown:
        raise WanlabError(f"the diagram has no place for {unknown[0]}; it knows {', '.join(_PLACES)}")
    figure = go.Figure()
    boxes = {}
    for node in flow.nodes.to_dict("records"):
        lines = _lines(node, flow.schedule)
        high = 14 + _LINE_HEIGHT * len(lines)
        wide = {"input": 84, "output": 84, "decision": 130, "scheduler": 165}.get(node["kind"], _WIDTH)
        high += 44 if node["kind"] == "decision" else 0
        boxes[node["node"]] = (*_PLACES[node["node"]], wide / 2, high / 2)
        _box(figure, node, boxes[node["node"]], lines)
    for edge in flow.edges.to_dict("records"):
        _arrow(figure, edge, boxes)
    figure.add_scatter(x=[0, 1000], y=[0, 530], mode="markers", marker={"opacity": 0}, hoverinfo="skip")
    figure.update_layout(
        template=theme(), height=560, showlegend=False, margin={"l": 0, "r": 0, "t": 4, "b": 4}
    )
    figure.update_xaxes(visible=False, range=[0, 1000], fixedrange=True)
    figure.update_yaxes(visible=False, range=[0, 530], fixedrange=True)
    return figure


def _lines(node: dict[str, Any], schedule: Any) -> list[str]:
    """What stands in a box."""
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
    """1,234,567 -> "1.23 M"; what follows may be a unit."""
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
    """An arrow from border to border, along the line between the centres; one that goes back runs below."""
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
        # A label on the right of a rising line stands nearer its begin, clear of the next box.
        share = 0.25 if beside.get("yanchor") == "top" and dy > 0 else 0.5
        figure.add_annotation(x=begin[0] + share * dx, y=begin[1] + share * dy, **beside, **label)
    line = {"arrowhead": 2, "arrowwidth": 1.5, "arrowcolor": GREY, "text": "", "axref": "x", "ayref": "y"}
    figure.add_annotation(x=tip[0], y=tip[1], ax=begin[0], ay=begin[1], **line)


def _beside(dx: float, dy: float, *, above: bool) -> dict[str, Any]:
    """On which side of the middle of a line its label stands clear of it."""
    if abs(dx) < 0.2 * abs(dy):
        return {"xanchor": "left", "xshift": 6}
    if abs(dy) < 0.3 * abs(dx):
        return {"yanchor": "bottom"}
    return {"yanchor": "bottom" if above else "top", "xanchor": "right" if (dy > 0) == above else "left"}


def _border(box: tuple, toward: tuple, diamond: bool) -> tuple[float, float]:
    """Where the line from a box's centre to another's leaves it."""
    dx, dy = toward[0] - box[0], toward[1] - box[1]
    across, up = abs(dx) / box[2], abs(dy) / box[3]
    scale = 1 / (across + up if diamond else max(across, up))
    return box[0] + dx * scale, box[1] + dy * scale
