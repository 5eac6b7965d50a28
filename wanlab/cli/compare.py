"""`wanlab compare`: configurations of runs beside a baseline, in one table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from wanlab.cli.text import print_table, safe
from wanlab.core.errors import WanlabError
from wanlab.runs.choose import DRIFT, readable
from wanlab.runs.compare import THRESHOLD_PERCENT, Comparisons, compare
from wanlab.runs.exporters import to_csv

HELP = """Compare the configurations of runs with a baseline: ratio, interval and verdict of each. A difference within
the noise or the threshold does not count, and runs of other work than the baseline's are refused."""


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
    comparisons = compare(
        options.paths,
        baseline=options.baseline,
        by=options.by,
        allow=_words(options.allow),
        threshold_percent=options.threshold,
        show=_words(options.show) if options.show else None,
    )
    shown = readable(comparisons)
    print_table(list(shown.columns), shown.to_numpy().tolist(), cut=True)
    once = (
        f"; {DRIFT}" if comparisons.baseline.repeats == 1 else f"; run {comparisons.baseline.repeats} times"
    )
    print(f"baseline {safe(comparisons.baseline.label)}{once}")
    print(
        f"ratio above 1 is better; changes within {comparisons.threshold_percent:g} % or the noise are not distinguishable"
    )
    for title, frame, columns in (
        ("refused", comparisons.refused, ("configuration", "reason")),
        ("not finished", comparisons.failures, ("configuration", "state", "reason")),
    ):
        if len(frame):
            print(f"\n{title}:")
            print_table(columns, frame[list(columns)].to_numpy().tolist(), cut=True)
    if options.csv:
        write_csv(comparisons, options.csv)
    return 0


def write_csv(comparisons: Comparisons, path: Path) -> Path:
    """The whole frame.

    Raises:
        WanlabError: the file cannot be written.
    """
    try:
        return to_csv(comparisons.frame, path)
    except OSError as error:
        raise WanlabError(f"cannot write {path}: {error.strerror or error}") from error


def _words(given: Sequence[str]) -> list[str]:
    """Repeated options, each perhaps several with commas."""
    return [word.strip() for text in given for word in text.split(",") if word.strip()]
