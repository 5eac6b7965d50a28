"""All runs below a folder as one tidy table. The files are the truth; nothing here is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wanlab.errors import WanlabError
from wanlab.runs.files import default_outputs, read_json
from wanlab.runs.folder import RunFolder

COLUMNS = (
    "name",
    "run_id",
    "notebook",
    "state",
    "started",
    "seconds",
    "verdict",
    "reason",
    "gpu",
    "cpu",
    "wanlab",
    "folder",
)
MARKS = ("run.json", "status.json", "executed.ipynb")


def load_runs(path: str | os.PathLike | None = None) -> Any:
    """One row per run found below `path` (by default the project's `outputs/`), oldest first.

    Columns: name, run_id, notebook, state, started (UTC), seconds, verdict, reason, gpu, cpu, wanlab, folder,
    then each parameter as `p.<name>` and each recorded scalar as `m.<name>` (the last value of a name counts;
    entries of a recorded dict are `m.<name>.<key>`). Earlier attempts of a run are not rows.

    A folder that cannot be read is a row with state "unreadable" and the reason. A run that says "running"
    but whose process is gone reads "died".

    Raises:
        WanlabError: `path` does not exist.
    """
    import pandas as pd

    root = Path(path) if path is not None else default_outputs()
    if not root.exists():
        if path is None:
            return pd.DataFrame(columns=list(COLUMNS))
        raise WanlabError(f"no folder of runs at {root}")
    rows = [_row(RunFolder(folder)) for folder in _folders(root)]
    named = [key for row in rows for key in row if key not in COLUMNS]
    columns = [*COLUMNS, *sorted(set(named), key=lambda key: (key[:2] != "p.", named.index(key)))]
    frame = pd.DataFrame(rows, columns=columns)
    frame["started"] = pd.to_datetime(frame["started"], utc=True, errors="coerce", format="ISO8601")
    frame["seconds"] = pd.to_numeric(frame["seconds"], errors="coerce")
    return frame.sort_values("started", kind="stable", na_position="first", ignore_index=True)


def _folders(root: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(root):
        if any(mark in files for mark in MARKS):
            below.clear()  # attempts and artifacts of this run
            yield Path(folder)
        below.sort()


def _row(folder: RunFolder) -> dict[str, Any]:
    path = folder.path
    row: dict[str, Any] = {"name": path.parent.name, "run_id": path.name, "folder": str(path)}
    try:
        record = read_json(folder.run_json)
        status = folder.status()
        if not isinstance(record, dict):
            raise WanlabError(f"cannot read {folder.run_json}: not a JSON object")
        environment = record.get("environment") or {}
        gpu = environment.get("gpu")
        row |= {
            "name": record.get("name", row["name"]),
            "run_id": record.get("run_id", row["run_id"]),
            "notebook": record.get("notebook"),
            "state": status.get("state", "unreadable"),
            "started": status.get("started") or record.get("created"),
            "seconds": status.get("seconds"),
            "verdict": record.get("verdict"),
            "reason": status.get("reason") if status else "status.json is missing",
            "gpu": gpu.get("name") if isinstance(gpu, dict) else gpu,
            "cpu": environment.get("cpu"),
            "wanlab": record.get("wanlab"),
        }
        row |= {f"p.{name}": _cell(value) for name, value in (record.get("parameters") or {}).items()}
        row |= {f"m.{name}": value for name, value in read_metrics(folder.metrics).items()}
    except (WanlabError, AttributeError, TypeError, ValueError, OSError) as error:
        row |= {"state": "unreadable", "reason": str(error)}
    return row


def read_metrics(path: Path) -> dict[str, Any]:
    """Scalars of a metrics.jsonl: the last of each name. A torn last line is skipped."""
    found: dict[str, Any] = {}
    if not path.is_file():
        return found
    lines = path.read_text("utf-8", "replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise WanlabError(f"cannot read {path}, line {number}: not JSON") from None
        name, value = entry["name"], entry["value"]
        if isinstance(value, dict):
            found |= {f"{name}.{key}": _scalar(item) for key, item in value.items() if _is_scalar(item)}
        elif _is_scalar(value):
            found[name] = _scalar(value)
    return found


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _scalar(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf", "nan") and isinstance(value, str) else value


def _cell(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
