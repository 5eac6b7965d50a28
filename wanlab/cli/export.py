"""`wanlab export`: runs as a table, or into MLflow."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from wanlab.core.errors import WanlabError
from wanlab.core.paths import default_outputs
from wanlab.runs.exporters import checked_uri, to_csv, to_mlflow, to_parquet
from wanlab.runs.results import load_runs

HELP = "Give runs to other tools: as a CSV or Parquet file, or into MLflow."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `wanlab export` to a parser."""
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


def main(options: argparse.Namespace) -> int:
    """Write the runs below a folder where `--to` says; returns the exit status 0.

    Raises:
        WanlabError: an unknown target, an option of another target, no runs, or as `to_parquet` and `to_mlflow`.
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
        print(f"{len(runs)} runs, {len(runs.columns)} columns: {writers[suffix](runs, options.to)}")
        return 0
    done = to_mlflow(
        runs,
        uri,
        options.experiment or "wanlab",
        artifacts=options.artifacts,
        unfinished=options.unfinished,
    )
    left_out = f"; left out, not finished: {done.unfinished}" if done.unfinished else ""
    print(
        f"runs in {uri}: {done.new} new, {done.again} run again since, {done.known} there already{left_out}"
    )
    return 0
