"""`wanlab sweep`: executes the runs of a grid file and writes one page about them."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

from wanlab.cli.command import Command, show
from wanlab.core.errors import WanlabError
from wanlab.core.files import why
from wanlab.core.paths import from_here
from wanlab.launch.grid import Task, expand, load_grid
from wanlab.launch.ray_slots import RaySlots
from wanlab.launch.slots import LocalSlots, default_slots, visible_gpus
from wanlab.launch.sweep import Executor, SweepOutcome, sweep
from wanlab.runs.estimate import EarlierRuns, total
from wanlab.runs.parameters import read_notebook
from wanlab.runs.prepare import prepare

HELP = """Run every configuration of a grid file, several at a time where the machine allows, and write one page about
them. What has finished is not run again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("grid", type=Path, help="YAML file, e.g. recipes/sweeps/wan-nano-precision.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the runs and how long they take, and start nothing"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of all runs (default: outputs/)")
    parser.add_argument(
        "--slots", type=_count, metavar="N", help="runs at a time (default: one a GPU, or by cores)"
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run on a Ray cluster; without an address one is started on this machine",
    )
    parser.add_argument("--force", action="store_true", help="run again what has finished; it is kept")


def main(options: argparse.Namespace) -> int:
    file = load_grid(options.grid)
    tasks = expand(file, output=options.output, force=options.force)
    if options.dry_run:
        show(table(tasks, force=options.force, slots=options.slots))
        return 0
    executor = make_executor(tasks, options)
    try:
        outcome = sweep(file, tasks, executor)
    except OSError as error:  # a full disk
        raise WanlabError(
            f"the sweep was stopped: {why(error)}; what has finished is kept, and the next start goes on"
        ) from error
    finally:
        executor.close()
    show(summary(outcome))
    show(from_here(outcome.index))
    return outcome.exit_code


def make_executor(tasks: list[Task], options: argparse.Namespace) -> Executor:
    if options.ray is not None:
        return RaySlots(options.ray or None, slots=options.slots)
    return LocalSlots(options.slots, preload=imports(tasks))


def imports(tasks: list[Task]) -> list[str]:
    """Modules that the notebooks of these tasks import, and those for loading a model."""
    modules: dict[str, None] = {}
    for notebook in dict.fromkeys(task.notebook for task in tasks):
        for cell in read_notebook(Path(notebook)).cells:
            if cell.cell_type != "code":
                continue
            try:
                tree = ast.parse(cell.source)
            except SyntaxError:
                continue  # a magic, or a mistake that the run reports
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    modules |= dict.fromkeys(alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    modules |= dict.fromkeys(f"{node.module}.{alias.name}" for alias in node.names)
    if "wanlab.models" in modules:
        modules |= dict.fromkeys(
            ("wanlab.models.loading", "wanlab.models.pipeline", "diffusers.pipelines.wan")
        )
    return list(modules)


def table(tasks: list[Task], *, force: bool = False, slots: int | None = None) -> str:
    """The runs as lines: label, id, machine, whether it has finished before, and what it takes; then what all take.

    Args:
        slots: shared runs at a time; the number that `sweep` takes if None.
    """
    earlier = EarlierRuns(*{Path(task.output) for task in tasks})
    rows, expected, alone = [("run", "id", "machine", "state", "expected here")], [], []
    for task in tasks:
        ready = prepare(task.notebook, task.overrides, output=task.output, name=task.name, repeat=task.repeat)
        done = not force and bool(ready.finished())
        found = None if done else earlier.estimate(ready, force=True)
        if found is not None:
            expected.append(found)
            alone.append(task.alone)
        state, words = ("finished before", "") if found is None else ("to run", found.text)
        rows.append((task.label, task.run_id, task.machine, state, words))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    whole = total(expected, alone, slots or default_slots(visible_gpus()))
    return "\n".join([*lines, f"{len(tasks)} runs, {len(expected)} to run", f"expected here: {whole}"])


def summary(outcome: SweepOutcome) -> str:
    known = f" ({outcome.reused} before)" if outcome.reused else ""
    parts = [f"{outcome.counts.get('finished', 0)} finished{known}"]
    parts += [f"{count} {state}" for state, count in sorted(outcome.counts.items()) if state != "finished"]
    return f"{outcome.state}: {', '.join(parts)}, {outcome.seconds:.1f} s"


def _count(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of slots from 1 to 1024")
    return int(text)


COMMANDS = {"sweep": Command(HELP, add_arguments, main)}
