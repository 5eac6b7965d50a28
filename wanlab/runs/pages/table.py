"""The table of an index page as its script takes it: columns with units and colours, and every value."""

from __future__ import annotations

from typing import Any

from wanlab.plots import OTHERS, colour
from wanlab.plots.style import ENGINE_COLOURS, FORMAT_COLOURS
from wanlab.runs.files import plain
from wanlab.runs.pages import columns as wanted
from wanlab.runs.pages import shell
from wanlab.runs.pages.board import Board

FEW = 12  # a parameter with more values is searched for, not picked from a list
ALWAYS = ("name", "notebook", "state", "reason", "started", "seconds", "gpu", "cpu", "wanlab", "verdict")


def columns_of(board: Board, axes: list[wanted.Column]) -> list[dict[str, Any]]:
    """Columns of the table: what was varied, then what was measured; few values get a colour and a filter each."""
    several = board.frame["name"].nunique() > 1
    named = (["name"] if several else []) + board.axes
    found = []
    for name in named:
        column = wanted.Column("name", "notebook") if name == "name" else wanted.describe(name)
        values = list(dict.fromkeys(_text(v) for v in board.frame[name] if not wanted.missing(v)))
        few = values if len(values) <= FEW else None
        found.append(
            {
                "key": name,
                "title": column.title,
                "unit": column.unit,
                "kind": "parameter",
                "few": few,
                "colours": _colours(values) if few else None,
            }
        )
    measured = {column.name for column in axes}
    for column in board.metrics:
        found.append(
            {
                "key": column.name,
                "title": column.title,
                "unit": column.unit,
                "kind": "metric",
                "better": column.better,
                "about": column.about,
                "axis": column.name in measured,
                "low": column.low,
                "high": column.high,
                "signed": column.unit == "%" and column.about == "quality",
            }
        )
    return found


def _colours(values: list[Any]) -> list[str]:
    """The house colour of an engine or a format, where all values have one of their own; else one after the other."""
    known = ENGINE_COLOURS | FORMAT_COLOURS
    own = [colour(str(value)) for value in values]
    if len(set(own)) == len(own) and all(
        any(word in known for word in _parts(str(value))) for value in values
    ):
        return own
    return [OTHERS[i % len(OTHERS)] for i in range(len(values))]


def _parts(value: str) -> list[str]:
    return value.lower().replace("_", "-").replace(" ", "-").split("-")


def _text(value: Any) -> Any:
    """A cell for the page: numbers stay numbers, everything else is text."""
    if wanted.missing(value):
        return None
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return plain(value)  # infinity has no number in JSON; the page reads "inf"
    return shell.shown(list(value) if isinstance(value, tuple) else plain(value))


def table_of(board: Board) -> dict[str, list[Any]]:
    """Every column, for the page and for its CSV."""
    names = [*ALWAYS, *(name for name in board.frame.columns if name[:2] in ("p.", "m."))]
    return {name: [_text(value) for value in board.frame[name]] for name in names}
