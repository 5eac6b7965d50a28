"""All runs below a folder as one tidy table. The files are the truth; nothing here is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanlab.errors import WanlabError
from wanlab.runs.files import read_json
from wanlab.paths import default_outputs
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


@dataclass(frozen=True)
class RunRecord:
    """What the files of one run say.

    Attributes:
        row: the columns of `load_runs`.
        record: run.json. metrics: name -> its last recorded value, tables and samples too. Both empty where the run cannot
            be read.
    """

    row: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.row["folder"])


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

    if path is None and not default_outputs().exists():
        return pd.DataFrame(columns=list(COLUMNS))
    rows = [run.row for run in read_runs(path)]
    named = dict.fromkeys(key for row in rows for key in row)
    columns = [*COLUMNS, *(key for mark in ("p.", "m.") for key in named if key.startswith(mark))]
    # Column by column: pandas takes several times as long over rows of many keys.
    frame = pd.DataFrame({key: [row.get(key) for row in rows] for key in columns}, columns=columns)
    frame["started"] = pd.to_datetime(frame["started"], utc=True, errors="coerce", format="ISO8601")
    frame["seconds"] = pd.to_numeric(frame["seconds"], errors="coerce")
    return frame.sort_values("started", kind="stable", na_position="first", ignore_index=True)


def read_runs(path: str | os.PathLike | None = None) -> Iterator[RunRecord]:
    """Every run below a folder, in the order of their names.

    Raises:
        WanlabError: `path` does not exist.
    """
    root = Path(path) if path is not None else default_outputs()
    if not root.exists():
        raise WanlabError(f"no folder of runs at {root}")
    return map(read_run, run_folders(root))


def run_folders(root: Path) -> Iterator[Path]:
    """Folders of runs below `root`, itself included; those of earlier attempts are left out."""
    for folder, below, files in os.walk(root):
        if any(mark in files for mark in MARKS):
            below.clear()  # attempts and artifacts of this run
            yield Path(folder)
        below.sort()


def read_run(path: Path) -> RunRecord:
    """What one run folder says; it never raises."""
    folder = RunFolder(path)
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
        metrics = last_values(folder.metrics)
        row |= {f"m.{name}": value for name, value in scalars(metrics.items()).items()}
        return RunRecord(row, record, metrics)
    except (WanlabError, AttributeError, TypeError, ValueError, KeyError, OSError) as error:
        return RunRecord(row | {"state": "unreadable", "reason": str(error)})


def last_values(path: Path) -> dict[str, Any]:
    """The last value of each name in a metrics.jsonl, as it was recorded. A torn last line is skipped.

    Raises:
        WanlabError: a line before the last one is torn.
    """
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
        found[entry["name"]] = entry["value"]
    return found


def read_metrics(path: Path) -> dict[str, Any]:
    """Scalars of a metrics.jsonl: the last of each name, entries of a dict as `<name>.<key>`."""
    return scalars(last_values(path).items())


def scalars(values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Numbers, words and truth values among recorded values; "inf", "-inf" and "nan" are numbers again."""
    found: dict[str, Any] = {}
    for name, value in values:
        if isinstance(value, dict):
            found |= {f"{name}.{key}": _scalar(item) for key, item in value.items() if _is_scalar(item)}
        elif _is_scalar(value):
            found[name] = _scalar(value)
    return found


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _scalar(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in ("inf", "-inf", "nan") else value


def _cell(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
