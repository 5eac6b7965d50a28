"""`wanlab schema`: the JSON Schemas of the YAML files that people write, for editors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from wanlab.cli.command import Command, show
from wanlab.core.errors import WanlabError
from wanlab.core.files import write_text
from wanlab.core.paths import from_here
from wanlab.launch.schemas import KINDS, NOT_SAID, file_schema

HELP = """Print the JSON Schema of precision plans, configurations or grids of sweeps, or write all three as files. An editor
checks and completes a YAML file whose first line is `# yaml-language-server: $schema=PATH`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    said = "; ".join(f"of a {kind}, {text}" for kind, text in NOT_SAID.items())
    parser.epilog = f"What a schema does not check: {said}."
    parser.add_argument("kind", nargs="?", choices=list(KINDS), help="kind of file")
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="write plan.json, configuration.json and sweep.json there"
    )


def main(options: argparse.Namespace) -> int:
    if (options.kind is None) == (options.to is None):
        raise WanlabError(f"give a kind of file, {', '.join(KINDS)}, to print, or --to DIR to write all")
    if options.kind:
        show(text(options.kind), end="")
        return 0
    for kind in KINDS:
        show(from_here(write_text(options.to / f"{kind}.json", text(kind))))
    return 0


def text(kind: str) -> str:
    """The schema of a kind of file as its file holds it."""
    return json.dumps(file_schema(kind), indent=2, ensure_ascii=False) + "\n"


COMMANDS = {"schema": Command(HELP, add_arguments, main)}
