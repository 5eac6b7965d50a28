"""What a reader of a report does next: the command of a notebook with its parameters, and how it is shown."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from wanlab.core.answer import Step
from wanlab.core.errors import WanlabError, clean
from wanlab.core.paths import find_notebook, from_here
from wanlab.core.words import sentence, typed_value
from wanlab.runs.parameters import read_schema

LOADED = ("model", "weights", "device", "dtype")
"""Parameters that say which model a run is about, and how it was loaded."""


def run_command(notebook: str, parameters: Mapping[str, Any]) -> str:
    """`wanlab run NOTEBOOK -p name=value`, quoted for a shell; files below the working folder by their relative paths."""
    parameters = {
        name: from_here(Path(value)) if isinstance(value, str) and os.path.isabs(value) else value
        for name, value in parameters.items()
    }
    pairs = [f"-p {shlex.quote(f'{name}={typed_value(value)}')}" for name, value in parameters.items()]
    return " ".join(["wanlab run", shlex.quote(notebook), *pairs])


def changed_parameters(record: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a run, by its run.json, that are not the notebook's own."""
    rows = record.get("schema") or []
    return {row["name"]: row["value"] for row in rows if row.get("default") != row.get("value")}


def next_step(step: Step, record: Mapping[str, Any]) -> dict[str, str]:
    """A step as run.json keeps it: `why`, and `command`, "" where nothing is to be run.

    Args:
        record: run.json of the run. The same notebook again keeps its parameters, another one what says which model it was
            and how it was loaded.
    """
    notebook, given, changed = step.notebook, dict(step.parameters), changed_parameters(record)
    if notebook:
        taken = _parameters(notebook)
        given = {name: changed[name] for name in LOADED if name in changed and name in taken} | given
    elif given:
        notebook, given = _short(str(record.get("notebook"))), changed | given
    given = {name: value for name, value in given.items() if value is not None}
    return {"why": clean(sentence(step.why)), "command": run_command(notebook, given) if notebook else ""}


def _parameters(notebook: str) -> set[str]:
    """Names of a notebook's parameters; none where it cannot be read."""
    try:
        return set(read_schema(find_notebook(notebook)).names)
    except WanlabError:
        return set()


def _short(notebook: str) -> str:
    """A notebook by its name alone, where that finds it."""
    try:
        find_notebook(name := Path(notebook).stem)
    except WanlabError:
        return notebook
    return name


def next_html(step: Mapping[str, Any]) -> str:
    """The line of a report that says what to do next."""
    command = str(step.get("command") or "")
    code = f"<code>{escape(command)}</code> " if command else ""
    return f'<p class="next"><b>Next</b> {code}<span>{escape(str(step.get("why") or ""))}</span></p>'
