"""`wanlab publish`: pages of runs, copied for a static server."""

from __future__ import annotations

import argparse
from pathlib import Path

from wanlab.core.paths import from_here
from wanlab.pages.publish import publish

HELP = "Copy pages of runs, and what they show, into a folder for any static server."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="DIR", help="a sweep's folder, or any folder of runs")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="new, empty, or published to before"
    )
    parser.add_argument("--notebooks", action="store_true", help="publish the executed notebooks, too")


def main(options: argparse.Namespace) -> int:
    page = publish(options.path, options.to, notebooks=options.notebooks)
    files = [path for path in page.parent.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"{from_here(page)}: {len(files)} files, {size:.1f} MiB")
    return 0
