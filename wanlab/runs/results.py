"""All runs below a folder as one tidy table, and as configurations: same work, pooled repeats."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from wanlab import models
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.files import plain, read_json
from wanlab.core.paths import default_outputs, locate
from wanlab.measure.timing import Samples
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


SUMMARY = "summary"
SHOWN = (
    "time_per_video_ms",
    "peak_memory_gib",
    "load_ms",
    "weights_gib",
    "divergence_lpips",
    "quality_loss_percent",
)
"""Figures of a configuration's `summary` that are shown when nobody says which."""

MOST_SHOWN = 8
TIMED = ("time_per_video_ms", "time_per_frame_ms")
"""Figures that the recorded samples are samples of."""

_MORE_IS_BETTER = re.compile(r"(psnr|ssim|throughput|speedup|fps|per_s$|cosine|tflops|_db$)")
_SUBTRACTED = re.compile(r"(percent|lpips|psnr|ssim|_db$|cosine|flicker)")


def better(column: str) -> str:
    """`"max"` where more of a figure is better (a throughput, PSNR), else `"min"`."""
    return "max" if _MORE_IS_BETTER.search(_last(column)) else "min"


def is_ratio(column: str) -> bool:
    """Whether two values are divided (a time, a size) or subtracted (a percentage, decibels, LPIPS)."""
    return not _SUBTRACTED.search(_last(column))


def ratio(column: str, value: float, baseline: float) -> float:
    """How many times better than the baseline, above 1 is better; NaN where there is nothing to divide."""
    top, bottom = (value, baseline) if better(column) == "max" else (baseline, value)
    if not (known(top) and known(bottom)) or bottom == 0 or top == 0:
        return math.nan
    return top / bottom


def known(value: Any) -> bool:
    """Whether it is a number other than NaN; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def flat(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded scalars under the names that a person would ask for: entries of `summary` have no prefix."""
    found = scalars(metrics.items())
    return {name.removeprefix(f"{SUMMARY}."): value for name, value in found.items()}


def resolve(name: str, columns: Iterable[str]) -> str:
    """The column that a name means: itself, or the only one that ends in it (`speedup` of `gain.speedup`).

    Raises:
        WanlabError: none or several.
    """
    columns = list(dict.fromkeys(columns))
    if name in columns:
        return name
    short = name.removeprefix("m.").removeprefix(f"{SUMMARY}.")
    if short in columns:
        return short
    ends = [column for column in columns if column.endswith(f".{short}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise WanlabError(f"{name!r} could be {', '.join(ends)}; give one of them")
    near = did_you_mean(name, [*columns, *(column.rpartition(".")[2] for column in columns)])
    known_names = (
        f"; there is {', '.join(columns[:12])}{' ...' if len(columns) > 12 else ''}" if columns else ""
    )
    raise WanlabError(f"no recorded number {name!r}{near}{'' if near else known_names}")


def _last(column: str) -> str:
    return str(column).rpartition(".")[2].lower()


def middle(values: Sequence[Any]) -> Any:
    """One value for those of several repeats."""
    if len(values) == 1 or all(value == values[0] for value in values):
        return values[0]
    if all(known(value) for value in values):
        ordered = sorted(values)
        half = len(ordered) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return ", ".join(dict.fromkeys(str(value) for value in values))


def pooled_samples(label: str, group: Sequence[RunRecord]) -> Samples | None:
    """All repeats' samples as one timing; what cannot be read as samples is none."""
    values: list[float] = []
    device = ""
    for run in group:
        found = run.metrics.get("samples")
        if isinstance(found, Mapping) and isinstance(found.get("values_ms"), list):
            values += found["values_ms"]
            device = device or str(found.get("device") or "")
    try:
        return Samples(label, tuple(values), device) if values else None
    except (WanlabError, TypeError, ValueError):
        return None


def noise_percent(each: Iterable[Mapping[str, Any]]) -> float | None:
    """A/A noise of one run; of several at least how far their times are apart, which no control within a run shows."""
    each = list(each)
    controls = [v["noise_percent"] for v in each if known(v.get("noise_percent"))]
    times = [v[TIMED[0]] for v in each if known(v.get(TIMED[0])) and v[TIMED[0]] > 0]
    noise = sorted(controls)[len(controls) // 2] if controls else None
    if len(times) < 2:
        return noise
    return max(noise or 0.0, 100 * (max(times) / min(times) - 1))


WORK = ("model", "weights", "height", "width", "frames", "steps", "guided", "seed")
ON_GPU = ("gpu", "sm_clock_max_mhz", "power_limit_w")
ON_CPU = ("cpu", "threads")
MEANT = {
    "clocks": ("sm_clock_max_mhz", "power_limit_w"),
    "machine": ("gpu", "sm_clock_max_mhz", "power_limit_w", "cpu", "threads"),
    "guidance_scale": ("guided",),
    "size": ("height", "width"),
    "resolution": ("height", "width"),
}
"""Words for several fields, or for what a field comes from."""


def work_of(metrics: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What was done, resolved: the `work` record where there is one, else parameters and the model's defaults.

    Fields that neither knows are None.
    """
    recorded = metrics.get("work")
    recorded = recorded if isinstance(recorded, Mapping) else {}
    if all(name in recorded for name in WORK):
        return {name: recorded[name] for name in WORK}
    told = {name: value for name, value in parameters.items() if value is not None}
    known = _defaults(str(told["model"])) | told if "model" in told else told
    guidance = known.get("guidance_scale")
    known = {"guided": None if not isinstance(guidance, int | float) else guidance > 1} | known
    return {name: recorded[name] if name in recorded else known.get(name) for name in WORK}


def machine_of(environment: Mapping[str, Any], device: str = "") -> dict[str, Any]:
    """What it ran on: GPU with its clock and power limits, or processor and threads.

    Args:
        environment: of run.json. device: that the samples were taken on; a machine with a GPU may have used its CPU.
    """
    gpu = environment.get("gpu")
    if gpu and not str(device).startswith("cpu"):
        facts = gpu if isinstance(gpu, Mapping) else {"name": gpu}
        return {"gpu": facts.get("name")} | {name: facts.get(name) for name in ON_GPU[1:]}
    return {"gpu": None} | {name: environment.get(name) for name in ON_CPU}


def differences(
    work: Mapping[str, Any], baseline: Mapping[str, Any], allow: Iterable[str] = ()
) -> list[tuple[str, Any, Any]]:
    """Fields in which something differs from the baseline: field, its value, the baseline's.

    Args:
        work, baseline: of `work_of` and `machine_of` together.
        allow: fields that may differ.

    Raises:
        WanlabError: an unknown field in `allow`.
    """
    allowed = fields(allow)
    names = [name for name in (*WORK, *ON_GPU, *ON_CPU) if name in work or name in baseline]
    if work.get("gpu") != baseline.get("gpu"):  # clocks and threads of different machines say nothing more
        names = [name for name in names if name not in (*ON_GPU[1:], *ON_CPU)]
    found = [(name, work.get(name), baseline.get(name)) for name in names if name not in allowed]
    return [(name, mine, theirs) for name, mine, theirs in found if mine != theirs]


def fields(allow: Iterable[str]) -> set[str]:
    """Fields that words of `allow` mean.

    Raises:
        WanlabError: an unknown word.
    """
    known = (*WORK, *ON_GPU, *ON_CPU)
    found: set[str] = set()
    for word in [allow] if isinstance(allow, str) else allow:
        if word not in known and word not in MEANT:
            raise WanlabError(
                f"nothing is refused for {word!r}{did_you_mean(word, (*known, *MEANT))}; allow takes"
                f" {', '.join((*known, *MEANT))}"
            )
        found |= set(MEANT.get(word, (word,)))
    return found


@functools.cache
def _defaults(model: str) -> dict[str, Any]:
    try:
        defaults = models.get(model).defaults if model in models.names() else None
    except WanlabError:
        return {}
    names = ("height", "width", "frames", "steps", "guidance_scale")
    return {name: getattr(defaults, name) for name in names} if defaults else {}


FAILURE_COLUMNS = ("configuration", "state", "reason", "repeat", "run_id", "folder")


@dataclass(frozen=True, eq=False)
class Configuration:
    """What was measured with one set of parameters on one machine.

    Attributes:
        label: its varied parameters, `"engine=eager, plan=default"`.
        name: of the notebook. parameters: all of them.
        results: recorded numbers and words by name; of repeats the median, of words all that differ.
        samples: of all repeats together; None where none were recorded.
        noise_percent: A/A noise, or how far repeats are apart where that is more; None where neither is known.
        work, machine: what must be equal for two configurations to be compared; see `same_work`.
        runs: the run of every repeat.
    """

    label: str
    name: str
    parameters: dict[str, Any]
    results: dict[str, Any]
    samples: Samples | None
    noise_percent: float | None
    work: dict[str, Any]
    machine: dict[str, Any]
    runs: tuple[RunRecord, ...]

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
class Configurations:
    """What is below some folders.

    Attributes:
        rows: finished configurations, in the order of their sweep, else oldest first.
        axes: parameters that vary between the runs.
        failures: runs that did not finish: configuration, state, reason, repeat, run_id, folder.
        sweep: sweep.json of the only or first folder that has one, else empty.
        where: the folders, for messages.
    """

    rows: tuple[Configuration, ...]
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

    def frame(self) -> pd.DataFrame:
        """One row per configuration: configuration, the axes, repeats, samples, noise_percent, then all results."""
        names = dict.fromkeys(name for row in self.rows for name in row.results if name not in self.axes)
        return pd.DataFrame(
            {
                "configuration": [row.label for row in self.rows],
                **{axis: [row.parameters.get(axis) for row in self.rows] for axis in self.axes},
                "repeats": [row.repeats for row in self.rows],
                "samples": [row.samples.n if row.samples else 0 for row in self.rows],
                **{name: [row.results.get(name) for row in self.rows] for name in names},
                "noise_percent": [row.noise_percent for row in self.rows],
            }
        )


def configurations(runs: Any) -> Configurations:
    """Runs below folders as configurations.

    Below a folder with a sweep.json only the runs that it lists count; earlier ones, of other code, may lie beside them.

    Args:
        runs: a folder of runs, several, a table of `load_runs`, or `Configurations`.

    Raises:
        WanlabError: no such folder, or no run in any.
    """
    if isinstance(runs, Configurations):
        return runs
    found, sweep, where = _read(runs)
    listed = {str(run.get("run_id")): run for run in sweep.get("runs") or () if isinstance(run, Mapping)}
    if not found and not listed:
        raise WanlabError(f"no runs in {where}; `wanlab run NOTEBOOK` or `wanlab sweep GRID` makes some")
    axes = _axes(found, [str(axis) for axis in sweep.get("axes") or ()])
    several = len({run.row["name"] for run in found if run.row["state"] == "finished"}) > 1

    def label(run: RunRecord) -> str:
        parameters = run.record.get("parameters") or {}
        parts = [f"{axis}={shown(parameters[axis])}" for axis in axes if axis in parameters]
        name = str(run.row["name"])
        return ", ".join([name] * (several or not parts) + parts)

    groups: dict[str, list[RunRecord]] = {}
    failures = []
    for run in found:
        if run.row["state"] == "finished":
            groups.setdefault(_identity(run), []).append(run)
        else:
            known_label = listed.get(str(run.row["run_id"]), {}).get("label")
            failures.append(_failure(str(known_label or label(run)), run))
    there = {str(run.row["run_id"]) for run in found}
    for run_id, run in listed.items():
        if run_id not in there:
            state = str(run.get("state") or "pending")
            said = "has not started" if state == "pending" else "its folder is not there"
            failures.append((str(run.get("label")), state, said, run.get("repeat", 1), run_id, ""))
    rows = [_pooled(label(group[0]), group) for group in groups.values()]
    return Configurations(
        tuple(_told_apart(rows)),
        tuple(axes),
        pd.DataFrame(failures, columns=list(FAILURE_COLUMNS)),
        sweep,
        where,
    )


def shown(value: Any) -> str:
    """A parameter's value as it is typed."""
    if isinstance(value, list | tuple):
        return ",".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _read(runs: Any) -> tuple[list[RunRecord], dict[str, Any], str]:
    """Runs, each once, the first sweep's record, and where they are."""
    if hasattr(runs, "columns"):  # a table of load_runs
        folders = list(dict.fromkeys(map(str, runs["folder"]))) if len(runs) else []
        return [read_run(Path(folder)) for folder in folders], {}, "the table"
    paths = [runs] if isinstance(runs, str | os.PathLike) else list(runs)
    found: dict[Path, RunRecord] = {}
    sweep: dict[str, Any] = {}
    for path in map(Path, paths):
        own = _sweep(path)
        order = {str(run.get("run_id")): i for i, run in enumerate(own.get("runs") or ())}
        below = list(read_runs(path))
        if order:
            below = [run for run in below if run.folder.name in order]
            below.sort(key=lambda run: order[run.folder.name])
        else:
            below.sort(key=lambda run: str(run.row.get("started") or ""))
        found |= {run.folder.resolve(): run for run in below}
        sweep = sweep or own
        if own and own is not sweep:  # several sweeps: none of them says what all are
            sweep = {
                "axes": [*sweep.get("axes", ()), *own.get("axes", ())],
                "baseline": sweep.get("baseline"),
            }
    return list(found.values()), sweep, ", ".join(map(str, paths))


def _sweep(path: Path) -> dict[str, Any]:
    file = path / "sweep.json"
    found = read_json(file) if file.is_file() else {}
    if not isinstance(found, dict):
        raise WanlabError(f"cannot read {file}: not a JSON object")
    return found


def _axes(found: Sequence[RunRecord], told: Sequence[str]) -> list[str]:
    """Parameters that vary; those that a sweep names come first, and stay even where they do not vary."""
    seen: dict[str, set[str]] = {}
    for run in found:
        for name, value in (run.record.get("parameters") or {}).items():
            seen.setdefault(name, set()).add(value if isinstance(value, str) else json.dumps(value))
    told = [axis for axis in dict.fromkeys(told) if axis in seen]
    return [*told, *(name for name, values in seen.items() if len(values) > 1 and name not in told)]


def _identity(run: RunRecord) -> str:
    """Equal for runs that are repeats of one another: same notebook, code, parameters and machine."""
    record = run.record
    facts = [run.row["name"], record.get("wanlab_source"), record.get("parameters") or {}, _machine(run)]
    return json.dumps(plain(facts), sort_keys=True)


def _machine(run: RunRecord) -> dict[str, Any]:
    samples = run.metrics.get("samples")
    device = samples.get("device", "") if isinstance(samples, Mapping) else ""
    device = device or (run.record.get("parameters") or {}).get("device", "")
    return machine_of(run.record.get("environment") or {}, device)


def _pooled(label: str, group: Sequence[RunRecord]) -> Configuration:
    first = group[0]
    parameters = dict(first.record.get("parameters") or {})
    each = [flat(run.metrics) for run in group]
    values = {name: middle([v[name] for v in each if name in v]) for v in reversed(each) for name in v}
    samples = pooled_samples(label, group)
    if samples is not None and TIMED[0] in values:
        values[TIMED[0]] = samples.median
    return Configuration(
        label=label,
        name=str(first.row["name"]),
        parameters=parameters,
        results=values,
        samples=samples,
        noise_percent=noise_percent(each),
        work=work_of(first.metrics, parameters),
        machine=_machine(first),
        runs=tuple(group),
    )


def _told_apart(rows: Sequence[Configuration]) -> Iterable[Configuration]:
    """Rows of one label, as of two machines, get their run's id."""
    labels = [row.label for row in rows]
    for row in rows:
        twice = labels.count(row.label) > 1
        yield replace(row, label=f"{row.label} ({row.runs[0].row['run_id']})") if twice else row


def _failure(label: str, run: RunRecord) -> tuple:
    row = run.row
    reason = str(row.get("reason") or "")
    repeat = run.record.get("repeat", 1)
    return (label, str(row["state"]), reason, repeat, str(row["run_id"]), row["folder"])


def number(value: Any) -> float:
    """A value as a number, NaN where it is none."""
    return float(value) if known(value) else math.nan
