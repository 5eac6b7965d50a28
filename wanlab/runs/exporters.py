"""Exports runs to CSV, Parquet and MLflow."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from wanlab.core.errors import WanlabError, require
from wanlab.core.files import plain, write_bytes
from wanlab.runs.folder import RunFolder
from wanlab.runs.results import read_run


def to_csv(runs: Any, path: str | os.PathLike) -> Path:
    """Write one line per run, UTF-8; times as ISO 8601 in UTC, lists and mixed columns as JSON."""
    text = flat(runs).to_csv(index=False, date_format="%Y-%m-%dT%H:%M:%SZ")
    return write_bytes(Path(path), text.encode("utf-8", "replace"))


def to_parquet(runs: Any, path: str | os.PathLike) -> Path:
    """Write one row per run with the type of every column kept.

    Raises:
        WanlabError: pyarrow is not installed.
    """
    require("pyarrow", '"wanlab[parquet]"')
    buffer = io.BytesIO()
    flat(runs).to_parquet(buffer, engine="pyarrow", index=False)
    return write_bytes(Path(path), buffer.getvalue())


def flat(runs: Any) -> Any:
    """`runs` with one type per column, as Parquet requires.

    Columns of numbers, times, text or booleans keep their type, with missing values. A column of anything else (lists, or
    a parameter that is a number in one notebook and text in another) becomes JSON text.
    """
    return runs.assign(**{name: _one_type(runs[name]) for name in runs.columns})


def _one_type(column: Any) -> Any:
    if column.dtype != object:
        return column
    kinds = {type(value) for value in column if not _missing(value)}
    if kinds == {bool}:
        return column.map(lambda value: pd.NA if _missing(value) else value).astype("boolean")
    text = str if kinds <= {str} else _json
    return column.map(lambda value: None if _missing(value) else text(value)).astype("string")


def _json(value: Any) -> str:
    return json.dumps(plain(value), ensure_ascii=False)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


INSTALL = '"wanlab[mlflow]"'
RUN_ID, STARTED = "wanlab.run_id", "wanlab.started"
ENDS = {"finished": "FINISHED", "aborted": "KILLED"}  # any other state is FAILED
TEXT_LIMIT = 5000  # MLflow refuses parameters of 6,000 characters and tags of 8,000
BATCH = 100  # parameters and tags in one call; MLflow's limit


@dataclass(frozen=True)
class Exported:
    """Counts of runs that were new to MLflow, run again since, known already, or not finished."""

    new: int = 0
    again: int = 0
    known: int = 0
    unfinished: int = 0


def to_mlflow(
    runs: Any, uri: str, experiment: str = "wanlab", *, artifacts: bool = False, unfinished: bool = False
) -> Exported:
    """Log runs: parameters, scalar metrics, and tags (run_id, state, notebook, gpu, cpu, verdict, report).

    Numbers are metrics; text and infinities, which MLflow's metrics cannot store, are tags named `metric.<name>`. A run is
    identified by its tag `wanlab.run_id`: one that was run again with `--force` is updated in place.

    Args:
        runs: table of `load_runs`.
        uri: database or server of MLflow, such as `sqlite:///mlflow.db`.
        artifacts: log report.html too; by default the description links to the file in the run folder.
        unfinished: also log runs that failed, died or were stopped; MLflow shows them as failed or killed.

    Raises:
        WanlabError: MLflow is not installed, or `uri` is a folder.
    """
    checked_uri(uri)
    chosen = runs["state"].eq("finished") | (unfinished & ~runs["state"].isin(["running", "unreadable"]))
    # A run may be in two folders, such as a sweep's and outputs/: the last one counts.
    rows = runs[chosen].drop_duplicates("run_id", keep="last").to_dict(orient="records")
    count = {"new": 0, "again": 0, "known": 0, "unfinished": int((~chosen).sum())}
    with _in_one_line(uri):
        client = _client(uri)
        place = _experiment(client, uri, experiment)
        logged = _logged_runs(client, place)
        for row in rows:
            count[_export(client, place, row, logged.get(str(row["run_id"])), artifacts)] += 1
    return Exported(**count)


def checked_uri(uri: str) -> str:
    """`uri`; a folder is refused, because MLflow does not write its file store any more."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", uri)  # two letters: one is a drive of Windows
    if scheme is None or scheme.group(1).lower() == "file":
        raise WanlabError(
            f"--uri {uri}: MLflow no longer keeps runs in a folder (its file store is in maintenance mode and refuses to "
            "start); give a database, such as sqlite:///mlflow.db, or the address of a server"
        )
    return uri


@contextmanager
def _in_one_line(uri: str) -> Iterator[None]:
    """Raise errors of MLflow and its database as a `WanlabError` of one line."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("mlflow", "sqlalchemy"):
            raise
        raise WanlabError(f"--uri {uri}: {' '.join(str(error).split())[:300]}") from error


def _client(uri: str) -> Any:
    # No data may leave the machine unless the user asks for it.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = require("mlflow", INSTALL)
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs every table of a new database
    if re.match(r"(sqlite|postgresql|mysql|mssql)\b", uri):
        require("sqlalchemy", INSTALL)
        require("alembic", INSTALL)
    return mlflow.MlflowClient(tracking_uri=uri)


def _experiment(client: Any, uri: str, name: str) -> str:
    """Id of the experiment. Its artifacts are beside a SQLite file, and not in ./mlruns of the working folder."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        if experiment.lifecycle_stage != "active":
            raise WanlabError(
                f"--experiment {name}: it was deleted in MLflow; restore it or give another name"
            )
        return experiment.experiment_id
    file = re.match(r"sqlite:///(.+)", uri)
    beside = Path(file.group(1).split("?")[0]).resolve().parent / "mlflow-artifacts" if file else None
    return client.create_experiment(name, artifact_location=beside.as_uri() if beside else None)


def _logged_runs(client: Any, experiment: str) -> dict[str, tuple[str, str]]:
    """run_id of wanlab -> (MLflow's id, start time of the run)."""
    logged: dict[str, tuple[str, str]] = {}
    token = None
    while True:
        page = client.search_runs(
            [experiment], f"tags.`{RUN_ID}` LIKE '%'", max_results=1000, page_token=token
        )
        logged |= {run.data.tags[RUN_ID]: (run.info.run_id, run.data.tags.get(STARTED, "")) for run in page}
        token = page.token
        if not token:
            return logged


def _export(client: Any, place: str, row: dict, known: tuple[str, str] | None, artifacts: bool) -> str:
    """Log one run unless MLflow has it unchanged; returns "new", "again" or "known"."""
    folder = RunFolder(Path(row["folder"]))
    record, status = folder.record(), folder.status()
    started = str(status.get("started") or record.get("created"))
    if known is not None and known[1] == started:
        return "known"
    begun = _ms(started)
    name = f"{row['name']}/{row['run_id']}"
    logged_id = known[0] if known else client.create_run(place, begun, run_name=name).info.run_id
    _log(client, logged_id, row, record, folder, begun)
    if artifacts and folder.report.is_file():
        client.log_artifact(logged_id, str(folder.report))
    client.set_terminated(logged_id, ENDS.get(row["state"], "FAILED"), _ms(status.get("ended")) or begun)
    client.set_tag(logged_id, STARTED, started)  # last, so that an interrupted export logs the run again
    return "again" if known else "new"


def _log(client: Any, logged_id: str, row: dict, record: dict, folder: RunFolder, begun: int) -> None:
    from mlflow.entities import Metric, Param, RunTag

    metrics, texts = _numbers(read_run(folder.path).figures)
    facts = {
        name: row.get(name)
        for name in ("run_id", "name", "state", "notebook", "gpu", "cpu", "verdict", "reason")
    }
    tags = {f"wanlab.{name}": value for name, value in facts.items() if isinstance(value, str)}
    tags |= {f"metric.{name}": value for name, value in texts.items()}
    tags |= {"wanlab.report": folder.report.resolve().as_uri(), "mlflow.note.content": _note(row, folder)}
    seconds = row.get("seconds")
    if isinstance(seconds, float) and math.isfinite(seconds):
        metrics["seconds"] = seconds
    parameters = [Param(_name(k), _text(v)) for k, v in (record.get("parameters") or {}).items()]
    labels = [RunTag(_name(k), v[:TEXT_LIMIT]) for k, v in tags.items()]
    for at in range(0, max(len(parameters), len(labels)), BATCH):
        client.log_batch(logged_id, params=parameters[at : at + BATCH], tags=labels[at : at + BATCH])
    values = [Metric(_name(k), v, begun, 0) for k, v in metrics.items()]
    for at in range(0, len(values), 10 * BATCH):
        client.log_batch(logged_id, metrics=values[at : at + 10 * BATCH])


def _numbers(recorded: dict[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Recorded scalars that MLflow's metrics can store, and the others as text. A database stores no infinity."""
    numbers = {
        name: float(value)
        for name, value in recorded.items()
        if isinstance(value, bool | int | float) and math.isfinite(value)
    }
    return numbers, {name: str(v) for name, v in recorded.items() if name not in numbers and v is not None}


def _note(row: dict, folder: RunFolder) -> str:
    """MLflow's description of the run. Verdicts contain parameters, so characters of Markdown are escaped."""
    text = row.get("verdict") or row.get("reason") or ""
    words = re.sub(r"([\\`*_{}\[\]<>#|!&~])", r"\\\1", text if isinstance(text, str) else "")
    return f"{words[:TEXT_LIMIT]}\n\n[report]({folder.report.resolve().as_uri()})"


def _name(name: str) -> str:
    """A name in the characters that MLflow allows: letters, digits, and _ - . : space /."""
    return re.sub(r"[^\w\-.:/ ]", "_", name)[:250]


def _text(value: Any) -> str:
    return (
        value[:TEXT_LIMIT]
        if isinstance(value, str)
        else json.dumps(plain(value), ensure_ascii=False)[:TEXT_LIMIT]
    )


def _ms(time: Any) -> int:
    """Milliseconds since 1970 of an ISO 8601 time; 0 for anything else."""
    try:
        return int(datetime.fromisoformat(str(time)).timestamp() * 1000)
    except ValueError:
        return 0
