"""`wanlab notebooks` and `wanlab params`: the notebooks that come with wanlab, and the parameters of one."""

from __future__ import annotations

import argparse
from pathlib import Path

from wanlab.cli.command import Command, print_table, show
from wanlab.core.errors import WanlabError
from wanlab.core.files import why, write_bytes
from wanlab.core.paths import existing, from_here, notebooks
from wanlab.runs.catalogue import questions
from wanlab.runs.parameters import read_schema


def add_notebooks_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=Path, metavar="DIR", help="copy them into this folder")
    parser.add_argument("--force", action="store_true", help="overwrite notebooks in DIR that were changed")


def notebooks_main(options: argparse.Namespace) -> int:
    folder = existing(notebooks())
    if options.to is None:
        rows = [(row.group, row.notebook, row.question) for row in questions(folder)]
        print_table(("about", "notebook", "question"), rows)
        return 0
    copied = copy_notebooks(folder, options.to, force=options.force)
    show(f"{len(copied)} notebooks in {from_here(options.to)}")
    return 0


def copy_notebooks(folder: Path, target: Path, *, force: bool = False) -> list[Path]:
    """Copy every notebook of a folder into another folder, which is created if needed; returns the copies.

    Raises:
        WanlabError: a notebook in `target` differs and `force` is False (then nothing is copied), or a file cannot be
            written.
    """
    contents = {target / path.name: path.read_bytes() for path in sorted(folder.glob("*.ipynb"))}
    changed = [
        path.name for path, content in contents.items() if path.exists() and path.read_bytes() != content
    ]
    if changed and not force:
        raise WanlabError(
            f"{target} has notebooks that differ: {', '.join(changed)}; --force overwrites them"
        )
    try:
        for path, content in contents.items():
            write_bytes(path, content)
    except OSError as error:
        raise WanlabError(f"cannot copy notebooks to {target}: {why(error)}") from error
    return list(contents)


def add_params_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("notebook", help="a file, or the name of a notebook such as 00_quickstart")


def params_main(options: argparse.Namespace) -> int:
    rows = [(p.name, p.type_text, repr(p.default), p.help) for p in read_schema(options.notebook).parameters]
    if rows:
        print_table(("parameter", "type", "default", "help"), rows)
    else:
        show(f"{options.notebook} has no parameters")
    return 0


COMMANDS = {
    "params": Command(
        "List a notebook's parameters with types, defaults and help.", add_params_arguments, params_main
    ),
    "notebooks": Command(
        """List the notebooks that come with wanlab, each with the question that it answers. `wanlab run NAME` runs one
by its name; --to copies them all, to open and change them.""",
        add_notebooks_arguments,
        notebooks_main,
    ),
}
