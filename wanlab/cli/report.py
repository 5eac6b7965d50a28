"""`wanlab report`: the report of a run, rendered again."""

from __future__ import annotations

import argparse
from pathlib import Path

from wanlab.core.paths import from_here
from wanlab.pages.report import render

HELP = "Render report.html again from a run folder, or from a saved notebook."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="RUN_FOLDER")


def main(options: argparse.Namespace) -> int:
    print(from_here(render(options.path)))
    return 0
