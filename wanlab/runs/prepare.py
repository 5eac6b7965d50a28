"""A run before it starts: notebook read, parameters checked and injected, identity and folder known."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wanlab
from wanlab import models
from wanlab.configuration.configuration import identity
from wanlab.core.errors import WanlabError
from wanlab.core.files import digest, file_digest, now, plain
from wanlab.core.paths import PACKAGE, PACKAGED, default_outputs, find_notebook, locate
from wanlab.runs.folder import RunFolder
from wanlab.runs.parameters import Schema, is_tagged, nbformat, read_notebook, read_schema


def inject(nb: Any, values: Mapping[str, Any]) -> None:
    """Put overrides into a cell below the defaults."""
    nb.cells = [cell for cell in nb.cells if not is_tagged(cell, "injected-parameters")]
    if not values:
        return
    lines = ["# Parameters", *(f"{name} = {literal(value)}" for name, value in values.items())]
    cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
    at = next(index for index, cell in enumerate(nb.cells) if is_tagged(cell, "parameters"))
    nb.cells.insert(at + 1, cell)
    nb.metadata.setdefault("papermill", {})["parameters"] = plain(dict(values))


def literal(value: Any) -> str:
    """Python source of a value; infinities and NaN have no literal and become a call of `float`."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def upgraded(nb: Any) -> Any:
    """Current notebook format, where every cell has an id."""
    nb = nbformat.v4.upgrade(nb)
    nb.metadata.setdefault("papermill", {})
    for cell in nb.cells:
        cell.setdefault("id", nbformat.v4.new_code_cell().id)
        cell.metadata.setdefault("papermill", {})
    return nb


WHOLE_FILE_LIMIT_BYTES = 64 * 2**20  # larger weight files are told apart by name and size


def run_id(
    source: str,
    parameters: Mapping[str, Any],
    *,
    plan: str | None = None,
    weights: str | None = None,
    inputs: Mapping[str, str] | None = None,
    repeat: int = 1,
) -> str:
    """12 hex digits that change whenever the result could.

    Args:
        source: notebook source without outputs, see `notebook_source`.
        parameters: all of them, resolved.
        plan: hash of a precision plan, if one is used.
        weights: identity of the model's weights, see `weights_id`.
        inputs: digest of each file that a parameter points to, see `input_digests`.
        repeat: which of several equal runs, from 1.
    """
    values = json.dumps(plain(dict(parameters)), sort_keys=True)
    files = json.dumps(dict(inputs or {}), sort_keys=True)
    parts = [source, values, plan or "", wanlab.__version__, package_digest(), weights or "", files]
    return digest([*parts, str(repeat)] if repeat > 1 else parts, 12)


def notebook_source(notebook: Any) -> str:
    """Cell types, tags and sources of a notebook: what runs, without what came out."""
    cells = [[c.cell_type, sorted(c.metadata.get("tags", [])), c.source] for c in notebook.cells]
    return json.dumps(cells, ensure_ascii=False)


@functools.cache
def package_digest() -> str:
    """Digest of wanlab's own Python files, so that an edited package does not resume old results.

    A checkout and a wheel made from it have the same.
    """
    parts: list[str | bytes] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if name.parts[0] not in PACKAGED.values():
            parts += [name.as_posix(), path.read_bytes()]
    return digest(parts, 16)


def weights_id(model: Any) -> str | None:
    """Identity of the weights behind a `model` parameter, or None when it names no local folder."""
    if not isinstance(model, str) or not model:
        return None
    if model in models.names():  # never asks the hub: that is for the notebook, where it can be waited for
        try:
            model = models.get(model).source
        except WanlabError:
            return None  # the notebook says it better, where it loads the model
    folder = locate(model)
    return folder_digest(folder) if folder.is_dir() else None


def folder_digest(folder: Path) -> str:
    """Digest over names and contents of a folder's files (over name and size for very large ones)."""
    kinds = (".json", ".safetensors", ".bin")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in kinds)
    found = [(path, path.stat()) for path in files]
    return _digest_of(folder, tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in found))


@functools.lru_cache(maxsize=16)  # the runs of a sweep name the same weights
def _digest_of(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    parts: list[str | bytes] = []
    for path, size, _ in files:
        parts += [
            path.relative_to(folder).as_posix(),
            file_digest(path) if size <= WHOLE_FILE_LIMIT_BYTES else str(size),
        ]
    return digest(parts, 16)


def input_digests(parameters: Mapping[str, Any]) -> dict[str, str]:
    """Digest of each parameter value that is a file: the same path with new content is another run.

    Of `configuration` it is the hash of what the configuration does, also where `engine` and `plan` name it.

    Raises:
        WanlabError: there is no such configuration, or its file has a mistake.
    """
    found = {}
    for name, value in parameters.items():
        if (
            isinstance(value, str)
            and value
            and len(value) < 4096
            and "\0" not in value
            and os.path.isfile(path := locate(value))
        ):
            found[name] = file_digest(path)
    configuration = identity(parameters)
    return found if configuration is None else found | {"configuration": configuration["hash"]}


def header(
    run_id: str,
    name: str,
    notebook: Path | None,
    values: Mapping[str, Any],
    described: list[dict[str, Any]],
    plan: str | None,
    weights: str | None,
    inputs: Mapping[str, str],
    repeat: int = 1,
) -> dict[str, Any]:
    """What is run, with which parameters, and its identity, as fields of run.json."""
    return {
        "run_id": run_id,
        "name": name,
        "notebook": shown_path(notebook) if notebook else None,
        "parameters": plain(dict(values)),
        "schema": described,
        "plan": plan,
        "configuration": identity(values),
        "weights": weights,
        "inputs": dict(inputs),
        "repeat": repeat,
        "wanlab": wanlab.__version__,
        "wanlab_source": package_digest(),
        "created": now(),
    }


def describe(schema: Schema, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, type, help, default and value of each parameter, for run.json and the report."""
    return [
        {
            "name": p.name,
            "type": p.type_text,
            "help": p.help,
            "default": plain(p.default),
            "value": plain(values[p.name]),
        }
        for p in schema.parameters
    ]


def shown_path(path: Path) -> str:
    """`path` as one would type it from here; absolute paths of one machine mean nothing on another."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.name


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `execute` needs to know, and what tells whether a finished run already holds the answer.

    Attributes:
        values: all parameters, resolved. overrides: those that were given.
        inputs, weights: identities of files and weights that parameters name.
        repeat: 1 for the first of equal runs; each has a folder of its own.
    """

    path: Path
    notebook: Any
    schema: Schema
    values: dict[str, Any]
    overrides: dict[str, Any]
    inputs: dict[str, str]
    weights: str | None
    repeat: int
    run_id: str
    folder: RunFolder

    @property
    def reads_other_runs(self) -> bool:
        """Whether the notebook says in its metadata that it reads what its parameters do not name, such as other runs."""
        return bool(self.notebook.metadata.get("wanlab", {}).get("always"))

    def header(self) -> dict[str, Any]:
        """What run.json says before the notebook starts."""
        described = describe(self.schema, self.values)
        name = self.folder.path.parent.name
        return header(
            self.run_id, name, self.path, self.values, described, None, self.weights, self.inputs, self.repeat
        )

    def finished(self) -> dict[str, Any]:
        """Status of an earlier run with the same identity that finished, or {}."""
        if self.reads_other_runs:
            return {}
        try:
            status = self.folder.status()
        except WanlabError:
            return {}
        return status if status.get("state") == "finished" else {}


def prepare(
    notebook: str | os.PathLike,
    parameters: Mapping[str, Any] | None = None,
    *,
    output: str | os.PathLike | None = None,
    name: str | None = None,
    repeat: int = 1,
) -> Prepared:
    """Check a run and find its folder; nothing is written.

    Args: as `execute`.

    Raises:
        WanlabError: unknown parameter, wrong type, unreadable notebook, or a name that is no file name.
    """
    path = find_notebook(notebook)
    nb = read_notebook(path)
    schema = Schema(read_schema(nb).parameters, str(path))
    overrides = dict(parameters or {})
    values = schema.resolve(overrides)
    inputs, weights = input_digests(values), weights_id(values.get("model"))
    made_id = run_id(notebook_source(nb), values, weights=weights, inputs=inputs, repeat=repeat)
    folder = RunFolder.of(Path(output) if output else default_outputs(), name or path.stem, made_id)
    return Prepared(path, nb, schema, values, overrides, inputs, weights, repeat, made_id, folder)
