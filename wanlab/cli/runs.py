"""`wanlab runs`, `wanlab compare` and `wanlab export`: tables of saved runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from wanlab.cli.command import Command, print_table, safe, show
from wanlab.core.errors import WanlabError
from wanlab.core.paths import default_outputs
from wanlab.runs.choose import DRIFT, readable
from wanlab.runs.compare import THRESHOLD_PERCENT, Comparisons, compare
from wanlab.runs.exporters import checked_uri, to_csv, to_mlflow, to_parquet
from wanlab.runs.results import load_runs

COLUMNS = ("name", "run_id", "state", "started", "seconds", "verdict")


def add_runs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, nargs="?", help="folder of runs (default: the project's outputs/)")


def runs_main(options: argparse.Namespace) -> int:
    path = options.path or default_outputs()
    frame = load_runs(path)
    if frame.empty:
        show(f"no runs in {path}")
        return 0
    ended = frame["state"].isin(["finished", "running"])
    frame = frame.assign(verdict=frame["verdict"].where(ended, frame["reason"]))
    cells = frame[list(COLUMNS)].astype(object).where(frame[list(COLUMNS)].notna(), "")
    print_table(COLUMNS, cells.to_numpy().tolist())
    return 0


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
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


def compare_main(options: argparse.Namespace) -> int:
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
    show(f"baseline {safe(comparisons.baseline.label)}{once}")
    show(
        f"ratio above 1 is better; changes within {comparisons.threshold_percent:g} % or the noise are not distinguishable"
    )
    if comparisons.cautions:
        show(safe(comparisons.place))
    for title, frame, columns in (
        ("refused", comparisons.refused, ("configuration", "reason")),
        ("not finished", comparisons.failures, ("configuration", "state", "reason")),
    ):
        if len(frame):
            show(f"\n{title}:")
            print_table(columns, frame[list(columns)].to_numpy().tolist(), cut=True)
    if options.csv:
        write_csv(comparisons, options.csv)
    return 0


def write_csv(comparisons: Comparisons, path: Path) -> Path:
    """Write the frame of a comparison as CSV.

    Raises:
        WanlabError: the file cannot be written.
    """
    try:
        return to_csv(comparisons.frame, path)
    except OSError as error:
        raise WanlabError(f"cannot write {path}: {error.strerror or error}") from error


def _words(options: Sequence[str]) -> list[str]:
    """Words of repeated options, of which each may have several with commas."""
    return [word.strip() for text in options for word in text.split(",") if word.strip()]


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, nargs="?", help="folder of runs (default: the project's outputs/)")
    parser.add_argument("--to", required=True, metavar="WHERE", help="a .csv or .parquet file, or mlflow")
    parser.add_argument(
        "--uri", help="where MLflow keeps runs (default: $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)"
    )
    parser.add_argument("--experiment", metavar="NAME", help="MLflow experiment (default: wanlab)")
    parser.add_argument(
        "--artifacts", action="store_true", help="give MLflow each report.html, not a link to it"
    )
    parser.add_argument(
        "--unfinished", action="store_true", help="give MLflow runs that failed or were stopped, too"
    )


def export_main(options: argparse.Namespace) -> int:
    """Write the runs below a folder to the target `--to`; returns the exit status 0.

    Raises:
        WanlabError: an unknown target, an option of another target, no runs, or an error of the writer.
    """
    suffix = Path(options.to).suffix.lower()
    writers = {".csv": to_csv, ".parquet": to_parquet}
    if options.to != "mlflow" and suffix not in writers:
        raise WanlabError(f"--to {options.to}: give a name that ends in .csv or .parquet, or mlflow")
    if options.to != "mlflow" and (
        options.uri or options.experiment or options.artifacts or options.unfinished
    ):
        raise WanlabError("--uri, --experiment, --artifacts and --unfinished go with --to mlflow")
    uri = options.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if options.to == "mlflow":
        checked_uri(uri)  # before hundreds of folders are read
    path = options.path or default_outputs()
    runs = load_runs(path)
    if runs.empty:
        raise WanlabError(f"no runs in {path}")
    if options.to != "mlflow":
        show(f"{len(runs)} runs, {len(runs.columns)} columns: {writers[suffix](runs, options.to)}")
        return 0
    exported = to_mlflow(
        runs,
        uri,
        options.experiment or "wanlab",
        artifacts=options.artifacts,
        unfinished=options.unfinished,
    )
    left_out = f"; left out, not finished: {exported.unfinished}" if exported.unfinished else ""
    show(
        f"runs in {uri}: {exported.new} new, {exported.again} run again since, {exported.known} there already{left_out}"
    )
    return 0


COMMANDS = {
    "runs": Command("List runs with their state.", add_runs_arguments, runs_main),
    "compare": Command(
        """Compare the configurations of runs with a baseline: ratio, interval and verdict of each. A difference within
the noise or the threshold does not count, and runs of other work than the baseline's are refused.""",
        add_compare_arguments,
        compare_main,
    ),
    "export": Command(
        "Give runs to other tools: as a CSV or Parquet file, or into MLflow.",
        add_export_arguments,
        export_main,
    ),
}
