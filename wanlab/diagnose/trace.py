"""Reads a profile, a Chrome trace file or an exported report of Nsight Systems, as tables of events, stacks and launches."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wanlab.core.errors import WanlabError, first_line
from wanlab.core.paths import locate
from wanlab.diagnose.trace_events import (
    HOST_CATEGORIES,
    KERNEL_CATEGORIES,
    RUNTIME_CATEGORIES,
    STEP_PREFIX,
    Tables,
    tables,
)
from wanlab.diagnose.trace_file import Device, Generation, TraceFile, read_file
from wanlab.diagnose.trace_nsys import is_report, read_report
from wanlab.models.pipeline import BEGINS, ENDS

SUFFIX = ".pt.trace.json.gz"
"""File name pattern that TensorBoard's profiler plugin searches for in a folder."""
ENDINGS = (".json", ".json.gz", ".zip", ".sqlite")
_STEP = re.compile(rf"{STEP_PREFIX}\d{{1,9}}\Z")
_LAUNCH = re.compile("Launch|Enqueue|InvokeKernel")


@dataclass(frozen=True, eq=False)
class Trace:
    """The trace of one process.

    Attributes:
        events: one row per complete event, ordered by thread, start and falling end: `name` and `category` (pandas
            categories), `process` and `thread` (integer codes), `start_us` since the first event, `time_us`,
            `correlation` (links a kernel to the runtime call that launched it; 0 without one), `stream`
            (-1 on the host), `size_bytes` (of a copy or fill on the GPU), `inputs` (pandas category: JSON
            `[shapes, types, values]` of an operator's inputs, values only of convolutions, "" where not recorded).
        memory: one row per allocation or release, in order of time: `time_us` (as `start_us`), `size_bytes`
            (negative for a release), `allocated_bytes` and `reserved_bytes` after it (-1 where unknown), `device`
            ("cpu", "cuda:0"), `address`, `thread` and `process` (as in `events`). Empty if it was not recorded.
        path: path of the file.
        devices: GPUs that the file lists, one dictionary each.
        rank: rank in a distributed run, else None.
        generation: description by `capture`: model, engines, device, dtype, settings, wall_ms, weights_bytes (per part);
            empty for a trace from another program.
        notes: limits of the file, as sentences, with the cautions first.
        cautions: those notes without which a share or a sum would be read wrongly.
    """

    events: pd.DataFrame
    memory: pd.DataFrame
    path: Path
    devices: tuple[Device, ...] = ()
    rank: int | None = None
    generation: Generation = field(default_factory=Generation)
    notes: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()

    def of(self, *categories: str) -> pd.DataFrame:
        """The events of some categories."""
        return self.events[self.events["category"].isin(categories)]

    @cached_property
    def kernels(self) -> pd.DataFrame:
        """The events of the GPU: kernels, copies and fills."""
        return self.of(*KERNEL_CATEGORIES)

    @cached_property
    def host(self) -> pd.DataFrame:
        """The events of the host, renumbered."""
        return self.of(*HOST_CATEGORIES).reset_index(drop=True)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """The profiler's steps: step, start_us, time_us."""
        names = self.events["name"].cat.categories
        steps = self.of("user_annotation")
        steps = steps[steps["name"].isin([name for name in names if _STEP.match(name)])].sort_values(
            "start_us"
        )
        numbers = steps["name"].astype(str).str.removeprefix(STEP_PREFIX).astype(int)
        return steps.assign(step=numbers)[["step", "start_us", "time_us"]].reset_index(drop=True)

    @cached_property
    def window_us(self) -> tuple[float, float]:
        """Start and end of the recorded generation; in a trace from another program of the first and last event of the host
        or GPU (spans of the profiler itself begin before and end after the work)."""
        marks = [self.events["start_us"][(self.events["name"] == name).to_numpy()] for name in (BEGINS, ENDS)]
        if all(len(mark) == 1 for mark in marks) and marks[0].iloc[0] < marks[1].iloc[0]:
            return float(marks[0].iloc[0]), float(marks[1].iloc[0])
        work = self.of(*HOST_CATEGORIES, *KERNEL_CATEGORIES)
        return float(work["start_us"].min()), float((work["start_us"] + work["time_us"]).max())

    @property
    def wall_us(self) -> float:
        """Length of the window."""
        return self.window_us[1] - self.window_us[0]

    @property
    def has_gpu(self) -> bool:
        return not self.kernels.empty

    @property
    def device_name(self) -> str | None:
        """Name of the first GPU, if the file has one."""
        return self.devices[0].get("name") if self.devices else None

    @property
    def device_bytes(self) -> int | None:
        """Memory of the first GPU, if the file has one and says it."""
        return (self.devices[0].get("totalGlobalMem") or None) if self.devices else None

    @property
    def may_lack_gpu(self) -> bool:
        """Whether the file lists a GPU of the machine, has no event of it, and does not say that the model ran elsewhere."""
        return bool(self.devices) and not self.has_gpu and self.generation.get("device") != "cpu"

    def facts(self) -> pd.DataFrame:
        """Facts about the trace and its limits, one row each: fact, value.

        `steps` are denoising steps where the file says their number, else the profiler's steps.
        """
        steps = self.generation.get("settings", {}).get("steps")
        facts = {
            "file": self.path.name,
            "model": self.generation.get("model"),
            "size_bytes": self.path.stat().st_size,
            "events": len(self.events),
            "steps": len(self.steps) if steps is None else steps,
            "wall_ms": round(self.wall_us / 1e3, 3),
            "GPU": self.device_name,
            "gpu_memory_gib": round(self.device_bytes / 2**30, 1) if self.device_bytes else None,
            "kernels": len(self.kernels),
            "allocations": int((self.memory["size_bytes"] > 0).sum()),
            "rank": self.rank,
        }
        rows = [*facts.items(), *(("note", note) for note in self.notes)]
        return pd.DataFrame([(name, str(value)) for name, value in rows], columns=["fact", "value"])


def read_trace(path: str | os.PathLike) -> Trace:
    """Read a Chrome trace, `.json`, `.json.gz` or in a `.zip`, a report of Nsight Systems that was exported as `.sqlite`, or
    a folder with one trace per rank: its lowest rank is read.

    Events whose times cannot be and events of unknown categories are left out, and `Trace.cautions` counts them.

    Raises:
        WanlabError: no such file; a truncated or empty file; one that is not a profiler trace; one that has launches or
            unknown events of an accelerator but none of its work, of which a diagnosis would be false; a folder
            without traces or with several of one rank.
    """
    path = locate(path)
    return _of_folder(path) if path.is_dir() else _of_file(path)


def _of_folder(folder: Path) -> Trace:
    files = sorted(file for file in folder.iterdir() if file.name.lower().endswith(ENDINGS))
    if not files:
        raise WanlabError(f"no traces (.json, .json.gz, .sqlite) in {folder}")
    traces, left_out = [], []
    for file in files:
        try:
            traces.append(_of_file(file))
        except WanlabError as error:
            if len(files) == 1:
                raise
            left_out.append(f"{file.name} is left out: {first_line(error)}")
    if not traces:
        raise WanlabError(f"none of the {len(files)} files in {folder} is a trace; {left_out[0]}")
    first = min(traces, key=lambda trace: math.inf if trace.rank is None else trace.rank)
    if len(traces) > 1:
        ranks = [trace.rank for trace in traces]
        if None in ranks or len(set(ranks)) < len(ranks):
            names = ", ".join(trace.path.name for trace in traces[:5])
            raise WanlabError(
                f"{len(traces)} traces in {folder}, which are not one per rank; name one: {names}"
            )
        walls = ", ".join(
            f"rank {t.rank} {t.wall_us / 1e3:,.1f} ms" for t in sorted(traces, key=lambda t: t.rank)
        )
        left_out.append(f"rank {first.rank} of {len(traces)} is shown; wall clock of each: {walls}")
    return replace(first, notes=(*first.notes, *left_out))


def _of_file(path: Path) -> Trace:
    file = read_report(path) if is_report(path) else read_file(path)
    content = tables(file.events)
    _refuse(path, content)
    cautions = [*_left_out(content, file.odd_events)]
    trace = Trace(
        content.events,
        content.memory,
        path,
        devices=file.devices,
        rank=file.distributed.get("rank"),
        generation=file.generation,
    )
    if trace.wall_us <= 0:
        raise WanlabError(f"all events of {path} last 0 µs: there is no time to divide; capture it again")
    if trace.may_lack_gpu:
        name = trace.device_name or "a GPU"
        cautions.insert(
            0,
            f"these are times of the host alone: the file lists {name} but has no GPU events; if the model ran on it,"
            " capture it again with ProfilerActivity.CUDA",
        )
    return replace(trace, notes=(*cautions, *_notes(trace, content, file)), cautions=tuple(cautions))


def _refuse(path: Path, content: Tables) -> None:
    """Refuse a trace of which a diagnosis would be false: without known events, or without those of its accelerator."""
    events, unknown = content.events, content.unknown
    gpu = events["category"].isin(KERNEL_CATEGORIES).any()
    aside = "; ".join(["", *_left_out(content, 0)]) if content.set_aside else ""
    if len(unknown) and not gpu:
        named = ", ".join(_named(row) for row in unknown.head(4).itertuples())
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise WanlabError(
            f"{path} has events of unknown categories and none of a known accelerator: {named}{more}. Their time would be"
            " told as idle, so it is not diagnosed; give a trace of torch.profiler in which work on the device is of"
            f" category kernel, gpu_memcpy or gpu_memset{aside}"
        )
    if not events["category"].isin([*HOST_CATEGORIES, *KERNEL_CATEGORIES]).any():
        what = "no event with times that can be" if aside else "no complete events"
        raise WanlabError(f"{path} has {what}; was the profiler's active step ever reached?{aside}")
    launches = events["category"].isin(RUNTIME_CATEGORIES) & events["name"].astype(str).str.contains(_LAUNCH)
    if launches.any() and not gpu:
        raise WanlabError(
            f"{path} has launches of work on an accelerator ({int(launches.sum()):,}), but no event of that work. Its time"
            " would be told as idle, so it is not diagnosed; capture it again with ProfilerActivity.CUDA (or XPU), without"
            f" hardware counters{aside}"
        )


def _named(row: Any) -> str:
    time = f"{row.time_ms:,.0f}" if row.time_ms >= 100 else f"{row.time_ms:.3g}"
    return f"{row.category!r} ({row.events:,} event{'s' * (row.events != 1)}, {time} ms)"


def _left_out(content: Tables, odd_events: int) -> Iterable[str]:
    """Notes about events of the file that are not in the tables."""
    whole = len(content.events) + sum(content.set_aside.values())
    if content.set_aside:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in content.set_aside.items())
        yield f"left out of {whole:,} events, because such times cannot be: {counts}"
    if odd_events:
        yield f"left out, because a field is of another type: {odd_events:,} event{'s' * (odd_events != 1)}"
    if len(content.unknown):
        named = ", ".join(_named(row) for row in content.unknown.head(4).itertuples())
        yield f"left out, of unknown category: {named}; if that is work of the GPU, it was busier"


def _notes(trace: Trace, content: Tables, file: TraceFile) -> Iterable[str]:
    events, generation = trace.events, trace.generation
    steps, requested = generation.get("settings", {}).get("steps"), generation.get("asked_steps")
    if requested and steps != requested:
        yield f"{steps} of {requested} steps, as many as make a trace that can be opened"
    if file.trimmed:
        yield (
            f"trimmed: host events under {file.trimmed['shortest_us']:g} µs that launched nothing are own time of what is "
            f"around them, allocations under {file.trimmed['smallest_bytes'] / 2**20:g} MiB are left out"
        )
    yield from file.notes
    if content.legacy:
        yield "categories of an older Kineto: ranges are told from operators by their names"
    if not trace.has_gpu and not trace.may_lack_gpu:
        yield "no GPU events: captured on a CPU, or without ProfilerActivity.CUDA"
    elif trace.has_gpu and not (trace.kernels["correlation"] > 0).all():
        yield "some kernels have no correlation id; they are shown without the call that launched them"
    calls = events[events["category"].isin(RUNTIME_CATEGORIES) & (events["correlation"] > 0)]
    if trace.has_gpu and calls.groupby("correlation")["process"].nunique().gt(1).any():
        yield "several processes use the same correlation ids: a kernel is shown below the last call before it"
    if not events["category"].isin(HOST_CATEGORIES).any():
        yield "no host events: kernels cannot be placed under modules and operators"
    if events["name"].cat.categories.str.contains("GraphLaunch", regex=False).any():
        yield "CUDA graphs were launched: their kernels belong to the launch, not to single operators"
    if (world := file.distributed.get("world_size") or 1) > 1:
        yield f"one rank of {world}: waiting for the others is inside its communication kernels"


NOTHING = -1


def nest(events: pd.DataFrame) -> np.ndarray:
    """For every event the position of the event of its thread that encloses it, -1 for the outermost.

    Args:
        events: ordered as `Trace.events`: by thread, start and falling end.

    An event that ends after the event in which it starts (two clocks, rounded) still counts as inside it.
    """
    threads = events["thread"].to_numpy().tolist()
    starts = events["start_us"].to_numpy().tolist()
    ends = (events["start_us"] + events["time_us"]).to_numpy().tolist()
    parents = np.full(len(starts), NOTHING, dtype=np.int64)
    stack: list[int] = []
    current = None
    for i, (thread, start) in enumerate(zip(threads, starts, strict=True)):
        if thread != current:
            current = thread
            stack.clear()
        while stack and ends[stack[-1]] <= start:
            stack.pop()
        if stack:
            parents[i] = stack[-1]
        stack.append(i)
    return parents


def levels(parents: np.ndarray) -> list[np.ndarray]:
    """Positions of the events by depth, the outermost first.

    Args:
        parents: as from `nest`: a parent stands before its children.
    """
    depth: list[int] = []
    for parent in parents.tolist():
        depth.append(0 if parent == NOTHING else depth[parent] + 1)
    order = np.argsort(depth, kind="stable")
    return np.split(order, np.cumsum(np.bincount(depth))[:-1]) if len(order) else []


def inherit(values: np.ndarray, parents: np.ndarray, by_depth: list[np.ndarray]) -> np.ndarray:
    """Every event's own value, or that of the nearest enclosing event that has one; -1 is none."""
    values = values.copy()
    for here in by_depth[1:]:
        values[here] = np.where(values[here] == NOTHING, values[parents[here]], values[here])
    return values


def launchers(host: pd.DataFrame, kernels: pd.DataFrame) -> np.ndarray:
    """For every kernel the position among the host events of the runtime call that launched it, or -1.

    Of several calls with its number, as processes in one file have them, it is the last that begins before the kernel.
    """
    calls = np.flatnonzero(host["category"].isin(RUNTIME_CATEGORIES).to_numpy())
    numbers = host["correlation"].to_numpy()[calls]
    starts = host["start_us"].to_numpy()[calls]
    order = np.lexsort((starts, numbers))
    calls, numbers, starts = calls[order], numbers[order], starts[order]
    correlations, begins = kernels["correlation"].to_numpy(), kernels["start_us"].to_numpy()
    if not len(numbers):
        return np.full(len(correlations), NOTHING)
    place = np.minimum(np.searchsorted(numbers, correlations), len(numbers) - 1)
    last = np.searchsorted(numbers, correlations, side="right") - 1
    for kernel in np.flatnonzero(last > place).tolist():
        among = starts[place[kernel] : last[kernel] + 1]
        place[kernel] += max(np.searchsorted(among, begins[kernel], side="right") - 1, 0)
    return np.where((numbers[place] == correlations) & (correlations != 0), calls[place], NOTHING)


def innermost(
    events: pd.DataFrame, parents: np.ndarray, by_depth: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The innermost events of one thread over time: from `times[i]` on, row `which[i]` of `events` (-1: none).

    Args:
        events: events of one thread; `parents` and `by_depth` are for the same rows.
    """
    starts = events["start_us"].to_numpy()
    ends = starts + events["time_us"].to_numpy()
    depth = np.zeros(len(starts), dtype=np.int64)
    for level, here in enumerate(by_depth):
        depth[here] = level
        if level:
            ends[here] = np.minimum(ends[here], ends[parents[here]])
    # An event of zero length is never the innermost for any time.
    lasting = np.flatnonzero(ends > starts)
    times = np.concatenate([ends[lasting], starts[lasting]])
    which = np.concatenate([parents[lasting], lasting])
    opens = np.repeat([0, 1], len(lasting))
    # At equal times, ends come before starts, inner ends before outer ends, outer starts before inner starts.
    order = np.lexsort((np.concatenate([-depth[lasting], depth[lasting]]), opens, times))
    return times[order], which[order]
