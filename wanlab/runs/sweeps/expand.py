"""From a grid to its runs: every combination, checked against the notebook's own parameters before anything starts."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wanlab.errors import WanlabError
from wanlab.runs.files import plain
from wanlab.paths import default_outputs
from wanlab.runs.parameters import Schema, checked, read_schema
from wanlab.runs.prepared import prepare
from wanlab.runs.sweeps.grid import GridFile, Part, find, values_of
from wanlab.runs.sweeps.task import Task

MOST_RUNS = 100_000


def expand(file: GridFile, *, output: str | os.PathLike | None = None, force: bool = False) -> list[Task]:
    """All runs of a grid, in the order of its axes; the first axis changes slowest.

    Raises:
        WanlabError: a notebook that is not there, an unknown parameter or a value of another type, a parameter that is
            fixed and varied, two equal runs, a filter or baseline that fits nothing. Nothing was started then.
    """
    tasks: list[Task] = []
    root = str((Path(output) if output else default_outputs()).resolve())
    parts = file.grid.parts()
    for index, part in enumerate(parts):
        at = ("notebooks", index) if file.grid.notebooks else ()
        tasks += _runs(part, at, file, root, several=len(parts) > 1, force=force)
    if not tasks:
        file.document.refuse((), "no run is left after `only` and `exclude`")
    seen: dict[str, Task] = {}
    for task in tasks:
        if other := seen.get(task.run_id):
            raise WanlabError(f"{file.path}: {task.label} and {other.label} are the same run")
        seen[task.run_id] = task
    baseline = file.grid.baseline
    if baseline and not any(fits(task.axes, baseline) for task in tasks):
        file.document.refuse(("baseline",), f"no run has {_words(baseline)}")
    return tasks


def varied(tasks: list[Task]) -> list[str]:
    """Names of the axes, in the order of the grid."""
    return list(dict.fromkeys(name for task in tasks for name in task.axes))


def fits(axes: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a run has the wanted value, or one of a list of them, on every axis that is named."""
    return all(
        name in axes
        and any(plain(axes[name]) == plain(v) for v in (value if isinstance(value, list) else [value]))
        for name, value in wanted.items()
    )


def _runs(part: Part, at: tuple, file: GridFile, root: str, *, several: bool, force: bool) -> Iterator[Task]:
    refuse = file.document.refuse
    notebook = find(part.notebook, file)
    if notebook is None:
        read_schema(Path(part.notebook))  # says which name is near
    schema = Schema(read_schema(notebook).parameters, str(notebook))
    here = ("axes",) if not at else (*at, "axes")
    axes = {}
    for name, axis in part.axes.items():
        place = (*_owner(here, name, file), name)
        if name in part.parameters:
            refuse(place, f"{name!r} is fixed under parameters and varied under axes; keep one")
        axes[name] = [_value(schema, name, value, place, file) for value in values_of(axis, place, file)]
    here = ("parameters",) if not at else (*at, "parameters")
    fixed = {
        name: _value(schema, name, value, (*_owner(here, name, file), name), file)
        for name, value in part.parameters.items()
    }
    for filters, field in ((part.only, "only"), (part.exclude, "exclude")):
        for index, wanted in enumerate(filters):
            for name in wanted:
                if name not in axes:
                    refuse(
                        (field, index, name),
                        f"{name!r} is not an axis; there are {', '.join(axes) or 'none'}",
                    )
    count = 1
    for values in axes.values():
        count *= len(values)
    if count * part.repeats > MOST_RUNS:
        refuse(at, f"{count * part.repeats:,} runs; {MOST_RUNS:,} is the limit")
    for chosen in itertools.product(*axes.values()):
        point = dict(zip(axes, chosen, strict=True))
        if part.only and not any(fits(point, wanted) for wanted in part.only):
            continue
        if any(fits(point, wanted) for wanted in part.exclude):
            continue
        for repeat in range(1, part.repeats + 1):
            ready = prepare(notebook, fixed | point, output=root, name=file.grid.name, repeat=repeat)
            yield Task(
                label=label(
                    point, notebook.stem if several or not point else "", repeat if part.repeats > 1 else 0
                ),
                notebook=str(notebook),
                overrides=plain(fixed | point),
                axes=plain(point),
                output=root,
                name=file.grid.name,
                run_id=ready.run_id,
                cwd=os.getcwd(),
                repeat=repeat,
                machine=part.machine,
                limit_s=part.limit_s,
                memory_limit_gib=part.memory_limit_gib,
                output_limit_mib=part.output_limit_mib,
                cpus=part.cpus,
                gpus=part.gpus,
                force=force,
            )


def label(point: Mapping[str, Any], notebook: str = "", repeat: int = 0) -> str:
    """`"41_configuration engine=eager plan=mine #2"`: a file is shown by its name alone."""
    words = [notebook] if notebook else []
    for name, value in point.items():
        text = str(value)
        path = Path(text)
        words.append(f"{name}={path.stem if path.suffix and path.is_file() else text}")
    return " ".join([*words, f"#{repeat}"] if repeat else words)


def _value(schema: Schema, name: str, value: Any, at: tuple, file: GridFile) -> Any:
    try:
        return checked(schema[name], value, schema.where)
    except WanlabError as error:
        file.document.refuse(at, str(error))


def _owner(at: tuple, name: str, file: GridFile) -> tuple:
    """Where a value stands: in the part itself, or in the grid around it."""
    return at if (*at, name) in file.document.lines else at[-1:]


def _words(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())
