"""A run before it starts: its notebook read, its parameters checked, its identity and its folder known."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlab.errors import WanlabError
from wanlab.runs import identity
from wanlab.paths import default_outputs
from wanlab.runs.folder import RunFolder
from wanlab.runs.header import describe, header
from wanlab.runs.parameters import Schema, read_notebook, read_schema


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
    def looks_around(self) -> bool:
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
        if self.looks_around:
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
    path = Path(notebook)
    nb = read_notebook(path)
    schema = Schema(read_schema(nb).parameters, str(path))
    overrides = dict(parameters or {})
    values = schema.resolve(overrides)
    inputs, weights = identity.input_digests(values), identity.weights_id(values.get("model"))
    made_id = identity.run_id(
        identity.notebook_source(nb), values, weights=weights, inputs=inputs, repeat=repeat
    )
    folder = RunFolder.of(Path(output) if output else default_outputs(), name or path.stem, made_id)
    return Prepared(path, nb, schema, values, overrides, inputs, weights, repeat, made_id, folder)
