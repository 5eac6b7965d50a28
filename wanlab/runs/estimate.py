"""What a run will take, before it starts: minutes and memory, and how they are known.

The sources, in this order, each named in the answer:

1. finished runs of the same notebook on this machine with the same work: their own time and memory;
2. such runs with another number of steps, iterations, ... : their time, scaled as far as that is certain;
3. such runs of the same model at another size: their time, scaled by the operations that one video counts;
4. operations of one video, at the fastest rate that any run on this machine has measured: a lower bound.

Otherwise nothing is known, and that is said. Part of a run does not scale: imports, loading, drawing. So one earlier run
bounds another: with r times the work it takes between once and r times as long.
"""

from __future__ import annotations

import functools
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlab import models
from wanlab.core.errors import WanlabError
from wanlab.core.files import plain
from wanlab.core.paths import default_outputs
from wanlab.measure.environment import hardware
from wanlab.runs.folder import RunFolder
from wanlab.runs.prepare import Prepared, code_cells
from wanlab.runs.result import Result, work_of_parameters
from wanlab.runs.results import read_results, run_folders

COUNTS = ("steps", "iterations", "repeats", "rounds", "cases", "warmup")
"""Parameters that say how often a notebook does the same: its time is a fixed part and a part for each."""

OF_VIDEO = ("height", "width", "frames", "steps", "guidance_scale")
"""Parameters that change the operations of a video, and nothing else that a run does."""

LATEST = 5
"""Runs of the same work that count, the newest: the machine of last year may be slower."""

VIDEOS = re.compile(r"\.generate\(|\bbaseline\(|\bcompare_models\(|\bheldout\.requests\(")
"""Calls by which the cells of a notebook make at least one video."""


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a run before it starts.

    Attributes:
        low_s, high_s: bounds of its time, equal where one figure is expected; None where there is no bound.
        low_gib, high_gib: bounds of the memory that it and its processes hold at one time.
        source: how they are known.
    """

    low_s: float | None = None
    high_s: float | None = None
    low_gib: float | None = None
    high_gib: float | None = None
    source: str = "no run of it on this machine yet"

    @property
    def known(self) -> bool:
        """Whether something is known of its time."""
        return self.low_s is not None or self.high_s is not None

    @property
    def text(self) -> str:
        """`"about 1.4 min and about 1.9 GiB (3 earlier runs ...)"`, or `"not known: no run of it on this machine yet"`."""
        if not self.known or self.high_s == 0:
            return f"{'nothing' if self.known else 'not known'}: {self.source}"
        low, high = (None if value is None else value / 60 for value in (self.low_s, self.high_s))
        memory = bounds(self.low_gib, self.high_gib, "GiB")
        return f"{bounds(low, high, 'min')}{f' and {memory}' if memory else ''} ({self.source})"

    @property
    def sentence(self) -> str:
        """The text for a line of its own: `"expected to take about 1.4 min ..."`, or what is not known."""
        if not self.known:
            return f"how long it takes is not known: {self.source}"
        return f"nothing to do: {self.source}" if self.high_s == 0 else f"expected to take {self.text}"


def bounds(low: float | None, high: float | None, unit: str) -> str:
    """`"about 2.0 min"`, `"1.0 to 3.0 min"`, `"at least 1.0 min"`, `"at most 3.0 min"`; empty where nothing is known."""
    if low is None or high is None:
        word, value = ("at least", low) if high is None else ("at most", high)
        return "" if value is None else f"{word} {_number(value)} {unit}"
    if _number(low) == _number(high):
        return f"about {_number(high)} {unit}"
    return f"{_number(low)} to {_number(high)} {unit}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"


@dataclass(frozen=True, eq=False)
class Earlier:
    """A finished run of this machine.

    Attributes:
        notebook: its file name without `.ipynb`.
        parameters: all of them.
        identity: digests of weights and of the files that parameters name.
        peak_gib: largest memory of it and its processes, where it was recorded.
        resolved: the parameters with the defaults of the model.
    """

    folder: Path
    notebook: str
    parameters: dict[str, Any]
    identity: dict[str, Any]
    started: str
    seconds: float
    peak_gib: float | None

    @functools.cached_property
    def resolved(self) -> dict[str, Any]:
        return _resolved(self.parameters)


class EarlierRuns:
    """Finished runs of this machine below some folders, read once.

    Args:
        folders: folders of runs; the project's `outputs/` is always one of them.
    """

    def __init__(self, *folders: Path | None):
        roots = {Path(each).resolve() for each in (default_outputs(), *folders) if each is not None}
        here = hardware()
        found = {run.folder: run for root in sorted(roots) if root.is_dir() for run in _read(root, here)}
        self.runs = sorted(found.values(), key=lambda run: run.started)

    def estimate(self, ready: Prepared, *, force: bool = False, counted: bool = True) -> Estimate:
        """What a prepared run will take; see this module. It reads what earlier runs left, and starts nothing.

        Args:
            force: whether it runs again although it has finished before.
            counted: whether operations may be counted, which takes some seconds of a processor.
        """
        if not force and ready.finished():
            return Estimate(0.0, 0.0, source="it has finished before; --force runs it again")
        name, values = ready.path.stem, plain(ready.values)
        identity = _identity({"weights": ready.weights, "inputs": ready.inputs})
        same = [run for run in self.runs if run.notebook == name]
        of_files = [run for run in same if _agree(run.identity, identity)]
        resolved = _resolved(values)
        found = _of_same_work(of_files, resolved) or _of_other_count(of_files, resolved)
        if found is None and not counted:
            return Estimate(
                source="no run of this work on this machine yet; --estimate counts its operations"
            )
        found = found or _of_other_size(of_files, resolved)
        if found is None and VIDEOS.search("\n".join(code_cells(ready.notebook))):
            found = _of_one_video(self.runs, resolved)
        return found or Estimate()


def _read(root: Path, here: Mapping[str, Any]) -> Iterator[Earlier]:
    for path in run_folders(root):
        folder = RunFolder(path)
        try:
            record, status = folder.record(), folder.written_status()
        except WanlabError:
            continue
        environment = record.get("environment") or {}
        notebook, seconds = record.get("notebook"), status.get("seconds")
        # A run in JupyterLab has no exit status: its time includes that of its reader.
        whole = status.get("state") == "finished" and status.get("exit") == 0
        if not (whole and notebook and seconds and same_machine(environment, here)):
            continue
        yield Earlier(
            path,
            Path(notebook).stem,
            record.get("parameters") or {},
            _identity(record),
            status.get("started") or "",
            float(seconds),
            status.get("peak_memory_gib"),
        )


def same_machine(environment: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether a recorded environment is of a machine with this one's GPU, processor, cores and memory."""
    gpu = environment.get("gpu")
    name = gpu.get("name") if isinstance(gpu, Mapping) else gpu
    ram, own = environment.get("ram_gib") or 0.0, here["ram_gib"]
    same = all(environment.get(key) == here[key] for key in ("cpu", "cores", "cores_available"))
    return same and name == here["gpu"] and math.isclose(ram, own, rel_tol=0.005)


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"weights": record.get("weights"), **(record.get("inputs") or {})}


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs read the same files, as far as both are known."""
    return all(None in (one.get(key), other.get(key)) or one[key] == other[key] for key in {*one, *other})


def _resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with the defaults of the model in place of None, so that `steps=None` is its own number of steps."""
    filled = dict(values)
    if not isinstance(values.get("model"), str):
        return filled
    with_defaults = _work(values["model"], tuple(sorted((n, values.get(n)) for n in OF_VIDEO if n in values)))
    for name, value in with_defaults.items():
        if name in filled and filled[name] is None:
            filled[name] = value
    return filled


@functools.cache
def _work(model: str, video: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    try:
        work = work_of_parameters(
            {"model": model, **{name: v for name, v in video if not isinstance(v, list)}}
        )
    except WanlabError:
        return {}
    return {name: getattr(work, name) for name in ("height", "width", "frames", "steps")}


def _others(run: Earlier, values: Mapping[str, Any]) -> set[str]:
    """Names of the parameters that a run has otherwise."""
    names = {*run.resolved, *values}
    return {name for name in names if run.resolved.get(name) != values.get(name)}


def _peaks(runs: Iterable[Earlier]) -> list[float]:
    return [run.peak_gib for run in runs if run.peak_gib]


def _of_same_work(runs: list[Earlier], values: Mapping[str, Any]) -> Estimate | None:
    same = [run for run in runs if not _others(run, values)][-LATEST:]
    if not same:
        return None
    seconds = statistics.median(run.seconds for run in same)
    peak = max(_peaks(same), default=None)
    count = "1 earlier run" if len(same) == 1 else f"{len(same)} earlier runs"
    return Estimate(seconds, seconds, peak, peak, f"{count} of it on this machine with the same parameters")


def _of_other_count(runs: list[Earlier], values: Mapping[str, Any]) -> Estimate | None:
    """From runs of which one count differs: between two on a line, from one within bounds."""
    for name in COUNTS:
        asked = values.get(name)
        found = [run for run in runs if _others(run, values) == {name} and _count(run.resolved[name])]
        if not found or not _count(asked):
            continue
        nearest = min(found, key=lambda run: abs(math.log(run.resolved[name] / asked)))
        counts = {run.resolved[name] for run in found}
        peak = max(_peaks(found), default=None)
        at = f"with {name}={nearest.resolved[name]:g}"
        if len(counts) > 1:
            times = {n: statistics.median(r.seconds for r in found if r.resolved[name] == n) for n in counts}
            slope, fixed = statistics.linear_regression(list(times), list(times.values()))[:2]
            if slope > 0 and fixed >= 0:
                line = fixed + slope * asked
                listed = ", ".join(f"{n:g}" for n in sorted(counts))
                source = f"on the line through earlier runs of it on this machine with {name}={listed}"
                return Estimate(line, line, peak, peak, source)
        low, high = sorted((nearest.seconds, nearest.seconds * asked / nearest.resolved[name]))
        return Estimate(low, high, peak, peak, f"scaled from an earlier run of it on this machine {at}")
    return None


def _count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _of_other_size(runs: list[Earlier], values: Mapping[str, Any]) -> Estimate | None:
    """From the run whose video has the nearest number of operations, where nothing but the video differs."""
    near = [run for run in runs if _others(run, values) <= set(OF_VIDEO)]
    asked = video_tflop(values) if near else None
    ratios = {run: asked / own for run in near if asked and (own := video_tflop(run.resolved))}
    if not ratios:
        return None
    run = min(ratios, key=lambda each: abs(math.log(ratios[each])))
    low, high = sorted((run.seconds, run.seconds * ratios[run]))
    more = ratios[run] >= 1
    peak = run.peak_gib
    source = (
        f"one video counts {ratios[run]:.2g} times the operations of an earlier run of it on this machine"
    )
    return Estimate(low, high, peak if more else None, None if more else peak, source)


def _of_one_video(runs: list[Earlier], values: Mapping[str, Any]) -> Estimate | None:
    """At least one video, at the highest rate that a run of this machine has measured."""
    on_cpu = values.get("device") == "cpu" or hardware()["gpu"] is None
    rates = [(rate, run.notebook) for run in runs for rate in _rates(run.folder, on_cpu)]
    asked = video_tflop(values) if rates else None
    if not asked:
        return None
    rate, notebook = max(rates)
    source = (
        f"one video counts {asked:.3g} TFLOP, the best rate on this machine is {rate:.2g} TFLOP/s in {notebook};"
        " no run of this one yet"
    )
    return Estimate(asked / rate, None, source=source)


@functools.cache
def _rates(folder: Path, on_cpu: bool) -> tuple[float, ...]:
    """TFLOP/s of the whole videos that a run timed on a device."""
    try:
        results = read_results(RunFolder(folder), True)
    except WanlabError:
        return ()
    rates = [_rate(result) for result in results if bool(result.machine and result.machine.gpu) != on_cpu]
    return tuple(rate for rate in rates if rate)


def _rate(result: Result) -> float | None:
    if result.work.component is not None or not result.samples_ms:
        return None
    work = {name: getattr(result.work, name) for name in ("model", "height", "width", "frames", "steps")}
    guidance = {None: None, True: 2.0, False: 1.0}[result.work.guided]
    counted = video_tflop(work | {"guidance_scale": guidance})
    return counted and counted / (statistics.median(result.samples_ms) / 1e3)


def video_tflop(values: Mapping[str, Any]) -> float | None:
    """Operations of one video in 10^12, from `models.facts`; None where they cannot be counted.

    The text encoder once a branch, each step one expert a branch (the mean where there are two), the rest once.

    Args:
        values: model, and height, width, frames, steps, guidance_scale; the model's own where None or not given.
    """
    model = values.get("model")
    asked = [values.get(name) for name in ("height", "width", "frames", "steps", "guidance_scale")]
    if not isinstance(model, str) or any(value is not None and not _count(value) for value in asked):
        return None
    height, width, frames, steps, guidance = asked
    try:
        spec = models.get(models.split_model(model)[0])
        counted = _counted(model, height, width, frames)
    except WanlabError:
        return None
    steps = spec.defaults.steps if steps is None else steps
    guidance = spec.defaults.guidance_scale if guidance is None else guidance
    branches = 2 if guidance > 1 else 1
    experts = [tflop for name, tflop in counted.items() if name.startswith("expert")]
    text = sum(tflop for name, tflop in counted.items() if name.startswith("text_encoder"))
    once = sum(counted.values()) - sum(experts) - text
    whole = branches * (text + steps * sum(experts) / max(len(experts), 1)) + once
    return whole if experts and math.isfinite(whole) and whole > 0 else None


@functools.cache
def _counted(model: str, height: Any, width: Any, frames: Any) -> dict[str, float]:
    """Component -> operations of one call in 10^12; counting takes seconds."""
    spec = models.get(models.split_model(model)[0])
    facts = models.facts(spec, height=height, width=width, frames=frames)
    return dict(zip(facts["component"], facts["total_tflop"], strict=True))


def total(estimates: list[Estimate], alone: list[bool], slots: int) -> str:
    """How long a whole sweep takes, in words; shared runs side by side on their slots, those alone one after the other.

    Args:
        estimates: of the runs that are to run. alone: whether each needs the machine for itself.
    """
    known = [(each, one) for each, one in zip(estimates, alone, strict=True) if each.known]
    if not estimates:
        return "nothing is to run"
    if not known:
        return f"how long is not known: {estimates[0].source}"

    def whole(which: str) -> float | None:
        values = [(getattr(each, which), one) for each, one in known]
        if any(value is None for value, _ in values):
            return None
        shared = [value for value, one in values if not one]
        side_by_side = max(sum(shared) / slots, max(shared, default=0.0))
        return (side_by_side + sum(value for value, one in values if one)) / 60

    low, high = whole("low_s"), whole("high_s")
    if low is None and high is None:
        return "how long is not known: some runs have only a lower bound, others only an upper one"
    text = bounds(low, high, "min")
    sources = sorted({each.source for each, _ in known})
    named = sources[0] if len(sources) == 1 else f"{len(sources)} kinds of estimate, see each run"
    rest = len(estimates) - len(known)
    left = f"; {rest} more run{'s' * (rest > 1)} of which nothing is known" if rest else ""
    return f"{text} for {len(known)} run{'s' * (len(known) > 1)} ({named}){left}"
