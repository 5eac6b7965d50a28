"""Runs as configurations: one row each, repeats pooled, the others with how they ended."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.runs.comparison.metrics import TIMED, flat, known
from wanlab.runs.comparison.pooling import middle, noise_percent, pooled_samples
from wanlab.runs.comparison.same_work import machine_of, work_of
from wanlab.runs.files import plain, read_json
from wanlab.runs.store import RunRecord, read_run, read_runs

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.measure import Samples

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
        import pandas as pd

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
    import pandas as pd

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
    from dataclasses import replace

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
