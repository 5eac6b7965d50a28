"""The grid file of a sweep: which notebook, with which parameters fixed and which varied. YAML, told off by line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from wanlab.errors import WanlabError, did_you_mean
from wanlab.runs.files import NAME
from wanlab.yaml_lines import Document, read_yaml

Machine = Literal["shared", "alone"]
Count = Annotated[int, msgspec.Meta(ge=1)]
Above0 = Annotated[float, msgspec.Meta(gt=0)]
From0 = Annotated[float, msgspec.Meta(ge=0)]


class Part(msgspec.Struct, forbid_unknown_fields=True):
    """One notebook of a grid; what it leaves out is the grid's.

    Attributes:
        notebook: path, from the working folder or else from the grid file's.
        parameters: fixed for all its runs. axes: name -> values, see `values_of`.
        only, exclude: mappings of axis -> value or list of values; a run is made if it fits one of `only` (where there is
            one) and none of `exclude`.
        repeats: equal runs of each configuration, each with a folder of its own.
        machine: `"alone"` for timings, which nothing else may disturb; `"shared"` for the rest.
        limit_s, memory_limit_gib, output_limit_mib: of one run, see `execute`.
        cpus, gpus: what one run takes on a cluster.
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
    """A sweep: one notebook or several, and what all of them share.

    Attributes:
        name: folder below `outputs/`. title: of its page.
        notebook, or notebooks: what is run. The other fields of a `Part` hold for all of them.
        baseline: axis -> value of the configuration that the others are compared with.
        show: columns that the page opens with.
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
    """A grid and where each of its values stands, so that later mistakes can be told with their line too."""

    grid: Grid
    path: Path
    document: Document


def load_grid(path: str | os.PathLike) -> GridFile:
    """A grid from a YAML file.

    Raises:
        WanlabError: no such file, YAML that cannot be read, an unknown field, a value of another type, no notebook. The
            message names the line.
    """
    path = Path(path)
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise WanlabError(f"no grid at {path}{did_you_mean(path.name, near)}")
    document = read_yaml(path.read_text("utf-8"), str(path), "the grid")
    data, refuse = document.data, document.refuse
    if not isinstance(data, dict):
        refuse((), "a grid is a mapping with name, notebook, parameters and axes")
    document.known_fields(data, Grid)
    for index, part in enumerate(data["notebooks"] if isinstance(data.get("notebooks"), list) else ()):
        if isinstance(part, dict):
            document.known_fields(part, Part, ("notebooks", index))
    grid = document.convert(Grid)
    if not NAME.match(grid.name) or ".." in grid.name:
        refuse(("name",), f"{grid.name!r} cannot be a folder's name: use letters, digits, and . _ + -")
    if (grid.notebook is None) == (not grid.notebooks):
        refuse((), "give either `notebook: PATH` or a list `notebooks:`")
    return GridFile(grid, path, document)


def values_of(axis: Any, at: tuple, file: GridFile) -> list[Any]:
    """The values of an axis: a list, `{from, to, by}` with both ends, or `{files: pattern}`.

    Files are found from the working folder or else from the grid file's, and given as one would type them. A list may hold
    any of the two other forms among its values.
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
    for index, value in enumerate(values):
        if any(type(value) is type(earlier) and value == earlier for earlier in values[:index]):
            refuse(at, f"{value!r} is given twice; `repeats:` makes equal runs")
    return values


def find(path: str, file: GridFile) -> Path | None:
    """A file named in a grid: from the working folder, else from the grid file's folder and the one above it."""
    for root in (Path(), file.path.parent, file.path.parent.parent):
        if (root / path).is_file():
            return root / path
    return None


def _files(pattern: str, at: tuple, file: GridFile) -> list[str]:
    for root in (Path(), file.path.parent, file.path.parent.parent):
        try:
            found = sorted(str(p) for p in root.glob(pattern) if p.is_file())
        except (ValueError, NotImplementedError) as error:
            file.document.refuse(at, f"{pattern!r} is no pattern of relative paths: {error}")
        if found:
            return found
    file.document.refuse(at, f"no file fits {pattern!r} from here or from {file.path.parent}")


def _range(axis: dict, at: tuple, file: GridFile) -> list[Any]:
    first, last, step = axis["from"], axis["to"], axis.get("by", 1)
    numbers = [first, last, step]
    if (
        not all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers)
        or step <= 0
        or last < first
    ):
        file.document.refuse(at, f"from {first!r} to {last!r} by {step!r} is no range of numbers")
    count = int((last - first) / step + 1e-9) + 1
    if count > 10_000:
        file.document.refuse(at, f"{count:,} values; 10,000 is the limit")
    return [first + index * step for index in range(count)]
