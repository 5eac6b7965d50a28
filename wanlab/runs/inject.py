"""Parameters put into a notebook, as Papermill does, with exact literals for every type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from wanlab.runs.files import plain
from wanlab.runs.parameters import is_tagged


def inject(nb: Any, values: Mapping[str, Any]) -> None:
    """Put overrides into a cell below the defaults."""
    from wanlab.runs.notebook_format import nbformat

    nb.cells = [cell for cell in nb.cells if not is_tagged(cell, "injected-parameters")]
    if not values:
        return
    lines = ["# Parameters", *(f"{name} = {literal(value)}" for name, value in values.items())]
    cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
    at = next(index for index, cell in enumerate(nb.cells) if is_tagged(cell, "parameters"))
    nb.cells.insert(at + 1, cell)
    nb.metadata.setdefault("papermill", {})["parameters"] = plain(dict(values))


def literal(value: Any) -> str:
    """Python source of a value; infinities and NaN have no literal and become a call of `float`."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def upgraded(nb: Any) -> Any:
    """Current notebook format, where every cell has an id."""
    from wanlab.runs.notebook_format import nbformat

    nb = nbformat.v4.upgrade(nb)
    nb.metadata.setdefault("papermill", {})
    for cell in nb.cells:
        cell.setdefault("id", nbformat.v4.new_code_cell().id)
        cell.metadata.setdefault("papermill", {})
    return nb
