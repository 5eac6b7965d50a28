"""`wanlab run`: executes one notebook into a run folder with a report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wanlab.cli.command import Command, assigned, positive, show
from wanlab.core.files import read_json
from wanlab.core.paths import from_here
from wanlab.launch.execute import execute
from wanlab.runs.estimate import EarlierRuns
from wanlab.runs.parameters import read_schema
from wanlab.runs.prepare import prepare

HELP = """Execute a notebook into a run folder and render its report. The last line that is printed is the path of the
report. A finished run with the same notebook, parameters and code is not run again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("notebook", help="a file, or the name of a notebook such as 00_quickstart (see `wanlab notebooks`)")
    add(
        "-p",
        "--parameter",
        action="append",
        default=[],
        type=assigned,
        metavar="NAME=VALUE",
        help="override a parameter; repeatable",
    )
    add("--output", type=Path, metavar="DIR", help="folder of all runs (default: the project's outputs/)")
    add("--name", help="folder of this notebook's runs (default: its file name)")
    add(
        "--estimate",
        action="store_true",
        help="print the minutes and GiB that are expected on this machine, and how they are known; run nothing",
    )
    add("--force", action="store_true", help="run again although a finished run exists; it is kept")
    add("--timeout", type=positive, metavar="SECONDS", help="time limit of the whole notebook")
    add("--memory-limit", type=positive, metavar="GIB", help="limit of the RAM that the notebook uses")
    add(
        "--output-limit",
        type=positive,
        default=256.0,
        metavar="MIB",
        help="limit of what the notebook prints and shows (default: %(default)g)",
    )


def main(options: argparse.Namespace) -> int:
    parameters = read_schema(options.notebook).parse(options.parameter)
    if options.estimate:
        ready = prepare(options.notebook, parameters, output=options.output, name=options.name)
        found = EarlierRuns(options.output).estimate(ready, force=options.force)
        show(f"{ready.path.stem}: {found.sentence}")
        return 0
    outcome = execute(
        options.notebook,
        parameters,
        output=options.output,
        name=options.name,
        force=options.force,
        timeout_s=options.timeout,
        memory_limit_gib=options.memory_limit,
        output_limit_mib=options.output_limit,
    )
    record = read_json(outcome.folder / "run.json")
    if outcome.state != "finished":
        show(f"wanlab: {outcome.state}: {outcome.error}", file=sys.stderr)
    elif outcome.reused:
        show("finished earlier with the same notebook, parameters and code; --force runs it again")
    for sentence in (record.get("verdict"), *(record.get("details") or ())):
        if sentence:
            show(sentence)
    if following := record.get("next"):
        show(f"next: {following['why']}" + (f"\n  {following['command']}" if following["command"] else ""))
    show(from_here(outcome.report if outcome.report.is_file() else outcome.folder))
    return outcome.exit_code


COMMANDS = {"run": Command(HELP, add_arguments, main)}
