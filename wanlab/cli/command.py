"""What the modules of commands share: the form of a command, tables of text, and types of arguments."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TextIO

from wanlab.core.errors import WanlabError, clean

CELL_WIDTH = 160  # characters of the longest cell that is printed whole


class Command(NamedTuple):
    """One command of `wanlab`.

    Attributes:
        help: text above the options in `wanlab COMMAND --help`.
        add_arguments: adds the options to a parser.
        main: runs the command with the parsed options; returns the exit status.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    main: Callable[[argparse.Namespace], int]


def show(*lines: object, end: str = "\n", file: TextIO | None = None) -> None:
    """Print lines without what a terminal would obey: names and verdicts come from files of anyone."""
    print(*map(clean, lines), sep="\n", end=end, file=file)


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, cut: bool = False) -> None:
    """Print columns as wide as their cells.

    Args:
        cut: shorten cells to 160 characters, and align columns of numbers to the right.
    """
    lines = [[safe(cell, CELL_WIDTH if cut else None) for cell in line] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    right = [cut and all(_numeric(line[i]) for line in lines[1:]) for i in range(len(head))]
    for line in lines:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        show("  ".join(cells).rstrip())


def safe(value: Any, width: int | None = CELL_WIDTH) -> str:
    """Text from a run as one line, without what a terminal would obey."""
    text = clean(value, keep="")
    return text if width is None or len(text) <= width else f"{text[: width - 3]}..."


def assigned(text: str) -> str:
    """`NAME=VALUE`, as the type of an argument."""
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} has no value: write {text}=VALUE in one word")
    return text


def positive(text: str) -> float:
    """A number above 0, as the type of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


SIZE = {"height": "pixels", "width": "pixels", "frames": "frames of the video"}
"""Options that together are the size of a video -> their unit."""


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add the options of `SIZE`; what is not given is the model's default."""
    for name, unit in SIZE.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{unit} (default: the model's)")


def size_of(options: argparse.Namespace) -> dict[str, int | None]:
    """The options of `add_size` by name."""
    return {name: getattr(options, name) for name in SIZE}


def video_size(text: str) -> tuple[int, int, int]:
    """Height, width and frames of an argument HxWxF.

    Raises:
        WanlabError: it is none.
    """
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})x([0-9]{1,6})", text)
    if not match:
        raise WanlabError(f"{text!r} is no size; give height x width x frames, such as 480x832x81")
    height, width, frames = map(int, match.groups())
    return height, width, frames


def _numeric(cell: str) -> bool:
    return not cell or cell.lstrip("+-")[:1].isdigit()
