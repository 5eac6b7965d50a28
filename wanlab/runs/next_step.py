"""What a reader of a report does next: the command of a notebook with its parameters, and how it is shown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

from wanlab.core.answer import Step
from wanlab.core.errors import clean
from wanlab.core.words import sentence, typed_value


def run_command(notebook: str, parameters: Mapping[str, Any]) -> str:
    """`wanlab run NOTEBOOK -p name=value`, quoted for a shell."""
    pairs = [f"-p {shlex.quote(f'{name}={typed_value(value)}')}" for name, value in parameters.items()]
    return " ".join(["wanlab run", shlex.quote(notebook), *pairs])


def changed_parameters(record: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a run, by its run.json, that are not the notebook's own."""
    rows = record.get("schema") or []
    return {row["name"]: row["value"] for row in rows if row.get("default") != row.get("value")}


def next_step(step: Step, record: Mapping[str, Any]) -> dict[str, str]:
    """A step as run.json keeps it: `why`, and `command`, "" where nothing is to be run.

    Args:
        record: run.json of the run. The same notebook again keeps its parameters.
    """
    notebook, given = step.notebook, dict(step.parameters)
    if not notebook and given:
        notebook, given = str(record.get("notebook")), changed_parameters(record) | given
    given = {name: value for name, value in given.items() if value is not None}
    return {"why": clean(sentence(step.why)), "command": run_command(notebook, given) if notebook else ""}


def next_html(step: Mapping[str, Any]) -> str:
    """The line of a report that says what to do next."""
    command = str(step.get("command") or "")
    code = f"<code>{escape(command)}</code> " if command else ""
    return f'<p class="next"><b>Next</b> {code}<span>{escape(str(step.get("why") or ""))}</span></p>'
