"""The part of run.json that is known before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanlab.runs import identity
from wanlab.runs.files import now, plain
from wanlab.runs.parameters import Schema


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
    import wanlab

    return {
        "run_id": run_id,
        "name": name,
        "notebook": shown_path(notebook) if notebook else None,
        "parameters": plain(dict(values)),
        "schema": described,
        "plan": plan,
        "weights": weights,
        "inputs": dict(inputs),
        "repeat": repeat,
        "wanlab": wanlab.__version__,
        "wanlab_source": identity.package_digest(),
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
