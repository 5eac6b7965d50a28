"""`wanlab params`: the parameters of a notebook."""

from __future__ import annotations

import argparse

from wanlab.cli.text import print_table
from wanlab.runs.parameters import read_schema

HELP = "List a notebook's parameters with types, defaults and help."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("notebook", help="a file, or the name of a notebook such as 00_quickstart")


def main(options: argparse.Namespace) -> int:
    rows = [(p.name, p.type_text, repr(p.default), p.help) for p in read_schema(options.notebook).parameters]
    if rows:
        print_table(("parameter", "type", "default", "help"), rows)
    else:
        print(f"{options.notebook} has no parameters")
    return 0
