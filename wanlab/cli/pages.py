"""`wanlab report`, `wanlab index` and `wanlab publish`: the pages of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from wanlab.cli.command import Command, show
from wanlab.core.paths import default_outputs, from_here
from wanlab.pages.publish import publish
from wanlab.pages.report import render
from wanlab.pages.sweep_page import render_index


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="RUN_FOLDER")


def report_main(options: argparse.Namespace) -> int:
    show(from_here(render(options.path)))
    return 0


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", type=Path, nargs="?", metavar="DIR", help="folder of runs (default: outputs/)"
    )


def index_main(options: argparse.Namespace) -> int:
    show(from_here(render_index(options.path or default_outputs())))
    return 0


def add_publish_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="DIR", help="a sweep's folder, or any folder of runs")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="new, empty, or published to before"
    )
    parser.add_argument("--notebooks", action="store_true", help="publish the executed notebooks, too")


def publish_main(options: argparse.Namespace) -> int:
    page = publish(options.path, options.to, notebooks=options.notebooks)
    files = [path for path in page.parent.rglob("*") if path.is_file()]
    size_mib = sum(path.stat().st_size for path in files) / 2**20
    show(f"{from_here(page)}: {len(files)} files, {size_mib:.1f} MiB")
    return 0


COMMANDS = {
    "report": Command(
        "Render report.html again from a run folder, or from a saved notebook.",
        add_report_arguments,
        report_main,
    ),
    "index": Command(
        "Write one page about a sweep, or about all runs of a folder: index.html in it.",
        add_index_arguments,
        index_main,
    ),
    "publish": Command(
        "Copy pages of runs, and what they show, into a folder for any static server.",
        add_publish_arguments,
        publish_main,
    ),
}
