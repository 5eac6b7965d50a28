"""What saved runs measured, of one model on one machine."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from wanlab.diagnose.triage.tree import Measurement, Tree, number, read_tree

# Parameters that every measuring notebook has.
SETTINGS = ("model", "weights", "device", "dtype", "height", "width", "frames", "steps")
RUN = ["run", "started", "model", "hardware"]
DEFAULTS = {"model": "wan-nano", "weights": "pretrained"}
FILES = ("trace", "original", "saved")  # parameters that name a file made elsewhere, perhaps by another model
BESIDE = ("12_experts", "13_attention")  # show a trace beside what they measure themselves
# The state of such a run, or what older runs said when they failed or died of it.
OUT_OF_MEMORY = re.compile(
    r"\Amemory\b|out of memory|OutOfMemory|MemoryError|bad_alloc|memory runs out", re.IGNORECASE
)


@dataclass(frozen=True)
class Saved:
    """What runs measured: `measured` by name; the runs `used` and `refused` (with `why`) as tables; `options` for a
    command that measures the same model alike; `notes` on what to mind."""

    measured: dict[str, Measurement] = field(default_factory=dict)
    used: pd.DataFrame | None = None
    refused: pd.DataFrame | None = None
    options: str = ""
    notes: tuple[str, ...] = ()


def run_measurements(
    runs: Any,
    tree: Tree | None = None,
    *,
    model: str | None = None,
    hardware: str | None = None,
    folder: str | None = None,
) -> Saved:
    """What saved runs measured, of one model on one machine: of each notebook the newest finished run counts.

    Args:
        runs: rows as `wanlab.load_runs` gives them (a table or a list of dicts), oldest first. What lies beside a row in
            its `folder` is read too: the device's memory, what a given trace was of, the divergence.
        tree: names the measurements; the default tree if not given.
        model: whose runs count; that of the newest run if not given.
        hardware: part of the name of the GPU or of "CPU ..."; that of the newest run of the model if not given.
        folder: where commands are to keep new runs; the project's outputs if not given.
    """
    tree = tree or read_tree()
    wanted = {quantity.notebook for quantity in tree.measurements.values()}
    rows = runs.to_dict(orient="records") if hasattr(runs, "to_dict") else list(runs)
    found = [run for run in (_SavedRun.of(row, tree) for row in rows) if run.notebook in wanted]
    named = [run for run in found if run.model]
    model = model or next((run.model for run in reversed([r for r in named if not r.why] or named)), None)
    mine = [run for run in named if run.model == model]
    on = [run for run in mine if (hardware or "").lower() in run.hardware.lower()]
    newest = next((run.hardware for run in reversed([r for r in on if not r.why] or on)), hardware)
    here = [run for run in on if run.hardware == newest]
    used = {run.notebook: run for run in here if not run.why}
    kept, refused = [run for run in found if run in used.values()], []
    measured: dict[str, Measurement] = {}
    for run in kept:  # a record is taken whole from one run, the newest that has it
        records = {name.partition(".")[0] for name in run.measured}
        measured = {
            n: item for n, item in measured.items() if n.partition(".")[0] not in records
        } | run.measured
    if last := {run.notebook: run for run in here if run.settings and run.why != "running"}:
        failed = [run.source for run in last.values() if OUT_OF_MEMORY.search(run.why)]
        measured["runs.out_of_memory"] = Measurement(
            len(failed), ", ".join(failed or [r.source for r in used.values()])
        )
    for run in (run for run in found if run not in kept):
        other = "another machine" if run in mine else "another model"
        refused.append(run.row | {"why": run.why or ("an older run" if run in here else other)})
    options = f" --output {shlex.quote(folder)}" if folder else ""
    said = f"{model or 'any model'}{f' on {newest}' if newest else ''}"
    note = (
        f"Read together: {len(kept)} run(s) of {said}."
        if kept
        else f"No run of {said} measured what the tree asks for."
    )
    return Saved(
        measured,
        pd.DataFrame(
            [run.row | {"measurements": len(run.measured)} for run in kept], columns=[*RUN, "measurements"]
        ),
        pd.DataFrame(refused, columns=[*RUN, "why"]),
        options + _options(kept, model),
        (note, *_differences(kept)),
    )


@dataclass(frozen=True)
class _SavedRun:
    """What is needed of one row; `why` it cannot be used, "" if it can."""

    notebook: str
    source: str
    started: str
    model: str | None
    hardware: str
    settings: dict[str, Any]  # empty where the run looked at a file made elsewhere
    measured: dict[str, Measurement]
    why: str

    @classmethod
    def of(cls, row: Mapping[str, Any], tree: Tree) -> _SavedRun:
        path = row.get("notebook")
        notebook = Path(path).stem if isinstance(path, str) else str(row.get("name"))
        technique = _plain(row.get("p.technique"))
        source = f"{notebook}/{row.get('run_id')}{f' ({technique})' if technique else ''}"
        folder = Path(str(row.get("folder")))
        given = {name: _plain(row.get(f"p.{name}")) for name in (*SETTINGS, *FILES)}
        files = FILES if notebook not in BESIDE else [name for name in FILES if name != "trace"]
        elsewhere = any(given[name] is not None for name in files)
        lines = [(line.get("fact"), line.get("value")) for line in _table(folder, "trace")]
        facts = {fact: value for fact, value in lines if value != "None"} if elsewhere else {}
        gpu = facts.get("GPU") if elsewhere else _plain(row.get("gpu"))
        on_cpu = gpu is None or (str(given["device"]).startswith("cpu") and not elsewhere)
        numbers = {
            key.removeprefix("m."): number(value) for key, value in row.items() if key.startswith("m.")
        }
        for line in _table(folder, "divergence"):
            if line.get("metric") == "lpips":
                numbers["divergence.lpips"] = _float(line.get("mean"))
                numbers["divergence.lpips_times_floor"] = _float(line.get("times_floor"))
        here = None if elsewhere else _device_memory_gib(folder, on_cpu)
        numbers[f"{notebook}.device_memory_gib"] = _float(facts.get("gpu_memory_gib")) if elsewhere else here
        known = {
            n: Measurement(v, source) for n, v in numbers.items() if v is not None and n in tree.measurements
        }
        recorded = [name for name in known if not name.endswith("device_memory_gib")]
        model = facts.get("model") if elsewhere else given["model"]
        why = "" if recorded else "records nothing that the tree asks for"
        why = why if model else "looks at a file, and of which model that is was not recorded"
        if row.get("state") != "finished":
            reason = _plain(row.get("reason"))
            why = f"{row.get('state')}: {reason}" if reason else str(row.get("state"))
        hardware = f"CPU {_plain(row.get('cpu')) or ''}".strip() if on_cpu else str(gpu)
        name = Path(model).name if model and Path(model).is_dir() else model
        settings = {} if elsewhere else {n: given[n] for n in SETTINGS}
        return cls(notebook, source, str(row.get("started", ""))[:19], name, hardware, settings, known, why)

    @property
    def row(self) -> dict[str, Any]:
        return dict(zip(RUN, (self.source, self.started, self.model, self.hardware), strict=True))


def _plain(value: Any) -> Any:
    """A cell of a table: None where it is empty, and 64 where the table made it 64.0."""
    if value is None or value != value:
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _float(text: Any) -> float | None:
    try:
        return number(float(text))
    except (TypeError, ValueError):
        return None


def _table(folder: Path, name: str) -> list[dict[str, str]]:
    """A table that a run has kept, as text; empty where there is none."""
    try:
        with (folder / "artifacts" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return []


def _device_memory_gib(folder: Path, on_cpu: bool) -> float | None:
    try:
        where = json.loads((folder / "run.json").read_text("utf-8"))["environment"]
        return number(where["ram_gib"] if on_cpu else where["gpu"]["memory_gib"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _options(runs: list[_SavedRun], model: str | None) -> str:
    """What to give to another notebook so that it measures the same; "auto" and defaults need not be said."""
    settings = next((run.settings for run in reversed(runs) if run.settings), {"model": model})
    said = {n: v for n, v in settings.items() if v not in (None, "auto", DEFAULTS.get(n))}
    return "".join(f" -p {name}={shlex.quote(str(value))}" for name, value in said.items())


def _differences(runs: list[_SavedRun]) -> Iterator[str]:
    """Settings in which the runs that are read together differ."""
    for name in SETTINGS:
        values = {run.notebook: run.settings[name] for run in runs if run.settings}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{'default' if value is None else value} in {n}" for n, value in values.items())
            yield f"{name} is not the same everywhere: {told}"
