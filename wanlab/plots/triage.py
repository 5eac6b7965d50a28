"""The decision tree of a triage from left to right, with the path that was taken."""

from __future__ import annotations

import textwrap
from itertools import pairwise
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from wanlab.diagnose.profile_answer import whole_percent
from wanlab.plots.bars import BESIDE, name_lines
from wanlab.plots.style import GREY, OTHERS, theme

WIDTH_PX, GAP_PX, BEND_PX, LINE_PX, BETWEEN_PX, TITLE_PX = 880, 56, 11, 15, 8, 38
LETTER_PX, WIDEST_PX = 6.2, 200
LEAST_GAIN = 1.01  # a smaller bound says no more than the share
FRAME = "rgba(128,138,149,0.5)"
TINTS = ("#d9534f", "#3d85c6", "#8b7ec8", *OTHERS)


def share_ranking(ranking: pd.DataFrame) -> go.Figure:
    """Shares of the time, largest first, with the most that a change of each can gain; the one to change is coloured.

    Args:
        ranking: `Triage.ranking`.
    """
    texts = [
        whole_percent(row.share_percent)
        + (
            ""
            if row.bound_ratio != row.bound_ratio or row.bound_ratio < LEAST_GAIN
            else f" · ≤ {row.bound_ratio:.2f}×"
        )
        for row in ranking.itertuples()
    ]
    figure = go.Figure(
        go.Bar(
            x=ranking["share_percent"].tolist(),
            y=[_short(what) for what in ranking["what"]],
            orientation="h",
            text=texts,
            textposition="outside",
            cliponaxis=False,
            marker={"color": [TINTS[0] if reached else GREY for reached in ranking["reached"]]},
            customdata=[[row.what, row.advice] for row in ranking.itertuples()],
            hovertemplate="%{customdata[0]}: %{text}<br>%{customdata[1]}<extra></extra>",
        )
    )
    figure.add_vline(
        x=float(ranking["threshold_percent"].iloc[0]), line={"color": GREY, "dash": "dot", "width": 1.5},
        annotation_text="worth a change", annotation_position="top",
    )  # fmt: skip
    figure.update_layout(template=theme(), height=110 + 36 * len(ranking), showlegend=False, margin={"t": 30})
    figure.update_xaxes(
        title_text="share of the time (%), largest gain",
        range=[0, BESIDE * float(ranking["share_percent"].max()) or 1],
        nticks=6,
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _short(what: str) -> str:
    """A share's name without its article, broken into lines that a phone has room for."""
    return name_lines(what.removeprefix("the "))


def decision_tree(triage: Any) -> go.Figure:
    """The tree of a triage: one band per root, questions with their measured values, and the advice that was reached.

    The path that was taken is thick and coloured; an advice that was reached is filled. A dashed box is a question without
    a measurement. The hover text of a box has all its facts.

    Args:
        triage: `diagnose.Triage`.
    """
    top, shapes, texts = 0.0, [], []
    drawn: dict[str, dict[str, Any]] = {}
    for tint, (root, start) in zip(TINTS * len(triage.tree.roots), triage.tree.roots.items(), strict=False):
        if start in drawn:  # below an earlier root
            continue
        boxes = _boxes(triage, start, set(drawn))
        _arrange(boxes)
        texts += _text(0, top + TITLE_PX / 2, f"<b>{root}</b>", tint, size=15, xanchor="left")
        for box in boxes.values():
            box["y"] += top + TITLE_PX
        for part in (_edges(triage, boxes, tint), _frames(boxes, tint)):
            shapes += part[0]
            texts += part[1]
        drawn |= boxes
        top = max(box["y"] + box["height"] / 2 for box in boxes.values()) + 10
    real = [box for box in drawn.values() if box["state"] != "passed"]
    figure = go.Figure(
        go.Scatter(
            x=[(box["left"] + box["right"]) / 2 for box in real],
            y=[box["y"] for box in real],
            mode="markers",
            marker={"size": 24, "opacity": 0},
            customdata=[[box["hover"]] for box in real],
            hovertemplate="%{customdata[0]}<extra></extra>",
        )
    )
    figure.update_layout(
        template=theme(),
        height=int(top) + 10,
        margin={"l": 0, "r": 0, "t": 5, "b": 5},
        showlegend=False,
        shapes=shapes,  # all at once: plotly checks the whole list at every single one
        annotations=texts,
    )
    figure.update_xaxes(range=[-2, WIDTH_PX + 2], visible=False, fixedrange=True)
    figure.update_yaxes(range=[top, 0], visible=False, fixedrange=True)
    return figure


def _boxes(triage: Any, start: str, elsewhere: set[str]) -> dict[str, dict[str, Any]]:
    """Every node below a root in depth-first order: column, children, lines of text, state."""
    asked = {row["node"]: row for row in triage.frame.to_dict(orient="records")}
    advised = {row["node"]: row for row in triage.advice.to_dict(orient="records")}
    column: dict[str, int] = {}
    order: list[str] = []

    def place(node: str, depth: int) -> None:
        if node not in column:
            order.append(node)
        if depth > column.get(node, -1):
            column[node] = depth
            for child in triage.tree.edges(node):
                if child not in elsewhere:
                    place(child, depth + 1)

    place(start, 0)
    n = 1 + max(column.values())
    width = min((WIDTH_PX - (n - 1) * GAP_PX) / n, WIDEST_PX)
    letters = int((width - 8) / LETTER_PX)
    boxes = {}
    for node in order:
        item = triage.tree.nodes[node]
        name = getattr(item, "question", None) or item.advice
        lines = textwrap.wrap(name, letters)
        state, hover = "grey", name
        if node in asked:
            row = asked[node]
            state = "asked" if row["state"] == "measured" else "open"
            lines += [f"<b>{line}</b>" for line in textwrap.wrap(row["reads"], letters)]
            hover = (
                f"<b>{name}</b><br>{row['what']}: {row['reads']}<br>{row['threshold']}<br>→ {row['branch']}"
            )
            hover += f"<br>{row['source'] or row['command']}"
        elif node in advised:
            row, state = advised[node], "advised"
            lines = [f"<b>{line}</b>" for line in lines]
            lines += [row["bound"]] * bool(row["bound"])
            details = [row["hazard"], row["mitigation"], row["help"], row["evidence"], row["notebook"]]
            hover = f"<b>{name}</b><br>" + "<br>".join(
                "<br>".join(textwrap.wrap(text, 70)) for text in details if text
            )
        boxes[node] = {
            "column": column[node],
            "ways": {},
            "height": LINE_PX * len(lines) + 8,
            "text": "<br>".join(lines),
            "hover": hover,
            "state": state,
        }
    for node in order:
        for child in triage.tree.edges(node):
            if child in column:
                way = [f"{node} > {child} {i}" for i in range(column[node] + 1, column[child])]
                for i, passed in enumerate(
                    way, column[node] + 1
                ):  # space for an edge between the boxes of a column
                    boxes[passed] = {"column": i, "ways": {}, "height": 14, "text": "", "state": "passed"}
                boxes[node]["ways"][child] = [*way, child]
                for one, other in pairwise(boxes[node]["ways"][child]):
                    boxes[one]["ways"] = {other: [other]}
    for box in boxes.values():
        box["left"] = box["column"] * (width + GAP_PX)
        box["right"] = box["left"] + width
    return boxes


def _arrange(boxes: dict[str, dict[str, Any]]) -> None:
    """Give every box its `y`: leaves below one another, the others at the mean of their children, without overlap."""
    top = 0.0
    for box in boxes.values():
        if not box["ways"]:
            box["y"] = top + box["height"] / 2
            top += box["height"] + BETWEEN_PX
    for column in sorted({box["column"] for box in boxes.values()}, reverse=True):
        here = [box for box in boxes.values() if box["column"] == column]
        for box in here:
            if box["ways"]:
                box["y"] = sum(boxes[way[0]]["y"] for way in box["ways"].values()) / len(box["ways"])
        here.sort(key=lambda box: box["y"])
        _separate(here)
    above = min(box["y"] - box["height"] / 2 for box in boxes.values())
    for box in boxes.values():
        box["y"] -= above


def _separate(boxes: list[dict[str, Any]]) -> None:
    """Move boxes of a column as little as possible (least squares) so that they do not overlap."""
    offsets = [0.0]
    for upper, lower in pairwise(boxes):
        offsets.append(offsets[-1] + (upper["height"] + lower["height"]) / 2 + BETWEEN_PX)
    groups: list[list[float]] = []  # mean and size of neighbours that touch: isotonic regression
    for box, offset in zip(boxes, offsets, strict=True):
        groups.append([box["y"] - offset, 1])
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (one, n), (two, m) = groups[-2:]
            groups[-2:] = [[(one * n + two * m) / (n + m), n + m]]
    means = [mean for mean, size in groups for _ in range(int(size))]
    for box, offset, mean in zip(boxes, offsets, means, strict=True):
        box["y"] = mean + offset


def _edges(triage: Any, boxes: dict[str, dict[str, Any]], tint: str) -> tuple[list, list]:
    """Shapes and texts of the edges; those of the path that was taken are drawn last."""
    taken = {row["node"]: row["to"] for row in triage.frame.to_dict(orient="records")}
    taken |= {node: triage.tree.advice[node].to for node in triage.advice["node"]}
    shapes: tuple[list[dict], list[dict]] = ([], [])
    texts: list[dict] = []
    for node, box in boxes.items():
        for child, way in box["ways"].items() if box["state"] != "passed" else ():
            lit = taken.get(node) == child
            path, at, bend = f"M {box['right']},{box['y']}", box, BEND_PX / 2
            for hop in (boxes[name] for name in way):
                x = hop["left"] - GAP_PX
                path += (
                    f" L {x},{at['y']} C {x + bend},{at['y']} {x + bend},{hop['y']} {x + 2 * bend},{hop['y']}"
                )
                at = hop
            label = triage.tree.edges(node)[child]
            line = {"color": tint, "width": 4} if lit else {"color": FRAME, "width": 1}
            if lit and box["state"] == "open":  # continued without an answer
                line |= {"width": 2, "dash": "dot"}
                label = label if label == "n/a" else "unknown"
            path += f" L {at['left']},{at['y']}"
            shapes[lit].append({"type": "path", "path": path, "line": line, "layer": "below"})
            first = boxes[way[0]]
            texts += _text(
                first["left"] - 3, first["y"] - 9, label, tint if lit else GREY, size=10, xanchor="right"
            )
    return shapes[0] + shapes[1], texts


def _frames(boxes: dict[str, dict[str, Any]], tint: str) -> tuple[list, list]:
    """Shapes and texts of the boxes."""
    shapes, texts = [], []
    for box in boxes.values():
        if box["state"] == "passed":
            continue
        lit, filled = box["state"] != "grey", box["state"] == "advised"
        dash = "dot" if box["state"] == "open" else "solid"
        shapes.append(
            {
                "type": "rect",
                "x0": box["left"],
                "x1": box["right"],
                "y0": box["y"] - box["height"] / 2,
                "y1": box["y"] + box["height"] / 2,
                "fillcolor": tint if filled else "rgba(0,0,0,0)",
                "line": {"color": tint if lit else FRAME, "width": 2 if lit else 1, "dash": dash},
            }
        )
        colour = "#ffffff" if filled else tint if lit else GREY
        texts += _text((box["left"] + box["right"]) / 2, box["y"], box["text"], colour)
    return shapes, texts


def _text(x: float, y: float, text: str, tint: str, *, size: int = 11, xanchor: str = "center") -> list[dict]:
    note = {"x": x, "y": y, "text": text, "showarrow": False, "xanchor": xanchor, "yanchor": "middle"}
    return [note | {"font": {"size": size, "color": tint}}] if text else []
