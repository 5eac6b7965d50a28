"""`wanlab index` and `wanlab publish`."""

from __future__ import annotations

import argparse
from pathlib import Path

from wanlab.core.paths import default_outputs, from_here
from wanlab.pages.publish import publish as publish_publish
from wanlab.pages.sweep_page import render_index


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", type=Path, nargs="?", metavar="DIR", help="folder of runs (default: outputs/)"
    )


def add_publish_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="DIR", help="a sweep's folder, or any folder of runs")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="new, empty, or published to before"
    )
    parser.add_argument("--notebooks", action="store_true", help="publish the executed notebooks, too")


def index(options: argparse.Namespace) -> int:
    print(from_here(render_index(options.path or default_outputs())))
    return 0


def publish(options: argparse.Namespace) -> int:
    page = publish_publish(options.path, options.to, notebooks=options.notebooks)
    files = [path for path in page.parent.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"{from_here(page)}: {len(files)} files, {size:.1f} MiB")
    return 0
