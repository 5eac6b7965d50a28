"""A run before it starts: reads its notebook, checks and injects parameters, computes its identity and folder."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

import wanlab
from wanlab import models
from wanlab.configuration.configuration import identity, load_configuration
from wanlab.core import limits
from wanlab.core.contents import content_digest, tree_digest
from wanlab.core.errors import WanlabError
from wanlab.core.files import digest, file_name, now, plain
from wanlab.core.paths import default_outputs, find_notebook, locate, source_digest
from wanlab.precision.plan import load_plan
from wanlab.runs.folder import RunFolder
from wanlab.runs.parameters import Schema, check_language, is_tagged, nbformat, read_notebook, read_schema
from wanlab.runs.seal import broken


def inject(nb: Any, values: Mapping[str, Any]) -> None:
    """Insert a cell with the overrides below the `parameters` cell."""
    nb.cells = [cell for cell in nb.cells if not is_tagged(cell, "injected-parameters")]
    if not values:
        return
    lines = ["# Parameters", *(f"{name} = {literal(value)}" for name, value in values.items())]
    cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
    at = next(index for index, cell in enumerate(nb.cells) if is_tagged(cell, "parameters"))
    nb.cells.insert(at + 1, cell)
    nb.metadata.setdefault("papermill", {})["parameters"] = plain(dict(values))


def literal(value: Any) -> str:
    """Python source of a value; infinities and NaN become a call of `float`."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def upgraded(nb: Any) -> Any:
    """The notebook in the current format, with an id for every cell."""
    nb = nbformat.v4.upgrade(nb)
    nb.metadata.setdefault("papermill", {})
    for cell in nb.cells:
        cell.setdefault("id", nbformat.v4.new_code_cell().id)
        cell.metadata.setdefault("papermill", {})
    return nb


def run_id(
    source: str,
    parameters: Mapping[str, Any],
    *,
    plan: str | None = None,
    weights: str | None = None,
    inputs: Mapping[str, str] | None = None,
    repeat: int = 1,
) -> str:
    """Identity of a run: 12 hex digits of a hash of everything that its result depends on.

    Args:
        source: notebook source without outputs, see `notebook_source`.
        parameters: all parameters, resolved.
        plan: hash of a precision plan, if one is used.
        weights: identity of the model's weights, see `weights_id`.
        inputs: digest of each file that a parameter names, see `input_digests`.
        repeat: number of this run among equal runs, from 1.
    """
    values = plain(dict(parameters))
    if isinstance(values.get("model"), str):  # the contents of LoRAs count among the weights, not their names
        values["model"] = models.split_model(values["model"])[0]
    values = json.dumps(values, sort_keys=True)
    files = json.dumps(dict(inputs or {}), sort_keys=True)
    parts = [source, values, plan or "", wanlab.__version__, package_digest(), weights or "", files]
    return digest([*parts, str(repeat)] if repeat > 1 else parts, 12)


def code_cells(notebook: Any) -> list[str]:
    """Sources of the code cells of a notebook that are not its parameters."""
    tags = ("parameters", "injected-parameters")
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell.source for cell in cells if not any(is_tagged(cell, tag) for tag in tags)]


def notebook_source(notebook: Any) -> str:
    """Cell types, tags and sources of a notebook, without outputs."""
    cells = [[c.cell_type, sorted(c.metadata.get("tags", [])), c.source] for c in notebook.cells]
    return json.dumps(cells, ensure_ascii=False)


@functools.cache
def package_digest() -> str:
    """Digest of wanlab's own Python files, so that runs of other code are not reused."""
    return source_digest()


def weights_id(model: Any, weights: Any = "pretrained") -> str | None:
    """Identity of the files of a `model` parameter with its LoRAs; None where they are not on this machine.

    Args:
        weights: value of the parameter `weights`; of random ones only configurations and tokenizers count.

    Raises:
        WanlabError: a LoRA is missing or is no safetensors file.
    """
    if not isinstance(model, str) or not model:
        return None
    base, texts = models.split_model(model)
    if loras := sorted(lora.identity for lora in models.read_loras(texts)):
        return digest([weights_id(base, weights) or "", *loras], 16)
    if models.is_known(model):  # never asks the hub, which can take long; the notebook does
        try:
            model = models.get(model).source
        except WanlabError:
            return None  # the notebook reports it when it loads the model
    folder = locate(model)
    if not folder.is_dir() and "/" in model and not Path(model).is_absolute():
        try:  # downloaded earlier
            index = try_to_load_from_cache(model, "model_index.json")
        except ValueError:  # not the form of a name on the hub
            return None
        folder = Path(index).parent if isinstance(index, str) else folder
    return folder_digest(folder, weights=weights != "random") if folder.is_dir() else None


KINDS = (".json", ".safetensors", ".bin")


def folder_digest(folder: Path, *, weights: bool = True) -> str:
    """Digest of names and whole contents of a model's files: weights, configurations, and everything of its tokenizers.

    Args:
        weights: whether weights count.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and _counts(path.relative_to(folder), KINDS if weights else KINDS[:1])
    )
    return tree_digest(folder, files, 16)


def _counts(path: Path, kinds: tuple[str, ...]) -> bool:
    if any(part.startswith(".") for part in path.parts):
        return False
    return path.suffix in kinds or path.parts[0].startswith("tokenizer")


KEPT = ("engines", "files", "folder", "model")
"""Parameters that name folders of kept work, whose files have manifests of their own, and the model, see `weights_id`."""
PLANS = ("plan", "plans", "compare")
"""Parameters that name precision plans, by preset or file."""


def input_digests(parameters: Mapping[str, Any], *, folders: bool = True) -> dict[str, str]:
    """Digest of what each parameter names, also inside lists: files, folders with all their files, plans, configurations.

    `configuration` has the hash of what the configuration does, also where `engine` and `plan` name it. A folder that holds
    the folder of all runs has none: each run changes it.

    Args:
        folders: whether folders count.

    Raises:
        WanlabError: there is no such configuration, or its file has a mistake.
    """
    digests = {}
    for name, value in parameters.items():
        items = list(value) if isinstance(value, list | tuple) else [value]
        for place, item in enumerate(items):
            label = name if items == [value] else f"{name}[{place}]"
            if found := _input_digest(name, item, folders):
                digests[label] = found
    configuration = identity(parameters)
    return digests if configuration is None else digests | {"configuration": configuration["hash"]}


def _input_digest(name: str, value: Any, folders: bool) -> str | None:
    if not isinstance(value, str) or not value or len(value) >= 4096 or "\0" in value:
        return None
    path = locate(value)
    if name in PLANS or name == "configurations":  # with all that they name
        with contextlib.suppress(WanlabError):  # the word for no plan, or a mistake that the notebook reports
            return load_plan(value).hash if name in PLANS else load_configuration(value).hash
    if os.path.isfile(path):
        return content_digest(path)
    own = default_outputs().resolve()
    if not folders or name in KEPT or not os.path.isdir(path) or own.is_relative_to(path.resolve()):
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return tree_digest(path, files)


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
    """Notebook, parameters and identity of a run, as fields of run.json."""
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
        "sealed": True,  # when it finishes, see `runs.seal`
        "created": now(),
    }


def reads_other_runs(notebook: Any) -> bool:
    """Whether a notebook is always run again, by its metadata, because it reads other runs."""
    return bool(notebook.metadata.get("wanlab", {}).get("always"))


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
    """`path` relative to the working folder, else its name: an absolute path means nothing on another machine."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.name


@dataclass(frozen=True, eq=False)
class Prepared:
    """A checked run: its notebook, parameters, identity and folder.

    Attributes:
        path: path of the notebook.
        notebook: its content.
        values: all parameters, resolved.
        overrides: parameters that were given.
        inputs, weights: identities of the files and weights that parameters name.
        repeat: number of this run among equal runs, from 1; each has its own folder.
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
        """Whether the notebook reads files that its parameters do not name, such as other runs, by its metadata."""
        return reads_other_runs(self.notebook)

    def header(self) -> dict[str, Any]:
        """Fields of run.json before the notebook starts."""
        described = describe(self.schema, self.values)
        name = self.folder.path.parent.name
        return header(
            self.run_id, name, self.path, self.values, described, None, self.weights, self.inputs, self.repeat
        )

    def finished(self) -> dict[str, Any]:
        """Status of an earlier finished run with the same identity, or {}."""
        if self.reads_other_runs:
            return {}
        try:
            status, record = self.folder.status(), self.folder.record()
        except WanlabError:
            return {}
        other = record.get("unsaved_cells") or record.get("skipped_cells")  # in JupyterLab
        same = status.get("state") == "finished" and not other and not broken(self.folder, record)
        return status if same else {}


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
    check_language(nb, str(path))
    schema = Schema(read_schema(nb).parameters, str(path))
    overrides = dict(parameters or {})
    values = schema.resolve(overrides)
    if type(values.get("seed")) is int:
        limits.check_seed(values["seed"])
    inputs = input_digests(values, folders=not reads_other_runs(nb))
    weights = weights_id(values.get("model"), values.get("weights"))
    identifier = run_id(notebook_source(nb), values, weights=weights, inputs=inputs, repeat=repeat)
    folder = RunFolder.of(
        Path(output) if output else default_outputs(), name or file_name(path.stem), identifier
    )
    return Prepared(path, nb, schema, values, overrides, inputs, weights, repeat, identifier, folder)
