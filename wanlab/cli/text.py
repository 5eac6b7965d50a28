"""What several commands print and read: tables and numbers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

WIDEST = 160  # of a printed cell


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, cut: bool = False) -> None:
    """Print columns as wide as their cells; columns of numbers are aligned to the right where cells are cut.

    Args:
        cut: cells longer than 160 characters are shortened.
    """
    lines = [[safe(cell, WIDEST if cut else None) for cell in line] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    right = [cut and all(_numeric(line[i]) for line in lines[1:]) for i in range(len(head))]
    for line in lines:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        print("  ".join(cells).rstrip())


def safe(value: Any, widest: int | None = WIDEST) -> str:
    """Text of a run as one line that can do nothing to a terminal."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return text if widest is None or len(text) <= widest else f"{text[: widest - 3]}..."


def positive(text: str) -> float:
    """A number above 0, as the type of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _numeric(cell: str) -> bool:
    return not cell or cell.lstrip("+-")[:1].isdigit()
