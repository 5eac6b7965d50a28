"""`wanlab runs`: the runs below a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from wanlab.cli.text import print_table
from wanlab.core.paths import default_outputs
from wanlab.runs.results import load_runs

HELP = "List runs with their state."
COLUMNS = ("name", "run_id", "state", "started", "seconds", "verdict")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, nargs="?", help="folder of runs (default: the project's outputs/)")


def main(options: argparse.Namespace) -> int:
    path = options.path or default_outputs()
    frame = load_runs(path)
    if frame.empty:
        print(f"no runs in {path}")
        return 0
    cells = frame[list(COLUMNS)].astype(object).where(frame[list(COLUMNS)].notna(), "")
    print_table(COLUMNS, cells.to_numpy().tolist())
    return 0
