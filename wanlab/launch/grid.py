"""The grid file of a sweep and the runs that it makes, all checked before the first starts."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from wanlab.core import limits
from wanlab.core.errors import WanlabError, clean, did_you_mean
from wanlab.core.files import is_name, plain
from wanlab.core.paths import default_outputs, find_notebook, locate, locate_all
from wanlab.core.yaml_lines import Document, load_yaml
from wanlab.runs.folder import RunFolder
from wanlab.runs.parameters import Schema, read_schema, read_value
from wanlab.runs.prepare import prepare
from wanlab.runs.rules import faults

CONFIGURED_BY = ("configuration", "plan", "engine")
"""Parameters that name a configuration; an error in it is reported at the first of them that varies."""


@dataclass(frozen=True)
class Task:
    """One run of a sweep: its notebook, parameters, folder and needs.

    Attributes:
        label: its varied parameters in words.
        axes: its varied parameters.
        overrides: all parameters given to the notebook, in their types.
        output, name: `output/name/run_id/` is its folder; absolute, because workers may start in another folder.
        run_id: its identity when the sweep started.
        cwd: working folder of the run.
        repeat: number of this run among equal runs, from 1.
        machine: `"alone"` or `"shared"`.
    """

    label: str
    notebook: str
    overrides: dict[str, Any]
    axes: dict[str, Any]
    output: str
    name: str
    run_id: str
    cwd: str
    repeat: int = 1
    machine: str = "shared"
    limit_s: float | None = None
    memory_limit_gib: float | None = None
    output_limit_mib: float = 256.0
    cpus: float = 1.0
    gpus: float | None = None
    force: bool = False

    @property
    def folder(self) -> RunFolder:
        return RunFolder.of(Path(self.output), self.name, self.run_id)

    @property
    def log(self) -> Path:
        """Log of the worker; the output of the run is in its folder."""
        return Path(self.output) / self.name / "logs" / f"{self.run_id}.log"

    @property
    def alone(self) -> bool:
        return self.machine == "alone"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        return cls(**json.loads(text))


Machine = Literal["shared", "alone"]
Count = Annotated[int, msgspec.Meta(ge=1)]
Above0 = Annotated[float, msgspec.Meta(gt=0)]
From0 = Annotated[float, msgspec.Meta(ge=0)]


class Part(msgspec.Struct, forbid_unknown_fields=True):
    """One notebook of a grid. A field that is not given is the grid's.

    Attributes:
        notebook: path from the working folder or the grid file's folder, or the name of a notebook of wanlab.
        parameters: parameters with one value for all its runs.
        axes: parameter -> values: a list, `{from: 2, to: 10, by: 2}` with both ends, or `{files: plans/*.yaml}`.
        only, exclude: mappings of axis -> value or list of values of that axis; a run is made if it fits one of `only` (if
            any are given) and none of `exclude`.
        repeats: number of equal runs of each configuration; each has its own folder.
        machine: `"alone"` for timings, which no other run may disturb; `"shared"` for the rest.
        limit_s: most seconds of one run.
        memory_limit_gib: most memory of one run.
        output_limit_mib: most that one run may print and show.
        cpus, gpus: what one run needs on a cluster.
    """

    notebook: str
    parameters: dict[str, Any] | None = None
    axes: dict[str, Any] | None = None
    only: list[dict[str, Any]] | None = None
    exclude: list[dict[str, Any]] | None = None
    repeats: Count | None = None
    machine: Machine | None = None
    limit_s: Above0 | None = None
    memory_limit_gib: Above0 | None = None
    output_limit_mib: Above0 | None = None
    cpus: Above0 | None = None
    gpus: From0 | None = None


class Grid(msgspec.Struct, forbid_unknown_fields=True):
    """A sweep of one notebook or several.

    Attributes:
        name: name of its folder below `outputs/`.
        title: title of its page.
        notebook: the notebook of all runs, by path or name.
        notebooks: several, in place of `notebook`; the fields of each count before those of the grid.
        baseline: axis -> value of the configuration that the others are compared with.
        show: columns that the page shows first.
    """

    name: str
    title: str = ""
    notebook: str | None = None
    notebooks: list[Part] | None = None
    parameters: dict[str, Any] = {}
    axes: dict[str, Any] = {}
    only: list[dict[str, Any]] = []
    exclude: list[dict[str, Any]] = []
    repeats: Count = 1
    machine: Machine = "shared"
    limit_s: Above0 | None = None
    memory_limit_gib: Above0 | None = None
    output_limit_mib: Above0 = 256.0
    cpus: Above0 = 1.0
    gpus: From0 | None = None
    baseline: dict[str, Any] = {}
    show: list[str] = []

    def parts(self) -> list[Part]:
        """Every notebook with the grid's fields filled in."""
        merged = []
        for part in self.notebooks or [Part(self.notebook or "")]:
            own = {name: getattr(part, name) for name in Part.__struct_fields__}
            for name, value in own.items():
                if name in ("parameters", "axes"):
                    own[name] = {**getattr(self, name), **(value or {})}
                elif value is None:
                    own[name] = getattr(self, name)
            merged.append(Part(**own))
        return merged


class GridFile(msgspec.Struct):
    """A grid with the line of each of its values, for later error messages."""

    grid: Grid
    path: Path
    document: Document


def load_grid(path: str | os.PathLike) -> GridFile:
    """A grid from a YAML file.

    Raises:
        WanlabError: no such file, unreadable YAML, an unknown field, a value of another type, no notebook. The message names
            the line.
    """
    path = locate(path)
    if not os.path.isfile(path):
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise WanlabError(f"no grid at {path}{did_you_mean(path.name, near)}")
    document = load_yaml(path, "the grid")
    data, refuse = document.data, document.refuse
    if not isinstance(data, dict):
        refuse((), "a grid is a mapping with name, notebook, parameters and axes")
    document.known_fields(data, Grid)
    for index, part in enumerate(data["notebooks"] if isinstance(data.get("notebooks"), list) else ()):
        if isinstance(part, dict):
            document.known_fields(part, Part, ("notebooks", index))
    grid = document.convert(Grid)
    if not is_name(grid.name):
        refuse(("name",), f"{grid.name!r} cannot be a folder's name: use letters, digits, and . _ + -")
    if (grid.notebook is None) == (not grid.notebooks):
        refuse((), "give either `notebook: PATH` or a list `notebooks:`")
    return GridFile(grid, path, document)


def values_of(axis: Any, at: tuple, file: GridFile) -> list[Any]:
    """The values of an axis: a list, `{from, to, by}` with both ends, or `{files: pattern}`.

    Files are looked for from the working folder and the grid file's folder, and given as one types them. A list may contain
    the two other forms among its values.
    """
    refuse = file.document.refuse
    if isinstance(axis, dict):
        if set(axis) == {"files"} and isinstance(axis["files"], str):
            return _files(axis["files"], (*at, "files"), file)
        if {"from", "to"} <= set(axis) <= {"from", "to", "by"}:
            return _range(axis, at, file)
        refuse(at, "an axis is a list of values, {from: 2, to: 10, by: 2}, or {files: plans/*.yaml}")
    if not isinstance(axis, list):
        refuse(at, f"an axis is a list of values, here {axis!r}; a fixed value belongs under parameters")
    values: list[Any] = []
    for index, value in enumerate(axis):
        values += values_of(value, (*at, index), file) if isinstance(value, dict) else [value]
    if not values:
        refuse(at, "no values")
    return values


def find(path: str, file: GridFile) -> Path | None:
    """A file named in a grid, from the working folder, the grid file's folder or the folder above that; None without one."""
    for root in (Path(), file.path.parent, file.path.parent.parent):
        if os.path.isfile(root / path):  # also where no file can have this name
            return root / path
    return None


def _files(pattern: str, at: tuple, file: GridFile) -> list[str]:
    for root in (Path(), file.path.parent, file.path.parent.parent):
        try:
            files = sorted(str(p) for p in root.glob(pattern) if p.is_file())
        except (ValueError, NotImplementedError) as error:
            file.document.refuse(at, f"{pattern!r} is no pattern of relative paths: {error}")
        if files:
            return files
    if files := locate_all(pattern):
        return files
    file.document.refuse(at, f"no file fits {pattern!r} from here or from {file.path.parent}")


def _range(axis: dict, at: tuple, file: GridFile) -> list[Any]:
    first, last, step = axis["from"], axis["to"], axis.get("by", 1)
    numbers = [first, last, step]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers):
        file.document.refuse(at, f"from {first!r} to {last!r} by {step!r} is no range of numbers")
    start, end, by = map(Fraction, map(repr, numbers))  # exact, as written: 0.1, 0.2, 0.3
    if by <= 0 or end < start:
        file.document.refuse(
            at, f"from {first!r} to {last!r} by {step!r} is no range: it goes upwards, with by above 0"
        )
    count = (end - start) // by + 1
    if words := limits.over("axis_values", count):
        file.document.refuse(at, f"number of values: {words}")
    kind = float if any(isinstance(value, float) for value in numbers) else int
    return [kind(start + index * by) for index in range(count)]


def expand(file: GridFile, *, output: str | os.PathLike | None = None, force: bool = False) -> list[Task]:
    """All runs of a grid, in the order of its axes; the first axis changes slowest.

    Raises:
        WanlabError: no such notebook, an unknown parameter or a value of another type, a parameter that is fixed and varied,
            two equal runs, or a filter or baseline that no run fits.
    """
    tasks: list[Task] = []
    root = str((Path(output) if output else default_outputs()).resolve())
    parts = file.grid.parts()
    for index, part in enumerate(parts):
        at = ("notebooks", index) if file.grid.notebooks else ()
        tasks += _runs(part, at, file, root, several=len(parts) > 1, force=force)
    if not tasks:
        file.document.refuse((), "no run is left after `only` and `exclude`")
    by_id: dict[str, Task] = {}
    for task in tasks:
        if other := by_id.get(task.run_id):
            raise WanlabError(f"{file.path}: {task.label} and {other.label} are the same run")
        by_id[task.run_id] = task
    baseline = file.grid.baseline = _baseline(file, parts)
    if baseline and not any(fits(task.axes, baseline) for task in tasks):
        file.document.refuse(("baseline",), f"no run has {_words(baseline)}")
    return tasks


def varied(tasks: list[Task]) -> list[str]:
    """Names of the axes, in the order of the grid."""
    return list(dict.fromkeys(name for task in tasks for name in task.axes))


def fits(axes: Mapping[str, Any], conditions: Mapping[str, Any]) -> bool:
    """Whether a run fits conditions: for each axis in them the given value, or one of a list."""
    return all(
        name in axes
        and any(plain(axes[name]) == plain(v) for v in (value if isinstance(value, list) else [value]))
        for name, value in conditions.items()
    )


def _baseline(file: GridFile, parts: list[Part]) -> dict[str, Any]:
    """The grid's baseline with values in the types of their parameters."""
    given = file.grid.baseline
    part = next((part for part in parts if set(given) <= set(part.axes)), None)
    if part is None:
        return given
    schema = _schema(_notebook(part, file))
    return {name: _value(schema, name, value, ("baseline", name), file) for name, value in given.items()}


def _notebook(part: Part, file: GridFile) -> Path:
    return find(part.notebook, file) or find_notebook(part.notebook)


def _schema(notebook: Path) -> Schema:
    return Schema(read_schema(notebook).parameters, str(notebook))


def _runs(part: Part, at: tuple, file: GridFile, root: str, *, several: bool, force: bool) -> Iterator[Task]:
    refuse = file.document.refuse
    notebook = _notebook(part, file)
    schema = _schema(notebook)
    here = ("axes",) if not at else (*at, "axes")
    axes = {}
    for name, axis in part.axes.items():
        place = (*_owner(here, name, file), name)
        if name in part.parameters:
            refuse(place, f"{name!r} is fixed under parameters and varied under axes; keep one")
        axes[name] = _different(
            [_value(schema, name, value, place, file) for value in values_of(axis, place, file)], place, file
        )
    here = ("parameters",) if not at else (*at, "parameters")
    fixed = {
        name: _value(schema, name, value, (*_owner(here, name, file), name), file)
        for name, value in part.parameters.items()
    }
    filters = {}
    for field, listed in (("only", part.only), ("exclude", part.exclude)):
        own = not at or (*at, field) in file.document.lines
        place = (*at, field) if own else (field,)
        filters[field] = [
            _conditions(conditions, axes, schema, (*place, index), file, other_axes=not own)
            for index, conditions in enumerate(listed)
        ]
    count = 1
    for values in axes.values():
        count *= len(values)
    if words := limits.over("runs", count * part.repeats):
        refuse(at, f"number of runs: {words}")
    for chosen in itertools.product(*axes.values()):
        point = dict(zip(axes, chosen, strict=True))
        if filters["only"] and not any(fits(point, conditions) for conditions in filters["only"]):
            continue
        if any(fits(point, conditions) for conditions in filters["exclude"]):
            continue
        for repeat in range(1, part.repeats + 1):
            try:
                ready = prepare(notebook, fixed | point, output=root, name=file.grid.name, repeat=repeat)
            except WanlabError as error:  # no such configuration, or an engine that cannot use a plan
                named = next((name for name in CONFIGURED_BY if name in point), None)
                place = (*_owner((*at, "axes"), named, file), named) if named else at
                file.document.refuse(place, f"{_words(point)}: {error}" if point else str(error))
            for names, words in faults(ready.values):
                named = next((name for given in (point, fixed) for name in names if name in given), None)
                field = "axes" if named in point else "parameters"
                place = (*_owner((*at, field), named, file), named) if named else at
                file.document.refuse(place, f"{_words(point)}: {words}" if point else words)
            yield Task(
                label=label(
                    point, notebook.stem if several or not point else "", repeat if part.repeats > 1 else 0
                ),
                notebook=str(notebook),
                overrides=fixed | point,
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
    """`"41_configuration engine=eager plan=mine #2"`; of a file only its name."""
    words = [notebook] if notebook else []
    for name, value in point.items():
        text = str(value)
        path = Path(text)
        words.append(f"{name}={path.stem if path.suffix and os.path.isfile(path) else text}")
    return clean(" ".join([*words, f"#{repeat}"] if repeat else words), keep="")


def _value(schema: Schema, name: str, value: Any, at: tuple, file: GridFile) -> Any:
    try:
        return read_value(schema[name], value, schema.where)
    except WanlabError as error:
        file.document.refuse(at, str(error))


def _different(values: list[Any], at: tuple, file: GridFile) -> list[Any]:
    """The values of an axis, of which no two are equal in the type of the parameter."""
    seen = set()
    for value in values:
        if repr(value) in seen:
            file.document.refuse(at, f"{value!r} is given twice; `repeats:` makes equal runs")
        seen.add(repr(value))
    return values


def _conditions(
    conditions: Mapping[str, Any],
    axes: Mapping[str, list],
    schema: Schema,
    at: tuple,
    file: GridFile,
    *,
    other_axes: bool,
) -> dict[str, Any]:
    """Conditions with values in the types of their parameters, so that `yes` is the true value of an axis.

    Args:
        other_axes: whether they hold for other notebooks too, whose axes may have the values that these lack.
    """
    refuse, typed = file.document.refuse, {}
    for name, value in conditions.items():
        if name not in axes:
            refuse((*at, name), f"{name!r} is not an axis; there are {', '.join(axes) or 'none'}")
        typed[name] = [_value(schema, name, item, (*at, name), file) for item in _options(value, axes[name])]
        if other_axes:
            continue
        for item in typed[name]:
            if not fits({name: item}, {name: axes[name]}):
                hint = did_you_mean(item, map(str, axes[name])) if isinstance(item, str) else ""
                some = ", ".join(map(str, axes[name][:8]))
                refuse((*at, name), f"no run has {name}={item}{hint}; {name} is {some}")
    return typed


def _options(value: Any, values: list) -> list:
    """The values that a condition allows: one, or each of a list; where the axis itself has lists, each list of a list."""
    of_lists = any(isinstance(item, list | tuple) for item in values)
    several = isinstance(value, list) and (not of_lists or any(isinstance(item, list) for item in value))
    return value if several else [value]


def _owner(at: tuple, name: str, file: GridFile) -> tuple:
    """Place of a value in the file: in the part itself, or else in the grid."""
    return at if (*at, name) in file.document.lines else at[-1:]


def _words(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())
