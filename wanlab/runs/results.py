"""Reads the runs below a folder: as one table, as typed results, and as configurations with their repeats pooled."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd

from wanlab.core.effects import NOT_APPLIED
from wanlab.core.errors import WanlabError, clean, cleaned, did_you_mean
from wanlab.core.files import plain, read_json
from wanlab.core.paths import default_outputs, locate
from wanlab.core.text import convert, decode_text, parse_json, read_bytes
from wanlab.measure.timing import Samples, check_statistics
from wanlab.runs.folder import RunFolder
from wanlab.runs.forms import BenchForm, BuildForm, MetricForm, SweepForm
from wanlab.runs.result import (
    NON_FINITE,
    TIMED,
    Machine,
    Result,
    Work,
    bench_result,
    build_results,
    checked_result,
    machine_of,
    parse_result,
    work_of_parameters,
)
from wanlab.runs.same_work import load_text
from wanlab.runs.seal import broken

COLUMNS = (
    "name", "run_id", "notebook", "state", "started", "seconds", "verdict", "reason", "gpu", "cpu", "wanlab", "folder",
)  # fmt: skip
MARKS = ("run.json", "status.json", "executed.ipynb", "seal.json")
CHANGED = "changed"  # state of a finished run whose files are not those that it ended with


@dataclass(frozen=True)
class RunRecord:
    """Content of the files of one run.

    Attributes:
        row: the columns of `load_runs`.
        record: run.json; like all that follows empty where the run cannot be read.
        metrics: name -> its last recorded value, tables and samples too.
        results: typed rows; the first is what the run is about.
    """

    row: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    results: tuple[Result, ...] = ()

    @property
    def folder(self) -> Path:
        return Path(self.row["folder"])

    @property
    def state(self) -> str:
        return str(self.row["state"])

    @property
    def parameters(self) -> dict[str, Any]:
        return self.record.get("parameters") or {}

    @property
    def result(self) -> Result | None:
        """The row that the run is about; None where it recorded none."""
        return self.results[0] if self.results else None

    @cached_property
    def work(self) -> Work:
        """Work of its result, else of its parameters and the defaults of its model."""
        return self.result.work if self.result else work_of_parameters(self.parameters)

    @cached_property
    def machine(self) -> Machine:
        if self.result and self.result.machine:
            return self.result.machine
        return machine_of(self.record.get("environment") or {}, device=str(self.parameters.get("device", "")))

    @property
    def dtype(self) -> str | None:
        return self.result.dtype if self.result else None

    @property
    def setup(self) -> dict[str, Any]:
        """What its figures depend on beside work and machine: files of the model, software, wanlab's code, cases."""
        values, cases = self.parameters, None
        if values.get("cases") is not None:
            cases = f"{values['cases']} {values.get('case_set') or ''}".strip()
        own = {
            "weights_files": self.record.get("weights"),
            "wanlab": self.record.get("wanlab_source"),
            "cases": cases,
        }
        return (self.result.setup if self.result else {}) | own

    @property
    def figures(self) -> dict[str, Any]:
        """Recorded numbers and words by name, and the figures of its result."""
        return scalars(self.metrics) | (self.result.row() if self.result else {})


def load_runs(path: str | os.PathLike | None = None) -> Any:
    """One row per run found below `path` (by default the project's `outputs/`), oldest first.

    Columns: name, run_id, notebook, state, started (UTC), seconds, verdict, reason, gpu, cpu, wanlab, folder,
    then each parameter as `p.<name>` and each recorded scalar as `m.<name>`: figures of the run's result under their own
    names, of other recorded values the last of a name, entries of a recorded dict as `m.<name>.<key>`. Earlier attempts of a
    run are not rows.

    A folder that cannot be read is a row with state "unreadable" and the reason, a finished run whose files were changed
    after it ended one with state "changed". A run that says "running" but whose process is gone reads "died".

    Raises:
        WanlabError: `path` does not exist.
    """
    if path is None and not default_outputs().exists():
        return pd.DataFrame(columns=list(COLUMNS))
    return frame_of(read_runs(path)).sort_values(
        "started", kind="stable", na_position="first", ignore_index=True
    )


def frame_of(runs: Iterable[RunRecord]) -> pd.DataFrame:
    """The columns of `load_runs`, in the order of the runs."""
    rows = [run.row for run in runs]
    named = dict.fromkeys(key for row in rows for key in row)
    columns = [*COLUMNS, *(key for mark in ("p.", "m.") for key in named if key.startswith(mark))]
    # Column by column: pandas takes several times as long over rows of many keys.
    frame = pd.DataFrame({key: [row.get(key) for row in rows] for key in columns}, columns=columns)
    frame["started"] = pd.to_datetime(frame["started"], utc=True, errors="coerce", format="ISO8601")
    frame["seconds"] = pd.to_numeric(frame["seconds"], errors="coerce")
    return frame


def read_runs(path: str | os.PathLike | None = None) -> Iterator[RunRecord]:
    """Every run below a folder, in the order of their names.

    Raises:
        WanlabError: `path` does not exist.
    """
    root = locate(path) if path is not None else default_outputs()
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
    """The record of one run folder. It never raises: a folder that cannot be read has the state "unreadable"."""
    folder = RunFolder(path)
    row: dict[str, Any] = {"name": path.parent.name, "run_id": path.name, "folder": str(path)}
    try:
        record, status = folder.record(), folder.status()
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
        row = cleaned(row) | {"folder": str(path)}
        row |= parameter_cells(record.get("parameters") or {})
        whole = row["state"] == "finished"
        if whole:
            _check_record(record, folder)
        if whole and (damage := broken(folder, record)):
            return RunRecord(row | {"state": CHANGED, "reason": damage}, record)
        run = RunRecord(row, record, read_metrics(folder.metrics, whole), read_results(folder, whole))
        row |= {f"m.{name}": value for name, value in run.figures.items()}
        return run
    except (WanlabError, AttributeError, TypeError, ValueError, KeyError, OSError) as error:
        return RunRecord(row | {"state": "unreadable", "reason": clean(error)})


def _check_record(record: Mapping[str, Any], folder: RunFolder) -> None:
    """Refuse the run.json of a finished run that does not say what was run."""
    if record.get("run_id") is None:
        raise WanlabError(f"{folder.run_json} has no run_id: it was emptied or cut; run the notebook again")


def read_results(folder: RunFolder, whole: bool = False) -> tuple[Result, ...]:
    """The rows of results.jsonl; a row that was recorded again replaces the first, in its place.

    Args:
        whole: whether the run has ended, so that an incomplete last line is an error.

    Raises:
        WanlabError: a line is no result, or its figures contradict its samples.
    """
    source = f"{folder.path.parent.name}/{folder.path.name}"
    return _results_of(folder.results, source, whole)


def _results_of(path: Path, source: str, whole: bool = False) -> tuple[Result, ...]:
    one_run = path.name == "results.jsonl"  # other files hold rows of several runs and machines
    rows: dict[tuple, Result] = {}
    for line, value in _json_lines(path, whole):
        row = parse_result(value, f"{path}, line {line}")
        row = row if row.source else msgspec.structs.replace(row, source=source)
        rows[row.key if one_run else (*row.key, row.source, row.machine)] = row
    return tuple(rows.values())


def load_results(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> tuple[list[Result], pd.DataFrame]:
    """Every result in files and folders.

    Args:
        paths: run folders, `.jsonl` files of results, JSON files of `wanlab bench` or of the engines of
            `engines.build_tensorrt`, or folders of such files.

    Returns:
        The results in the order of the paths, and a DataFrame of the files without a result: source, reason.
    """
    results, unread = [], []
    for path in _files([paths] if isinstance(paths, str | os.PathLike) else paths):
        try:
            results += read_file(path)
        except WanlabError as error:
            unread.append({"source": path.name, "reason": str(error)})
    return results, pd.DataFrame(unread, columns=["source", "reason"])


def read_file(path: str | os.PathLike) -> list[Result]:
    """Results of one run folder or file.

    Raises:
        WanlabError: it cannot be read, or holds no result.
    """
    path = Path(path)
    rows: Sequence[Result] = ()
    if path.is_dir():
        run = read_run(path)
        if run.state in (CHANGED, "unreadable") and (path / "status.json").is_file():
            raise WanlabError(f"{path.name}: {run.row['reason']}")
        rows = run.results or read_results(RunFolder(path))
    elif path.suffix == ".jsonl":
        rows = _results_of(path, path.name)
    else:
        value = read_json(path)
        if not isinstance(value, dict):
            raise WanlabError(f"{path.name} is not a JSON object")
        builds = [value] if "compute_capabilities" in value else value.get("builds") or []
        if {"schema", "engine", "inputs", "samples", "metadata"} <= value.keys():
            convert(value, BenchForm, str(path))
            for name, samples in value["samples"].items():
                check_statistics(samples, f"{path.name}, {name}")
            rows = [checked_result(bench_result(value, source=path.name))]
        elif isinstance(builds, list) and all(
            isinstance(b, dict) and "compute_capabilities" in b for b in builds
        ):
            convert(builds, list[BuildForm], f"{path}, builds")
            rows = build_results(builds, taken=str(value.get("taken", "")), source=path.name)
    if not rows:
        raise WanlabError(f"{path.name} holds no result; `run.result` writes one")
    return list(rows)


def _files(paths: Iterable[str | os.PathLike]) -> list[Path]:
    files: list[Path] = []
    for path in map(locate, paths):
        inside = path.is_dir() and not (path / "run.json").is_file()
        files += sorted([*path.glob("*.json"), *path.glob("*.jsonl")]) if inside else [path]
    return files


def read_metrics(path: Path, whole: bool = False) -> dict[str, Any]:
    """The last recorded value of each name in a metrics.jsonl.

    Args:
        whole: whether the run has ended, so that an incomplete last line is an error.

    Raises:
        WanlabError: a line before the last is incomplete, a line has no name and value, or the statistics of a timing
            contradict its samples.
    """
    values = {}
    for line, entry in _json_lines(path, whole):
        row = convert(entry, MetricForm, f"{path}, line {line}")
        check_statistics(row.value, f"{path}, line {line}, {row.name}")
        values[row.name] = row.value
    return values


def _json_lines(path: Path, whole: bool = False) -> Iterator[tuple[int, Any]]:
    """Number and value of each line. An incomplete last line is skipped, unless the file is to be whole.

    Raises:
        WanlabError: a line is incomplete.
    """
    lines = read_bytes(path, "json_mib").split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = parse_json(decode_text(line, where), where)
        except WanlabError:
            if number == len(lines) and not whole:
                break
            raise
        yield number, value


def scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, words and booleans among recorded values, entries of a dict as `<name>.<key>`; "inf", "-inf" and "nan"
    become numbers."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            {f"{name}.{key}": item for key, item in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    kinds = (bool, int, float, str, type(None))
    scalar = {name: value for name, value in flat.items() if isinstance(value, kinds)}
    return {n: NON_FINITE.get(v, v) if isinstance(v, str) else v for n, v in scalar.items()}


def parameter_cells(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as columns of `load_runs`."""
    named = parameters.items()
    return {f"p.{name}": tuple(value) if isinstance(value, list) else value for name, value in named}


# Names of figures

_MORE_IS_BETTER = re.compile(r"(psnr|ssim|throughput|speedup|fps|per_s$|cosine|tflops|_db$)")
_SUBTRACTED = re.compile(r"(percent|lpips|psnr|ssim|_db$|cosine|flicker)")


def better(column: str) -> str:
    """`"max"` where more of a figure is better (a throughput, PSNR), else `"min"`."""
    return "max" if _MORE_IS_BETTER.search(_last(column)) else "min"


def is_ratio(column: str) -> bool:
    """Whether two values are divided (times, sizes), not subtracted (percentages, decibels, LPIPS)."""
    return not _SUBTRACTED.search(_last(column))


def is_time(column: str) -> bool:
    """Whether the samples of a result are samples of this figure."""
    return _last(column) in TIMED


def is_number(value: Any) -> bool:
    """Whether it is a number other than NaN; a boolean is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def number(value: Any) -> float:
    """A value as a number, NaN where it is none."""
    return float(value) if is_number(value) else math.nan


def parameter_text(value: Any) -> str:
    """A parameter's value as one types it on the command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(parameter_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def resolve(name: str, columns: Iterable[str]) -> str:
    """The column that a name means: itself, or the only one that ends in it (`speedup` means `gain.speedup`).

    Raises:
        WanlabError: no column, or several.
    """
    columns = list(dict.fromkeys(columns))
    short = name.removeprefix("m.")
    for exact in (name, short):
        if exact in columns:
            return exact
    ends = [column for column in columns if column.endswith(f".{short}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise WanlabError(f"{name!r} could be {', '.join(ends)}; give one of them")
    near = did_you_mean(name, [*columns, *(column.rpartition(".")[2] for column in columns)])
    names = f"; there is {', '.join(columns[:12])}{' ...' if len(columns) > 12 else ''}" if columns else ""
    raise WanlabError(f"no recorded number {name!r}{near}{'' if near else names}")


def _last(column: str) -> str:
    return str(column).rpartition(".")[2].lower()


# Configurations: repeats pooled

SAMPLED = (TIMED[0], TIMED[2])  # whose values are the samples themselves
LOST = "results.jsonl is missing or empty, and other runs of this notebook recorded results"
FAILURE_COLUMNS = ("configuration", "state", "reason", "repeat", "run_id", "folder")


@dataclass(frozen=True, eq=False)
class MeasuredConfiguration:
    """Repeats of one set of parameters on one machine, pooled.

    Attributes:
        label: its varied parameters, `"engine=eager, plan=default"`.
        name: name of the notebook.
        parameters: all parameters.
        results: recorded numbers and words by name; the median of repeats, and all words that differ.
        samples: samples of all repeats together; None where none were recorded.
        noise_percent: A/A noise, or the spread of the repeats where that is more; None where neither is known.
        runs: the run of every repeat.
    """

    label: str
    name: str
    parameters: dict[str, Any]
    results: dict[str, Any]
    samples: Samples | None
    noise_percent: float | None
    runs: tuple[RunRecord, ...]

    @property
    def work(self) -> Work:
        return self.runs[0].work

    @property
    def machine(self) -> Machine:
        return self.runs[0].machine

    @property
    def dtype(self) -> str | None:
        return self.runs[0].dtype

    @property
    def setup(self) -> dict[str, Any]:
        return self.runs[0].setup

    @property
    def load(self) -> str:
        """Load of the machine while its repeats were timed, in words; "" where it does not matter or is not known."""
        return load_text(run.result for run in self.runs)

    @property
    def applied(self) -> bool:
        """False where the effect check says "not applied": then it is not the configuration that its name says."""
        return self.results.get("effect") != NOT_APPLIED

    @property
    def repeats(self) -> int:
        return len(self.runs)

    @property
    def folder(self) -> Path:
        """Folder of the first repeat."""
        return self.runs[0].folder

    def clip(self, name: str = "video") -> Path | None:
        """A clip that the run saved, `"video"`, `"original"` or `"truth"`; None without one."""
        path = self.folder / "artifacts" / f"{name}.mp4"
        return path if path.is_file() else None


@dataclass(frozen=True, eq=False)
class MeasuredConfigurations:
    """Configurations and failed runs below some folders.

    Attributes:
        rows: finished configurations, in the order of their sweep, else oldest first.
        axes: parameters that vary between the runs.
        failures: runs that did not finish: configuration, state, reason, repeat, run_id, folder.
        sweep: sweep.json of the first folder that has one, else empty.
        where: names of the folders, for messages.
    """

    rows: tuple[MeasuredConfiguration, ...]
    axes: tuple[str, ...]
    failures: pd.DataFrame
    sweep: dict[str, Any] = field(default_factory=dict)
    where: str = ""

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the recorded numbers, the most frequent first."""
        counts = Counter(n for row in self.rows for n, value in row.results.items() if is_number(value))
        return tuple(name for name, _ in counts.most_common())


def configurations(runs: Any) -> MeasuredConfigurations:
    """Runs below folders as configurations.

    In a folder with a sweep.json only the runs that it lists count: runs of earlier code may be in the folder too.

    Args:
        runs: a folder of runs, several, a table of `load_runs`, or `MeasuredConfigurations`.

    Raises:
        WanlabError: no such folder, or no run in any.
    """
    if isinstance(runs, MeasuredConfigurations):
        return runs
    if hasattr(runs, "columns"):  # a table of load_runs
        folders = list(dict.fromkeys(map(str, runs["folder"]))) if len(runs) else []
        return pooled([read_run(Path(folder)) for folder in folders], {}, "the table")
    paths = [runs] if isinstance(runs, str | os.PathLike) else list(runs)
    records: dict[Path, RunRecord] = {}
    sweep: dict[str, Any] = {}
    for path in map(locate, paths):
        own = read_sweep(path)
        order = {str(run.get("run_id")): i for i, run in enumerate(own.get("runs") or ())}
        below = list(read_runs(path))
        if order:
            below = [run for run in below if run.folder.name in order]
            below.sort(key=lambda run: order[run.folder.name])
        else:
            below.sort(key=lambda run: str(run.row.get("started") or ""))
        records |= {run.folder.resolve(): run for run in below}
        sweep = sweep or own
        if own and own is not sweep:  # several sweeps: none of them describes all runs
            axes = [*sweep.get("axes", ()), *own.get("axes", ())]
            sweep = {"axes": axes, "baseline": sweep.get("baseline")}
    return pooled(list(records.values()), sweep, ", ".join(map(str, paths)))


def read_sweep(folder: Path) -> dict[str, Any]:
    """sweep.json of a folder; empty where there is none.

    Raises:
        WanlabError: it cannot be read, or a field that decides what is compared is of another type.
    """
    file = folder / "sweep.json"
    if not file.is_file():
        return {}
    try:
        sweep = read_json(file)
        convert(sweep, SweepForm, str(file))
    except WanlabError as error:
        raise WanlabError(f"{error}; run the sweep again, which writes it") from error
    return sweep


def pooled(records: Sequence[RunRecord], sweep: Mapping[str, Any], where: str) -> MeasuredConfigurations:
    """Runs as configurations. Runs that the sweep lists and that never started are among the failures.

    Raises:
        WanlabError: no run at all.
    """
    listed = {str(run.get("run_id")): run for run in sweep.get("runs") or () if isinstance(run, Mapping)}
    if not records and not listed:
        raise WanlabError(f"no runs in {where}; `wanlab run NOTEBOOK` or `wanlab sweep GRID` makes some")
    axes = varied_parameters(records, sweep)
    several = len({run.row["name"] for run in records if run.state == "finished"}) > 1

    def label(run: RunRecord) -> str:
        parts = [f"{axis}={parameter_text(run.parameters[axis])}" for axis in axes if axis in run.parameters]
        return ", ".join([str(run.row["name"])] * (several or not parts) + parts)

    def failure(run: RunRecord) -> tuple:
        name = str(listed.get(str(run.row["run_id"]), {}).get("label") or label(run))
        reason, repeat = str(run.row.get("reason") or ""), run.record.get("repeat", 1)
        return name, run.state, reason, repeat, str(run.row["run_id"]), run.row["folder"]

    groups: dict[str, list[RunRecord]] = {}
    failures = []
    recording = {run.row["name"] for run in records if run.results}
    for run in records:
        if run.state == "finished" and run.row["name"] in recording and not run.results:
            lost = replace(run, row=run.row | {"state": "unreadable", "reason": LOST})
            failures.append(failure(lost))
        elif run.state == "finished":
            groups.setdefault(_identity(run), []).append(run)
        else:
            failures.append(failure(run))
    started = {str(run.row["run_id"]) for run in records}
    for run_id, entry in listed.items():
        if run_id not in started:
            state = str(entry.get("state") or "pending")
            reason = "has not started" if state == "pending" else "its folder is not there"
            failures.append((str(entry.get("label")), state, reason, entry.get("repeat", 1), run_id, ""))
    rows = [_pooled(label(group[0]), group) for group in groups.values()]
    labels = [row.label for row in rows]
    rows = [  # two of one label, as of two machines
        replace(row, label=f"{row.label} ({row.runs[0].row['run_id']})")
        if labels.count(row.label) > 1
        else row
        for row in rows
    ]
    frame = pd.DataFrame(failures, columns=list(FAILURE_COLUMNS))
    return MeasuredConfigurations(tuple(rows), tuple(axes), frame, dict(sweep), where)


def varied_parameters(records: Sequence[RunRecord], sweep: Mapping[str, Any] | None = None) -> list[str]:
    """Parameters that vary between runs. The axes of a sweep come first, also those with one value."""
    values: dict[str, set[str]] = {}
    for run in records:
        for name, value in run.parameters.items():
            values.setdefault(name, set()).add(value if isinstance(value, str) else json.dumps(plain(value)))
    axes = dict.fromkeys(map(str, (sweep or {}).get("axes") or ()))
    names = [*axes, *(name for name, each in values.items() if len(each) > 1)]
    return [name for name in dict.fromkeys(names) if name in values]


def _identity(run: RunRecord) -> str:
    """Key that repeats of one configuration share: notebook, parameters, machine, software, code and weights."""
    return json.dumps(plain([run.row["name"], run.parameters, repr(run.machine), run.setup]), sort_keys=True)


def _pooled(label: str, group: Sequence[RunRecord]) -> MeasuredConfiguration:
    first = group[0]
    figures = [run.figures for run in group]
    names = dict.fromkeys(name for each in reversed(figures) for name in each)
    values = {name: _one_value([each[name] for each in figures if name in each]) for name in names}
    results = [run.result for run in group if run.result]
    taken = tuple(sample for result in results for sample in result.samples_ms)
    samples = Samples(label, taken, results[0].device) if taken else None
    if samples is not None:
        values |= {name: samples.median for name in SAMPLED if name in values}
    noise = _noise_percent(figures)
    return MeasuredConfiguration(
        label, str(first.row["name"]), dict(first.parameters), values, samples, noise, tuple(group)
    )


def _one_value(values: Sequence[Any]) -> Any:
    """One value for those of several repeats."""
    if len(values) == 1 or all(value == values[0] for value in values):
        return values[0]
    if all(map(is_number, values)):
        return statistics.median(values)
    return ", ".join(dict.fromkeys(map(str, values)))


def _noise_percent(figures: Sequence[Mapping[str, Any]]) -> float | None:
    """A/A noise, and at least the spread of the repeats, which no control within one run shows."""
    controls = [each["noise_percent"] for each in figures if is_number(each.get("noise_percent"))]
    noise = statistics.median_high(controls) if controls else None
    times = [time for each in figures for name in SAMPLED if number(time := each.get(name)) > 0]
    return max(noise or 0.0, 100 * (max(times) / min(times) - 1)) if len(times) > 1 else noise
