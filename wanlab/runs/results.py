"""All runs below a folder: as one tidy table, as typed results, and as configurations whose repeats are pooled."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.files import plain, read_json
from wanlab.core.paths import default_outputs, locate
from wanlab.measure.timing import Samples
from wanlab.runs.folder import RunFolder
from wanlab.runs.result import (
    Machine,
    Result,
    Work,
    bench_result,
    build_results,
    machine_of,
    parse_result,
    work_of_parameters,
)

COLUMNS = (
    "name", "run_id", "notebook", "state", "started", "seconds", "verdict", "reason", "gpu", "cpu", "wanlab", "folder",
)  # fmt: skip
MARKS = ("run.json", "status.json", "executed.ipynb")
TIMED = ("time_per_video_ms", "time_per_frame_ms", "time_per_call_ms")
"""Figures that the samples of a result are samples of."""


@dataclass(frozen=True)
class RunRecord:
    """What the files of one run say.

    Attributes:
        row: the columns of `load_runs`.
        record: run.json. metrics: name -> its last recorded value, tables and samples too. All empty where the run cannot
            be read.
        results: typed rows, first what the run is about.
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
        """What the run is about; None where it recorded no result."""
        return self.results[0] if self.results else None

    @cached_property
    def work(self) -> Work:
        """Of its result, else of its parameters and the model's defaults."""
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
    def figures(self) -> dict[str, Any]:
        """Recorded numbers and words by name, those of the result without a prefix."""
        return scalars(self.metrics) | (self.result.row() if self.result else {})


def load_runs(path: str | os.PathLike | None = None) -> Any:
    """One row per run found below `path` (by default the project's `outputs/`), oldest first.

    Columns: name, run_id, notebook, state, started (UTC), seconds, verdict, reason, gpu, cpu, wanlab, folder,
    then each parameter as `p.<name>` and each recorded scalar as `m.<name>`: figures of the run's result under their own
    names, of other recorded values the last of a name, entries of a recorded dict as `m.<name>.<key>`. Earlier attempts of a
    run are not rows.

    A folder that cannot be read is a row with state "unreadable" and the reason. A run that says "running"
    but whose process is gone reads "died".

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
        row |= parameter_cells(record.get("parameters") or {})
        run = RunRecord(row, record, read_metrics(folder.metrics), read_results(folder))
        row |= {f"m.{name}": value for name, value in run.figures.items()}
        return run
    except (WanlabError, AttributeError, TypeError, ValueError, KeyError, OSError) as error:
        return RunRecord(row | {"state": "unreadable", "reason": str(error)})


def read_results(folder: RunFolder) -> tuple[Result, ...]:
    """The rows of results.jsonl; one that was recorded again stands in the place of the first.

    Raises:
        WanlabError: a line that is no result.
    """
    source = f"{folder.path.parent.name}/{folder.path.name}"
    return _results_of(folder.results, source)


def _results_of(path: Path, source: str) -> tuple[Result, ...]:
    rows: dict[tuple, Result] = {}
    for number, value in _json_lines(path):
        row = parse_result(value, f"{path}, line {number}")
        row = row if row.source else msgspec.structs.replace(row, source=source)
        rows[row.key + ((row.source, row.machine) if path.name != "results.jsonl" else ())] = row
    return tuple(rows.values())


def load_results(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> tuple[list[Result], pd.DataFrame]:
    """Every result in files and folders.

    Args:
        paths: run folders, `.jsonl` files of results, JSON files that `wanlab bench` saved or that lie beside a built
            engine, or folders of such files.

    Returns:
        The results in the order of the paths, and a DataFrame of what holds none: source, reason.
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
        rows = read_results(RunFolder(path)) or read_run(path).results
    elif path.suffix == ".jsonl":
        rows = _results_of(path, path.name)
    else:
        value = read_json(path)
        if not isinstance(value, dict):
            raise WanlabError(f"{path.name} is not a JSON object")
        builds = [value] if "compute_capabilities" in value else value.get("builds") or []
        if {"schema", "engine", "inputs", "samples", "metadata"} <= value.keys():
            rows = [bench_result(value, source=path.name)]
        elif isinstance(builds, list) and all("compute_capabilities" in build for build in builds):
            rows = build_results(builds, taken=value.get("taken", ""), source=path.name)
    if not rows:
        raise WanlabError(f"{path.name} holds no result; `run.result` writes one")
    return list(rows)


def _files(paths: Iterable[str | os.PathLike]) -> list[Path]:
    files: list[Path] = []
    for path in map(locate, paths):
        inside = path.is_dir() and not (path / "run.json").is_file()
        files += sorted([*path.glob("*.json"), *path.glob("*.jsonl")]) if inside else [path]
    return files


def read_metrics(path: Path) -> dict[str, Any]:
    """The last value of each name in a metrics.jsonl, as it was recorded.

    Raises:
        WanlabError: a line before the last one is torn.
    """
    return {entry["name"]: entry["value"] for _, entry in _json_lines(path)}


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and value. A torn last line is skipped.

    Raises:
        WanlabError: a line before the last one is torn.
    """
    lines = path.read_text("utf-8", "replace").split("\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise WanlabError(f"cannot read {path}, line {number}: not JSON") from None
        yield number, value


def scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, words and truth values among recorded values, entries of a dict as `<name>.<key>`; "inf", "-inf" and "nan"
    are numbers again."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": _scalar(item) for key, item in value.items() if _is_scalar(item)}
        elif _is_scalar(value):
            flat[name] = _scalar(value)
    return flat


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _scalar(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in ("inf", "-inf", "nan") else value


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
    """Whether two values are divided (a time, a size) or subtracted (a percentage, decibels, LPIPS)."""
    return not _SUBTRACTED.search(_last(column))


def is_time(column: str) -> bool:
    """Whether the samples of a result are samples of this figure."""
    return _last(column) in TIMED


def known(value: Any) -> bool:
    """Whether it is a number other than NaN; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def number(value: Any) -> float:
    """A value as a number, NaN where it is none."""
    return float(value) if known(value) else math.nan


def shown(value: Any) -> str:
    """A parameter's value as it is typed."""
    if isinstance(value, list | tuple):
        return ",".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def resolve(name: str, columns: Iterable[str]) -> str:
    """The column that a name means: itself, or the only one that ends in it (`speedup` of `gain.speedup`).

    Raises:
        WanlabError: none or several.
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

FAILURE_COLUMNS = ("configuration", "state", "reason", "repeat", "run_id", "folder")


@dataclass(frozen=True, eq=False)
class MeasuredConfiguration:
    """What was measured with one set of parameters on one machine.

    Attributes:
        label: its varied parameters, `"engine=eager, plan=default"`.
        name: of the notebook. parameters: all of them.
        results: recorded numbers and words by name; of repeats the median, of words all that differ.
        samples: of all repeats together; None where none were recorded.
        noise_percent: A/A noise, or how far repeats are apart where that is more; None where neither is known.
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
    def repeats(self) -> int:
        return len(self.runs)

    @property
    def folder(self) -> Path:
        """Of the first repeat."""
        return self.runs[0].folder

    def clip(self, name: str = "video") -> Path | None:
        """A clip that the run saved, `"video"`, `"original"` or `"truth"`; None where there is none."""
        path = self.folder / "artifacts" / f"{name}.mp4"
        return path if path.is_file() else None


@dataclass(frozen=True, eq=False)
class MeasuredConfigurations:
    """What is below some folders.

    Attributes:
        rows: finished configurations, in the order of their sweep, else oldest first.
        axes: parameters that vary between the runs.
        failures: runs that did not finish: configuration, state, reason, repeat, run_id, folder.
        sweep: sweep.json of the only or first folder that has one, else empty.
        where: the folders, for messages.
    """

    rows: tuple[MeasuredConfiguration, ...]
    axes: tuple[str, ...]
    failures: pd.DataFrame
    sweep: dict[str, Any] = field(default_factory=dict)
    where: str = ""

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the recorded numbers, most recorded first."""
        counts: dict[str, int] = {}
        for row in self.rows:
            for name, value in row.results.items():
                counts[name] = counts.get(name, 0) + known(value)
        most = [name for name, count in counts.items() if count]
        return tuple(sorted(most, key=lambda name: -counts[name]))


def configurations(runs: Any) -> MeasuredConfigurations:
    """Runs below folders as configurations.

    Below a folder with a sweep.json only the runs that it lists count; earlier ones, of other code, may lie beside them.

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
        if own and own is not sweep:  # several sweeps: none of them says what all are
            axes = [*sweep.get("axes", ()), *own.get("axes", ())]
            sweep = {"axes": axes, "baseline": sweep.get("baseline")}
    return pooled(list(records.values()), sweep, ", ".join(map(str, paths)))


def read_sweep(folder: Path) -> dict[str, Any]:
    """sweep.json of a folder; empty where there is none.

    Raises:
        WanlabError: it cannot be read.
    """
    file = folder / "sweep.json"
    sweep = read_json(file) if file.is_file() else {}
    if not isinstance(sweep, dict):
        raise WanlabError(f"cannot read {file}: not a JSON object")
    return sweep


def pooled(records: Sequence[RunRecord], sweep: Mapping[str, Any], where: str) -> MeasuredConfigurations:
    """Runs as configurations, those of a sweep and those that it lists and that never started.

    Raises:
        WanlabError: no run at all.
    """
    listed = {str(run.get("run_id")): run for run in sweep.get("runs") or () if isinstance(run, Mapping)}
    if not records and not listed:
        raise WanlabError(f"no runs in {where}; `wanlab run NOTEBOOK` or `wanlab sweep GRID` makes some")
    axes = varied_parameters(records, sweep)
    several = len({run.row["name"] for run in records if run.state == "finished"}) > 1

    def label(run: RunRecord) -> str:
        parts = [f"{axis}={shown(run.parameters[axis])}" for axis in axes if axis in run.parameters]
        return ", ".join([str(run.row["name"])] * (several or not parts) + parts)

    groups: dict[str, list[RunRecord]] = {}
    failures = []
    for run in records:
        if run.state == "finished":
            groups.setdefault(_identity(run), []).append(run)
        else:
            name = str(listed.get(str(run.row["run_id"]), {}).get("label") or label(run))
            reason, repeat = str(run.row.get("reason") or ""), run.record.get("repeat", 1)
            failures.append((name, run.state, reason, repeat, str(run.row["run_id"]), run.row["folder"]))
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
    """Parameters that vary between runs; those that a sweep names as axes come first, and stay even where they do not."""
    seen: dict[str, set[str]] = {}
    for run in records:
        for name, value in run.parameters.items():
            seen.setdefault(name, set()).add(value if isinstance(value, str) else json.dumps(plain(value)))
    named = map(str, (sweep or {}).get("axes") or ())
    first = [axis for axis in dict.fromkeys(named) if axis in seen]
    return [*first, *(name for name, values in seen.items() if len(values) > 1 and name not in first)]


def _identity(run: RunRecord) -> str:
    """Equal for runs that are repeats of one another: same notebook, code, parameters and machine."""
    source = run.record.get("wanlab_source")
    return json.dumps(plain([run.row["name"], source, run.parameters, repr(run.machine)]), sort_keys=True)


def _pooled(label: str, group: Sequence[RunRecord]) -> MeasuredConfiguration:
    first = group[0]
    each = [run.figures for run in group]
    values = {name: _middle([v[name] for v in each if name in v]) for v in reversed(each) for name in v}
    results = [run.result for run in group if run.result]
    taken = tuple(sample for result in results for sample in result.samples_ms)
    samples = Samples(label, taken, results[0].device) if taken else None
    if samples is not None:
        values |= {name: samples.median for name in (TIMED[0], TIMED[2]) if name in values}
    noise = _noise_percent(each)
    return MeasuredConfiguration(
        label, str(first.row["name"]), dict(first.parameters), values, samples, noise, tuple(group)
    )


def _middle(values: Sequence[Any]) -> Any:
    """One value for those of several repeats."""
    if len(values) == 1 or all(value == values[0] for value in values):
        return values[0]
    if all(known(value) for value in values):
        ordered = sorted(values)
        half = len(ordered) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _noise_percent(each: Sequence[Mapping[str, Any]]) -> float | None:
    """A/A noise of one run; of several at least how far their times are apart, which no control within a run shows."""
    controls = sorted(values["noise_percent"] for values in each if known(values.get("noise_percent")))
    times = [
        value
        for values in each
        for name in (TIMED[0], TIMED[2])
        if known(value := values.get(name)) and value > 0
    ]
    noise = controls[len(controls) // 2] if controls else None
    if len(times) < 2:
        return noise
    return max(noise or 0.0, 100 * (max(times) / min(times) - 1))
