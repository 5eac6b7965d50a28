"""The `wanlab` command: one table of commands. The module of a command is imported only when that command runs."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import sys
from collections.abc import Sequence

import wanlab
from wanlab.cli.command import Command, show
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.files import why

# What a user mends outside of wanlab: permissions, a full or read-only disk, a name that no file can have.
OF_THE_SYSTEM = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.EDQUOT)

GROUPS = {
    "run notebooks": {
        "run": ("run", "execute a notebook into a run folder and render its report"),
        "params": ("notebooks", "list a notebook's parameters with types, defaults and help"),
        "notebooks": ("notebooks", "list the notebooks that come with wanlab, or copy them"),
        "sweep": ("sweep", "run a grid of configurations, and write one page about them"),
    },
    "look at runs": {
        "runs": ("runs", "list runs with their state"),
        "compare": ("runs", "compare runs with a baseline and its noise"),
        "report": ("pages", "render report.html again from a run folder, or from a saved notebook"),
        "index": ("pages", "write one page about a sweep, or about all runs of a folder"),
        "publish": ("pages", "copy pages of runs into a folder for any static server"),
        "export": ("runs", "give runs to other tools: CSV, Parquet, MLflow"),
    },
    "models, configurations and engines": {
        "models": ("models", "list the models that wanlab knows, with their facts"),
        "config": ("config", "list configurations, or show and explain one on a model"),
        "techniques": ("techniques", "list techniques: what each can buy, and what it lacks here"),
        "plan": ("plan", "list precision plans, or show and explain one on a model"),
        "schema": ("schema", "print the JSON Schema of plans, configurations or sweeps, for editors"),
        "bench": ("bench", "time any engine as trtexec does"),
    },
    "serve": {
        "serve": ("serve", "serve a model as a video API with a queue and batches, and a page"),
    },
    "quality": {
        "evaluate": ("evaluate", "score an optimised video against the original"),
        "nano-eval": ("nano_eval", "examine wan-nano on photographs it never saw"),
    },
    "this machine": {
        "doctor": ("doctor", "say what this machine can do, and what would add the rest"),
    },
}
"""Heading in `wanlab --help` -> the commands below it, each with its module in `wanlab.cli` and its line of help.

The module has a `Command` of that name in its own `COMMANDS`.
"""

COMMANDS = {name: row for commands in GROUPS.values() for name, row in commands.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (2 for a mistake that the user can mend)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows only ASCII, or a name that is not UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        if not arguments or arguments[0] not in COMMANDS:
            return _without_command(arguments)
        command = load(arguments[0])
        parser = argparse.ArgumentParser(prog=f"wanlab {arguments[0]}", description=command.help)
        command.add_arguments(parser)
        return int(command.main(parser.parse_args(arguments[1:])) or 0)
    except WanlabError as error:
        show(f"wanlab: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `wanlab runs | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in OF_THE_SYSTEM:
            raise
        show(f"wanlab: error: {why(error)}", file=sys.stderr)
        return 2


def load(name: str) -> Command:
    """The command of a name; imports its module."""
    module, _ = COMMANDS[name]
    return importlib.import_module(f"wanlab.cli.{module}").COMMANDS[name]


def _without_command(arguments: Sequence[str]) -> int:
    """`--help`, `--version`, or a mistake; each ends the process."""
    parser = argparse.ArgumentParser(
        prog="wanlab",
        usage="wanlab [-h] [--version] COMMAND ...",
        description="Diagnose, convert and prove Wan2.2 image-to-video models.",
        epilog=f"{_listing()}\n\nwanlab COMMAND --help shows the options of a command",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wanlab {wanlab.__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help=argparse.SUPPRESS)
    options, _ = parser.parse_known_args(arguments)
    if options.command is None:
        parser.error("give a command")
    parser.error(f"no command {options.command!r}{did_you_mean(options.command, COMMANDS)}")


def _listing() -> str:
    width = max(map(len, COMMANDS))
    blocks = (
        "\n".join([f"{heading}:", *(f"    {name:{width}}  {line}" for name, (_, line) in commands.items())])
        for heading, commands in GROUPS.items()
    )
    return "\n\n".join(blocks)


if __name__ == "__main__":
    sys.exit(main())
