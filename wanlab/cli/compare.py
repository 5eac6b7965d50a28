"""`wanlab compare`: configurations of runs beside a baseline, in one table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanlab.core.errors import WanlabError
from wanlab.runs.choose import DRIFT, readable
from wanlab.runs.compare import THRESHOLD_PERCENT, Comparisons, compare
from wanlab.runs.exporters import to_csv

WIDEST = 160  # of a printed cell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="folder of runs, such as a sweep's"
    )
    parser.add_argument(
        "--baseline",
        action="append",
        metavar="NAME=VALUE",
        help="parameters of the baseline, repeatable (default: the sweep's own, else the first run)",
    )
    parser.add_argument("--by", metavar="COLUMN", help="number to compare (default: time_per_video_ms)")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="FIELD",
        help="let a field differ from the baseline that is refused otherwise, such as steps or machine; repeatable",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD_PERCENT,
        metavar="PERCENT",
        help="smallest effect that counts (default: %(default)g)",
    )
    parser.add_argument(
        "--show", action="append", metavar="COLUMN", help="another number in the table; repeatable"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table as CSV")


def main(options: argparse.Namespace) -> int:
    found = compare(
        options.paths,
        baseline=options.baseline,
        by=options.by,
        allow=_words(options.allow),
        threshold_percent=options.threshold,
        show=_words(options.show) if options.show else None,
    )
    shown = readable(found)
    print_table(list(shown.columns), shown.to_numpy().tolist())
    once = f"; {DRIFT}" if found.baseline.repeats == 1 else f"; run {found.baseline.repeats} times"
    print(f"baseline {safe(found.baseline.label)}{once}")
    print(f"ratio above 1 is better; effects within {found.threshold_percent:g} % or the noise do not count")
    for title, frame, columns in (
        ("refused", found.refused, ("configuration", "reason")),
        ("not finished", found.failures, ("configuration", "state", "reason")),
    ):
        if len(frame):
            print(f"\n{title}:")
            print_table(columns, frame[list(columns)].to_numpy().tolist())
    if options.csv:
        write_csv(found, options.csv)
    return 0


def safe(value: Any) -> str:
    """Text of a run as one line that can do nothing to a terminal."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    lines = [[safe(cell) for cell in line] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    numbers = [all(_numeric(line[i]) for line in lines[1:]) for i in range(len(head))]
    for line in lines:
        cells = [
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numbers, strict=True)
        ]
        print("  ".join(cells).rstrip())


def write_csv(found: Comparisons, path: Path) -> Path:
    """The whole frame.

    Raises:
        WanlabError: the file cannot be written.
    """
    try:
        return to_csv(found.frame, path)
    except OSError as error:
        raise WanlabError(f"cannot write {path}: {error.strerror or error}") from error


def _words(given: Sequence[str]) -> list[str]:
    """Repeated options, each perhaps several with commas."""
    return [word.strip() for text in given for word in text.split(",") if word.strip()]


def _numeric(cell: str) -> bool:
    return not cell or cell.lstrip("+-")[:1].isdigit()
