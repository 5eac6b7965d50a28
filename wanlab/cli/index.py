"""`wanlab index`: one page about a sweep, or about all runs of a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from wanlab.core.paths import default_outputs, from_here
from wanlab.pages.sweep_page import render_index

HELP = "Write one page about a sweep, or about all runs of a folder: index.html in it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", type=Path, nargs="?", metavar="DIR", help="folder of runs (default: outputs/)"
    )


def main(options: argparse.Namespace) -> int:
    print(from_here(render_index(options.path or default_outputs())))
    return 0
