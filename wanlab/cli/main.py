"""The `wanlab` command. Each subcommand imports what it needs when it runs: `wanlab --help` is quick."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanlab.core.errors import WanlabError
from wanlab.core.paths import from_here

# Commands with a module of their own (`add_arguments`, `main`), which is imported only for its command.
ELSEWHERE = {
    "sweep": ("wanlab.cli.sweep", "run a grid of configurations, and write one page about them"),
    "compare": ("wanlab.cli.compare", "hold runs against a baseline and its noise"),
    "evaluate": ("wanlab.cli.evaluate", "score an optimised video against the original"),
    "bench": ("wanlab.cli.bench", "time any engine as trtexec does"),
    "plan": ("wanlab.cli.plan", "say what a precision plan comes to on a model, and why"),
    "nano-eval": ("wanlab.cli.nano_eval", "examine wan-nano on photographs it never saw"),
    "export": ("wanlab.cli.export", "give runs to other tools: CSV, Parquet, MLflow"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (2 for a mistake the user can mend)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        options = _parser(arguments).parse_args(arguments)
        return int(options.run(options) or 0)
    except WanlabError as error:
        print(f"wanlab: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `wanlab runs | head`
        sys.stderr.close()
        return 0


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    import wanlab

    parser = argparse.ArgumentParser(
        prog="wanlab", description="Diagnose, convert and prove Wan2.2 image-to-video models."
    )
    parser.add_argument("--version", action="version", version=f"wanlab {wanlab.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute a notebook into a run folder and render its report")
    run.set_defaults(run=_run)
    run.add_argument("notebook", type=Path)
    run.add_argument(
        "-p",
        "--parameter",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a parameter; repeatable",
    )
    run.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of all runs (default: the project's outputs/)"
    )
    run.add_argument("--name", help="folder of this notebook's runs (default: its file name)")
    run.add_argument(
        "--force", action="store_true", help="run again although a finished run exists; it is kept"
    )
    run.add_argument("--timeout", type=_positive, metavar="SECONDS", help="limit for the whole notebook")
    run.add_argument(
        "--memory-limit", type=_positive, metavar="GIB", help="limit for what the notebook holds in RAM"
    )
    run.add_argument(
        "--output-limit",
        type=_positive,
        default=256.0,
        metavar="MIB",
        help="limit for what the notebook prints and shows (default: %(default)g)",
    )

    params = commands.add_parser("params", help="list a notebook's parameters with types, defaults and help")
    params.set_defaults(run=_params)
    params.add_argument("notebook", type=Path)

    for name, (module, said) in ELSEWHERE.items():
        command = commands.add_parser(name, help=said)
        if name in arguments[:1]:
            own = importlib.import_module(module)
            own.add_arguments(command)
            command.set_defaults(run=own.main)

    doctor = commands.add_parser("doctor", help="say what this machine can do, and what would add the rest")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")

    models = commands.add_parser("models", help="list the models that wanlab knows, with their facts")
    models.set_defaults(run=_models)
    models.add_argument("name", nargs="?", help="show the components of one model")

    report = commands.add_parser(
        "report", help="render report.html again from a run folder, or from a saved notebook"
    )
    report.set_defaults(run=_report)
    report.add_argument("path", type=Path, metavar="RUN_FOLDER")

    index = commands.add_parser("index", help="one page about a sweep, or about all runs of a folder")
    publish = commands.add_parser("publish", help="copy pages of runs into a folder for any static server")
    if arguments[:1] in (["index"], ["publish"]):
        from wanlab.cli import pages as pages_cli

        pages_cli.add_index_arguments(index)
        index.set_defaults(run=pages_cli.index)
        pages_cli.add_publish_arguments(publish)
        publish.set_defaults(run=pages_cli.publish)

    runs = commands.add_parser("runs", help="list runs with their state")
    runs.set_defaults(run=_runs)
    runs.add_argument("path", type=Path, nargs="?", help="folder of runs (default: the project's outputs/)")
    return parser


def _run(options: argparse.Namespace) -> int:
    from wanlab.core.files import read_json
    from wanlab.launch.execute import execute
    from wanlab.runs.parameters import read_schema

    schema = read_schema(options.notebook)
    outcome = execute(
        options.notebook,
        schema.parse(options.parameter),
        output=options.output,
        name=options.name,
        force=options.force,
        timeout_s=options.timeout,
        memory_limit_gib=options.memory_limit,
        output_limit_mib=options.output_limit,
    )
    verdict = read_json(outcome.folder / "run.json").get("verdict")
    if outcome.state != "finished":
        print(f"wanlab: {outcome.state}: {outcome.error}", file=sys.stderr)
    elif outcome.reused:
        print("finished earlier with the same notebook, parameters and code; --force runs it again")
    if verdict:
        print(verdict)
    print(from_here(outcome.report if outcome.report.is_file() else outcome.folder))
    return outcome.exit_code


def _params(options: argparse.Namespace) -> int:
    from wanlab.runs.parameters import read_schema

    rows = [(p.name, p.type_text, repr(p.default), p.help) for p in read_schema(options.notebook).parameters]
    if not rows:
        print(f"{options.notebook} has no parameters")
    else:
        _table(("parameter", "type", "default", "help"), rows)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from wanlab.cli import doctor

    return doctor.main(as_json=options.json)


def _models(options: argparse.Namespace) -> int:
    from wanlab.models.facts import facts
    from wanlab.models.registry import get, names

    if options.name:
        spec = get(options.name)
        print(f"{spec.name}: {spec.pipeline_class}, weights from {spec.source}")
        print(facts(spec).to_string(index=False))
        return 0
    rows = []
    for name in names():
        try:
            spec = get(name)
        except WanlabError as error:
            rows.append((name, "", "", "", str(error)))
            continue
        size = f"{spec.defaults.width}x{spec.defaults.height}x{spec.defaults.frames}"
        boundary = "one expert" if spec.boundary_ratio is None else f"boundary {spec.boundary_ratio:g}"
        rows.append((name, size, f"{spec.defaults.steps} steps", boundary, ", ".join(spec.components)))
    _table(("model", "default size", "default", "experts", "components"), rows)
    print("wanlab models NAME shows parameters, bytes and FLOPs of each component")
    return 0


def _report(options: argparse.Namespace) -> int:
    from wanlab.pages.report import render

    print(from_here(render(options.path)))
    return 0


def _runs(options: argparse.Namespace) -> int:
    from wanlab.core.paths import default_outputs
    from wanlab.runs.results import load_runs

    path = options.path or default_outputs()
    frame = load_runs(path)
    if frame.empty:
        print(f"no runs in {path}")
        return 0
    columns = ("name", "run_id", "state", "started", "seconds", "verdict")
    rows = [
        tuple("" if row[c] is None or row[c] != row[c] else str(row[c]) for c in columns)
        for _, row in frame.iterrows()
    ]
    _table(columns, rows)
    return 0


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    widths = [max(len(str(line[i])) for line in (head, *rows)) for i in range(len(head) - 1)]
    for line in (head, *rows):
        print(
            "  ".join(
                [*(str(c).ljust(w) for c, w in zip(line, widths, strict=False)), str(line[-1])]
            ).rstrip()
        )


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
