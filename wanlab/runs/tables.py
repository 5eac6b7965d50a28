"""DataFrames as tables that people read: heads in words with their unit, three significant digits, no raw values.

The file that `Run.save_table` writes keeps every column as it is; only what is shown is changed.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from wanlab.core.words import UNITS, UNKNOWN, heading, number_text, scaled_unit, words_of

# Columns of identifiers, which a reader searches for in code or in another program: shown as they are.
CODE = {
    "block", "file", "folder", "frame", "function", "input", "kernel", "kernels", "layer", "layers", "module", "node",
    "nodes", "op", "operator", "output", "path", "projection", "tensor", "tensors", "weight",
}  # fmt: skip
COUNTED = {
    "seed",
    "index",
    "step",
    "id",
    "sm",
}  # whole numbers that name something: no separators, no rounding
# Columns of sentences that limit what a row says: they stand behind the names of the row where a table is wide.
WARNINGS = ("warning", "warnings", "caution", "caveat", "problem", "verdict", "reason", "note", "notes")
WIDE = 8  # columns
LONG = 40  # characters of a cell that needs room
FIGURE = re.compile(
    r"(&[lg]t; )?[-+−±]?\d[\d.,]*(\s×\s10[⁻⁰-⁹¹²³]+)?(\s?(%|[A-Za-zµ/×]{1,5}))?( to .*)?( \(.*\))?\Z"
)
PLAIN = re.compile(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?")
UNIT = re.compile(r"(?:(.*), |^)([^,]+)\Z")
SMALLEST_PERCENT = 0.001
GAP = "…"  # in place of the middle rows of a long table
UNIT_NAMES = set(UNITS.values())


def table_html(table: pd.DataFrame) -> str:
    """A DataFrame as an HTML table, without columns that have nothing in them and without an index that only counts rows.

    Longer tables than pandas' `display.max_rows` lose their middle, and a line below says how many rows there are.
    """
    frame = _readable(table)
    names = _order(frame)
    shown: list[int | None] = [*range(len(frame))]
    most = pd.get_option("display.max_rows") or len(frame)
    if len(frame) > most:
        shown = [*range(most - most // 2), None, *range(len(frame) - most // 2, len(frame))]
    units = _row_units(frame)
    columns = [_column(frame.iloc[:, place], frame.columns[place], units) for place in names]
    head = "".join(f"<th{kind}>{html.escape(title)}</th>" for title, kind, _ in columns)
    rows = "".join(
        f"<tr>{''.join(f'<td{kind}>{cells[row] if row is not None else GAP}</td>' for _, kind, cells in columns)}</tr>"
        for row in shown
    )
    text = f'<table class="dataframe typed"><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table>'
    return text + (f"<p>{len(frame):,} rows</p>" if len(frame) > most else "")


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its index as columns, where it says something, and one name per column."""
    frame = table.copy(deep=False)
    if isinstance(frame.columns, pd.MultiIndex):
        frame.columns = [" ".join(str(part) for part in parts if str(part)) for parts in frame.columns]
    corner = frame.columns.name
    frame.columns = pd.Index([str(name) for name in frame.columns])
    index = frame.index
    if isinstance(index, pd.MultiIndex) or index.name is not None or not is_numeric_dtype(index):
        levels = index.to_frame(index=False, name=list(range(index.nlevels)))
        names = list(index.names) if isinstance(index, pd.MultiIndex) else [index.name or corner or ""]
        levels.columns = pd.Index(["" if name is None else str(name) for name in names])
        frame = pd.concat([levels, frame.reset_index(drop=True)], axis=1)
    return frame


def _order(frame: pd.DataFrame) -> list[int]:
    """Positions of the columns that are shown: not those with nothing in them; warnings near the front of wide tables."""
    filled = [
        place
        for place in range(frame.shape[1])
        if place == 0 or frame.empty or any(not _is_empty(value) for value in frame.iloc[:, place])
    ]
    if len(filled) <= WIDE:
        return filled
    first = [
        place
        for place in filled[1:]
        if frame.columns[place] in WARNINGS and len(set(frame.iloc[:, place])) > 1
    ]
    rest = [place for place in filled if place not in first]
    names = next((k for k, place in enumerate(rest) if all(map(_is_number, frame.iloc[:, place]))), len(rest))
    names = min(max(names, 1), 3)  # columns of words that name the row
    return [*rest[:names], *first, *rest[names:]]


def _row_units(frame: pd.DataFrame) -> list[str]:
    """The unit that the name of each row ends with, of a table with one row for each figure."""
    if not frame.shape[1] or not len(frame) or not all(isinstance(name, str) for name in frame.iloc[:, 0]):
        return [""] * len(frame)
    ends = [UNIT.match(heading(name)) for name in frame.iloc[:, 0]]
    return [end[2] if end and end[1] and end[2] in UNIT_NAMES else "" for end in ends]


def _column(values: pd.Series, name: str, units: list[str]) -> tuple[str, str, list[str]]:
    """Head, attributes and cells, as HTML, of a column; `units` are those of the rows."""
    given = [
        _in_unit(_number(value), unit)
        if unit and _is_number(_number(value)) and not _is_empty(value)
        else value
        for value, unit in zip(values.tolist(), units, strict=True)
    ]
    known = [value for value in given if not _is_empty(value)]
    title = heading(name)
    if (found := UNIT.match(title)) and found[2] in UNIT_NAMES:
        given = [_number(value) for value in given]
        known = [value for value in given if not _is_empty(value)]
    if known and all(_is_number(value) for value in known):
        title, write = _numbers(name, title, known)
        return title, "", [UNKNOWN if _is_empty(value) else html.escape(write(value)) for value in given]
    code = name.lower() in CODE
    texts = [_text(value, code) for value in given]
    if units.count("bytes"):
        texts = [text.removesuffix(", bytes") for text in texts]  # each figure of that row has its own unit
    figures = sum(bool(FIGURE.match(text)) for text in texts)
    if figures > len(known) / 2:
        return title, "", texts
    return title, ' class="text long"' if max(map(len, texts), default=0) > LONG else ' class="text"', texts


def _numbers(name: str, title: str, known: list[Any]) -> tuple[str, Callable[[Any], str]]:
    """Title and writer of a column of numbers, in the unit that its largest is read in."""
    words = set(re.split(r"[\W_]+", name.lower()))
    whole = all(
        isinstance(value, Integral) or float(value).is_integer() for value in known if math.isfinite(value)
    )
    found = UNIT.match(title)
    unit = found[2] if found and found[2] in UNIT_NAMES else ""
    if unit == "%":
        return title, _percent
    if unit:
        largest = max((abs(value) for value in known if math.isfinite(value)), default=0.0)
        factor, better = scaled_unit(unit, largest)
        if better != unit:
            title = f"{found[1]}, {better}" if found[1] else better
            return title, lambda value: number_text(float(value) * factor)
    if whole and words & COUNTED:
        return title, lambda value: str(int(value)) if math.isfinite(value) else number_text(value)
    return title, lambda value: number_text(float(value))


def _percent(value: float) -> str:
    """A percentage without its sign; one that is too small to matter says so, and is not 0.00."""
    if 0 < abs(value) < SMALLEST_PERCENT:
        return f"< {SMALLEST_PERCENT}" if value > 0 else f"> −{SMALLEST_PERCENT}"
    return number_text(value)


def _number(value: Any) -> Any:
    """A text that is only a number as that number."""
    return float(value) if isinstance(value, str) and PLAIN.fullmatch(value) else value


def _in_unit(value: Any, unit: str) -> Any:
    """The figure of a row whose name has the unit: bytes with a unit of their own, a percentage that is not 0.00."""
    if unit == "bytes":
        factor, better = scaled_unit(unit, abs(value))
        return f"{number_text(float(value) * factor)} {better}"
    return _percent(value) if unit == "%" else value


def _text(value: Any, code: bool) -> str:
    if _is_empty(value):
        return ""
    if isinstance(value, str) and (SIGNATURE.search(value) or (code and _is_identifier(value))):
        return f"<code>{html.escape(value)}</code>"
    text = words_of(_python(value))
    escaped = html.escape(text)
    if _is_identifier(text):
        return f"<code>{escaped}</code>"
    # Names of files and of code within a sentence.
    return IDENTIFIER.sub(r"<code>\g<0></code>", escaped)


IDENTIFIER = re.compile(r"\w+=(?:True|False|None)\b|[\w./:*<>\[\]-]*\w_\w(?:[\w./:*<>\[\]-]*\w)?")
SIGNATURE = re.compile(r"\w::\{?\w")  # of a C++ function, which has spaces


def _is_identifier(text: str) -> bool:
    """Whether a text is a name from code or a path, rather than words."""
    return bool(re.fullmatch(r"\S*[A-Za-z]\S*", text)) and bool(
        re.search(r"\w_\w|::|\w\.[a-z]|[()<>]|/\w+\.", text)
    )


def _python(value: Any) -> Any:
    """A number of numpy as one of Python."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and type(value).__name__ not in ("bool", "bool_")
    )


def _is_empty(value: Any) -> bool:
    if value is None or value is pd.NaT or value is pd.NA:
        return True
    if isinstance(value, Real):
        return value != value
    return isinstance(value, str | list | tuple | dict | set) and len(value) == 0
