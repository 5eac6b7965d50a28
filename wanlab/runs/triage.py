"""Collects the measurements of the runs of one model on one machine for `diagnose.triage`."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from wanlab.diagnose.triage import Measurement, RunMeasurements, Tree, number, read_tree
from wanlab.runs.results import read_run

# Parameters that every measuring notebook has.
SETTINGS = ("model", "weights", "device", "dtype", "height", "width", "frames", "steps")
RUN = ["run", "started", "model", "hardware"]
DEFAULTS = {"model": "wan-nano", "weights": "pretrained"}
FILES = ("trace", "original", "saved")  # parameters that name a file, perhaps of another model
BESIDE = ("12_experts", "13_attention")  # notebooks that show a trace beside their own measurements
# The state, or the reason of runs of earlier versions.
OUT_OF_MEMORY = re.compile(
    r"\Amemory\b|out of memory|OutOfMemory|MemoryError|bad_alloc|memory runs out", re.IGNORECASE
)


def run_measurements(
    runs: Any,
    tree: Tree | None = None,
    *,
    model: str | None = None,
    hardware: str | None = None,
    folder: str | None = None,
) -> RunMeasurements:
    """Measurements of the runs of one model on one machine: the newest finished run of each notebook counts.

    Args:
        runs: rows of `wanlab.load_runs` (a table or a list of dicts), oldest first. Files in the `folder` of a row are read
            too: memory of the device, the source of a given trace, the divergence.
        tree: tree that names the measurements; None takes the default tree.
        model: model whose runs count; None takes that of the newest run.
        hardware: part of the name of the GPU or of "CPU ..."; None takes that of the newest run of the model.
        folder: folder of new runs in the proposed commands; None takes the project's outputs.
    """
    tree = tree or read_tree()
    rows = runs.to_dict(orient="records") if hasattr(runs, "to_dict") else list(runs)
    notebooks = {quantity.notebook for quantity in tree.measurements.values()}
    every = [run for run in (_Run.of(row, tree) for row in rows) if run.notebook in notebooks]
    named = [run for run in every if run.model]
    model = model or next((run.model for run in reversed([r for r in named if not r.why] or named)), None)
    of_model = [run for run in named if run.model == model]
    fitting = [run for run in of_model if (hardware or "").lower() in run.hardware.lower()]
    newest = next((run.hardware for run in reversed([r for r in fitting if not r.why] or fitting)), hardware)
    here = [run for run in fitting if run.hardware == newest]
    used = {run.notebook: run for run in here if not run.why}
    kept, refused = [run for run in every if run in used.values()], []
    measured: dict[str, Measurement] = {}
    for run in kept:  # all values of a record come from one run, the newest that has it
        records = {_record(name) for name in run.measured}
        measured = {
            name: item for name, item in measured.items() if _record(name) not in records
        } | run.measured
    if last := {run.notebook: run for run in here if run.settings and run.why != "running"}:
        failed = [run.source for run in last.values() if OUT_OF_MEMORY.search(run.why)]
        sources = failed or [run.source for run in used.values()]
        measured["runs.out_of_memory"] = Measurement(len(failed), ", ".join(sources))
    for run in every:
        if run not in kept:
            other = "another machine" if run in of_model else "another model"
            refused.append(run.row | {"why": run.why or ("an older run" if run in here else other)})
    of = f"{model or 'any model'}{f' on {newest}' if newest else ''}"
    note = (
        f"Read together: {len(kept)} run(s) of {of}"
        if kept
        else f"No run of {of} measured what the tree asks for"
    )
    rows = [run.row | {"measurements": len(run.measured)} for run in kept]
    return RunMeasurements(
        measured,
        pd.DataFrame(rows, columns=[*RUN, "measurements"]),
        pd.DataFrame(refused, columns=[*RUN, "why"]),
        _parameters(kept, model),
        folder or "",
        (note, *_differences(kept)),
    )


def _record(name: str) -> str:
    """`"breakdown"` of `"breakdown.linear_percent"`."""
    return name.partition(".")[0]


@dataclass(frozen=True)
class _Run:
    """The parts of one row that are used.

    Attributes:
        settings: parameters of the measurement; empty where the run read a file of another run.
        why: reason why it cannot be used; "" if it can.
    """

    notebook: str
    source: str
    started: str
    model: str | None
    hardware: str
    settings: dict[str, Any]
    measured: dict[str, Measurement]
    why: str

    @classmethod
    def of(cls, row: Mapping[str, Any], tree: Tree) -> _Run:
        path = row.get("notebook")
        notebook = Path(path).stem if isinstance(path, str) else str(row.get("name"))
        technique = _plain(row.get("p.technique"))
        source = f"{notebook}/{row.get('run_id')}{f' ({technique})' if technique else ''}"
        folder = Path(str(row.get("folder")))
        parameters = {name: _plain(row.get(f"p.{name}")) for name in (*SETTINGS, *FILES)}
        files = FILES if notebook not in BESIDE else [name for name in FILES if name != "trace"]
        elsewhere = any(parameters[name] is not None for name in files)
        lines = [(line.get("fact"), line.get("value")) for line in _table(folder, "trace")]
        facts = {fact: value for fact, value in lines if value != "None"} if elsewhere else {}
        gpu = facts.get("GPU") if elsewhere else _plain(row.get("gpu"))
        on_cpu = gpu is None or (str(parameters["device"]).startswith("cpu") and not elsewhere)
        numbers = {
            key.removeprefix("m."): number(value) for key, value in row.items() if key.startswith("m.")
        }
        for line in _table(folder, "divergence"):
            if line.get("metric") == "lpips":
                numbers["divergence.lpips"] = _float(line.get("mean"))
                numbers["divergence.lpips_ratio_to_noise_floor"] = _float(line.get("ratio_to_noise_floor"))
        memory = facts.get("gpu_memory_gib") if elsewhere else read_run(folder).machine.memory_gib
        numbers[f"{notebook}.device_memory_gib"] = _float(memory)
        measured = {
            n: Measurement(v, source) for n, v in numbers.items() if v is not None and n in tree.measurements
        }
        recorded = [name for name in measured if not name.endswith("device_memory_gib")]
        model = facts.get("model") if elsewhere else parameters["model"]
        why = "" if recorded else "records nothing that the tree asks for"
        why = why if model else "looks at a file, and of which model that is was not recorded"
        if row.get("state") != "finished":
            reason = _plain(row.get("reason"))
            why = f"{row.get('state')}: {reason}" if reason else str(row.get("state"))
        hardware = f"CPU {_plain(row.get('cpu')) or ''}".strip() if on_cpu else str(gpu)
        name = Path(model).name if model and Path(model).is_dir() else model
        settings = {} if elsewhere else {n: parameters[n] for n in SETTINGS}
        return cls(
            notebook, source, str(row.get("started", ""))[:19], name, hardware, settings, measured, why
        )

    @property
    def row(self) -> dict[str, Any]:
        return dict(zip(RUN, (self.source, self.started, self.model, self.hardware), strict=True))


def _plain(value: Any) -> Any:
    """A cell of a table: None for NaN, and 64 for 64.0, which pandas makes of it."""
    if value is None or value != value:
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _float(text: Any) -> float | None:
    try:
        return number(float(text))
    except (TypeError, ValueError):
        return None


def _table(folder: Path, name: str) -> list[dict[str, str]]:
    """A table among the files of a run, as text; empty without one."""
    try:
        with (folder / "artifacts" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return []


def _parameters(runs: list[_Run], model: str | None) -> dict[str, Any]:
    """Parameters that measure with the same settings; "auto" and defaults are left out."""
    settings = next((run.settings for run in reversed(runs) if run.settings), {"model": model})
    return {n: v for n, v in settings.items() if v not in (None, "auto", DEFAULTS.get(n))}


def _differences(runs: list[_Run]) -> Iterator[str]:
    """Settings in which the runs that are read together differ."""
    for name in SETTINGS:
        values = {run.notebook: run.settings[name] for run in runs if run.settings}
        if len(set(values.values())) > 1:
            each = ", ".join(f"{'default' if value is None else value} in {n}" for n, value in values.items())
            yield f"{name} is not the same everywhere: {each}"
