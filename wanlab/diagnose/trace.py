"""Reads a profile, a Chrome trace file, as tables of events, their stacks and launches."""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from wanlab.core.errors import WanlabError
from wanlab.core.paths import locate
from wanlab.models.pipeline import BEGINS, ENDS

NONE = msgspec.Raw(b"")
DEVICE_TYPES = {0: "cpu", 1: "cuda"}
"""c10::DeviceType, as in "[memory]" events."""


class Args(
    msgspec.Struct,
    gc=False,
    rename={
        "dims": "Input Dims",
        "types": "Input type",
        "concrete": "Concrete Inputs",
        "size": "Bytes",
        "copied": "bytes",
        "allocated": "Total Allocated",
        "reserved": "Total Reserved",
        "device_type": "Device Type",
        "device_id": "Device Id",
        "address": "Addr",
    },
):
    """The arguments of an event that wanlab uses. Raw ones are parsed only when they are needed."""

    correlation: int | float | None = 0
    stream: int | str | None = -1
    copied: int | float | None = 0
    dims: msgspec.Raw = NONE
    types: msgspec.Raw = NONE
    concrete: msgspec.Raw = NONE
    size: int | float | None = None
    allocated: int | float | None = -1
    reserved: int | float | None = -1
    device_type: int | None = 0
    device_id: int | None = -1
    address: int | str | None = 0


class Event(msgspec.Struct, gc=False):
    """One event of a trace file."""

    ph: str = ""
    cat: str = ""
    name: str = ""
    pid: int | str = 0
    tid: int | str = 0
    ts: float | str | None = None
    dur: float | None = None
    args: Args | None = None


class File(msgspec.Struct):
    """The parts of a trace file that wanlab uses."""

    traceEvents: list[Event]
    deviceProperties: list[dict] = []
    distributedInfo: dict | None = None
    wanlab: dict | None = None
    trimmed: dict | None = None


NO_ARGS = Args()


def decode(path: Path) -> File:
    """Read a trace file, `.json` or `.json.gz`.

    Raises:
        WanlabError: no such file, a truncated or empty file, or one that is not a profiler trace.
    """
    raw = unpack(path)
    try:
        return msgspec.json.decode(raw, type=File, strict=False)
    except msgspec.ValidationError as error:
        raise WanlabError(f"{path} is not a profiler trace: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WanlabError(f"{path} is cut off or not JSON: {error}") from error


def unpack(path: Path) -> bytes:
    """The JSON text of a trace file; errors as for `decode`."""
    if not path.is_file():
        raise WanlabError(f"no trace {path}; give a .json or .json.gz file of torch.profiler")
    raw = path.read_bytes()
    if not raw:
        raise WanlabError(f"{path} is empty; was the profiler stopped before it wrote?")
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise WanlabError(f"{path} is cut off or damaged ({error}); copy it again") from error


def tables(events: list[Event]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The complete events and the allocations, as described in `Trace.events` and `Trace.memory`."""
    complete = [e for e in events if e.ph == "X" and e.ts is not None and e.dur is not None]
    blocks = [e for e in events if e.name == "[memory]" and e.args is not None and e.args.size is not None]
    start = np.array([float(e.ts) for e in complete])
    origin = start.min() if len(start) else 0.0
    thread, process, where = _places(complete)
    args = [e.args or NO_ARGS for e in complete]
    table = pd.DataFrame(
        {
            "name": pd.Categorical([e.name for e in complete]),
            "category": pd.Categorical([e.cat for e in complete]),
            "process": process,
            "thread": thread,
            "start_us": start - origin,
            "time_us": np.array([e.dur for e in complete], dtype=float),
            "correlation": np.array([a.correlation or 0 for a in args], dtype=np.int64),
            "stream": np.array([a.stream if isinstance(a.stream, int) else -1 for a in args], dtype=np.int64),
            "size_bytes": np.array([a.copied or 0 for a in args], dtype=np.int64),
            "inputs": pd.Categorical(
                [
                    _inputs(e.name, a) if a.dims is not NONE else ""
                    for e, a in zip(complete, args, strict=True)
                ]
            ),
        }
    )
    order = np.lexsort((-table["time_us"], table["start_us"], table["thread"]))
    return table.iloc[order].reset_index(drop=True), _memory(blocks, origin, where)


def _places(events: list[Event]) -> tuple[np.ndarray, np.ndarray, dict]:
    """Codes of thread and process of each event, and {(pid, tid): codes}."""
    threads: dict[tuple, tuple[int, int]] = {}
    processes: dict[int | str, int] = {}
    codes = np.empty((len(events), 2), dtype=np.int64)
    for i, e in enumerate(events):
        key = (e.pid, e.tid)
        code = threads.get(key)
        if code is None:
            code = threads[key] = (len(threads), processes.setdefault(e.pid, len(processes)))
        codes[i] = code
    return codes[:, 0], codes[:, 1], threads


def _inputs(name: str, args: Args) -> str:
    """Shapes, types and, where strides and padding matter, values of an operator's inputs, as JSON."""
    values = bytes(args.concrete).decode() if "conv" in name and args.concrete is not NONE else "[]"
    types = bytes(args.types).decode() if args.types is not NONE else "[]"
    return f"[{bytes(args.dims).decode()},{types},{values}]"


def _memory(blocks: list[Event], origin: float, where: dict) -> pd.DataFrame:
    args = [e.args for e in blocks]
    unknown = (-1, -1)
    table = pd.DataFrame(
        {
            "time_us": np.array([float(e.ts or 0) for e in blocks]) - origin,
            "size_bytes": np.array([a.size for a in args], dtype=np.int64),
            "allocated_bytes": np.array([-1 if a.allocated is None else a.allocated for a in args], np.int64),
            "reserved_bytes": np.array([-1 if a.reserved is None else a.reserved for a in args], np.int64),
            "device": pd.Categorical([_device(a) for a in args]),
            "address": np.array([_address(a.address) for a in args], dtype=np.uint64),
            "thread": np.array([where.get((e.pid, e.tid), unknown)[0] for e in blocks], dtype=np.int64),
            "process": np.array([where.get((e.pid, e.tid), unknown)[1] for e in blocks], dtype=np.int64),
        }
    )
    return table.sort_values("time_us", kind="stable").reset_index(drop=True)


def _device(args: Args) -> str:
    kind = DEVICE_TYPES.get(args.device_type or 0, f"device type {args.device_type}")
    return kind if kind == "cpu" else f"{kind}:{max(args.device_id or 0, 0)}"


def _address(value: int | str | None) -> int:
    """An address as a number; older files have hexadecimal text."""
    try:
        return int(value, 0) if isinstance(value, str) else int(value or 0)
    except ValueError:
        return 0


SUFFIX = ".pt.trace.json.gz"
"""File name pattern that TensorBoard's profiler plugin searches for in a folder."""
KERNEL_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
RUNTIME_CATEGORIES = ("cuda_runtime", "cuda_driver")
HOST_CATEGORIES = ("cpu_op", "user_annotation", "python_function", *RUNTIME_CATEGORIES)
STEP_PREFIX = "ProfilerStep#"


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
        devices: `deviceProperties` of the file, one dictionary per GPU.
        rank: rank in a distributed run, else None.
        generation: description by `capture`: model, engines, device, dtype, settings, wall_ms, weights_bytes (per part);
            empty for a trace from another program.
        notes: limits of the file, as sentences.
    """

    events: pd.DataFrame
    memory: pd.DataFrame
    path: Path
    devices: tuple[dict[str, Any], ...] = ()
    rank: int | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())

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
        step_names = names[names.str.startswith(STEP_PREFIX)]
        steps = self.of("user_annotation")
        steps = steps[steps["name"].isin(step_names)].sort_values("start_us")
        numbers = steps["name"].astype(str).str.removeprefix(STEP_PREFIX).astype(int)
        return steps.assign(step=numbers)[["step", "start_us", "time_us"]].reset_index(drop=True)

    @cached_property
    def window_us(self) -> tuple[float, float]:
        """Start and end of the recorded generation; of the first and last event in a trace from another program."""
        starts, times = self.events["start_us"], self.events["time_us"]
        marks = [starts[(self.events["name"] == name).to_numpy()] for name in (BEGINS, ENDS)]
        if all(len(mark) == 1 for mark in marks):
            return float(marks[0].iloc[0]), float(marks[1].iloc[0])
        return 0.0, float((starts + times).max())

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

    def facts(self) -> pd.DataFrame:
        """Facts about the trace and its limits, one row each: fact, value."""
        facts = {
            "file": self.path.name,
            "model": self.generation.get("model"),
            "size_bytes": self.path.stat().st_size,
            "events": len(self.events),
            "steps": len(self.steps),
            "wall_ms": round(self.wall_us / 1e3, 3),
            "GPU": self.device_name,
            "gpu_memory_gib": round(self.devices[0].get("totalGlobalMem", 0) / 2**30, 1)
            if self.devices
            else None,
            "kernels": len(self.kernels),
            "allocations": int((self.memory["size_bytes"] > 0).sum()),
            "rank": self.rank,
        }
        rows = [*facts.items(), *(("note", note) for note in self.notes)]
        return pd.DataFrame([(name, str(value)) for name, value in rows], columns=["fact", "value"])


def read_trace(path: str | os.PathLike) -> Trace:
    """Read a Chrome trace, `.json` or `.json.gz`, or a folder with one trace per rank, from which the lowest rank is read.

    Raises:
        WanlabError: no such file, a truncated or empty file, one that is not a profiler trace, or a folder without
            traces or with several of one rank.
    """
    path = locate(path)
    return _of_folder(path) if path.is_dir() else _of_file(path)


def _of_folder(folder: Path) -> Trace:
    files = sorted(file for pattern in ("*.json", "*.json.gz") for file in folder.glob(pattern))
    if not files:
        raise WanlabError(f"no traces (.json, .json.gz) in {folder}")
    traces = [_of_file(file) for file in files]
    if len(traces) == 1:
        return traces[0]
    ranks = [trace.rank for trace in traces]
    if None in ranks or len(set(ranks)) < len(ranks):
        names = ", ".join(file.name for file in files[:5])
        raise WanlabError(f"{len(files)} traces in {folder}, which are not one per rank; name one: {names}")
    first = min(traces, key=lambda trace: trace.rank)
    walls = ", ".join(
        f"rank {t.rank} {t.wall_us / 1e3:,.1f} ms" for t in sorted(traces, key=lambda t: t.rank)
    )
    note = f"rank {first.rank} of {len(traces)} is shown; wall clock of each: {walls}"
    return replace(first, notes=(*first.notes, note))


def _of_file(path: Path) -> Trace:
    content = decode(path)
    events, memory = tables(content.traceEvents)
    if events.empty:
        raise WanlabError(f"{path} has no complete events; was the profiler's active step ever reached?")
    info = content.distributedInfo or {}
    return Trace(
        events,
        memory,
        path,
        devices=tuple(content.deviceProperties),
        rank=info.get("rank"),
        generation=content.wanlab or {},
        notes=_notes(events, info, content.wanlab or {}, content.trimmed or {}),
    )


def _notes(events: pd.DataFrame, info: dict, generation: dict, trimmed: dict) -> tuple[str, ...]:
    notes = []
    steps, requested = generation.get("settings", {}).get("steps"), generation.get("asked_steps")
    if requested and steps != requested:
        notes.append(f"{steps} of {requested} steps, as many as make a trace that can be opened")
    if trimmed:
        notes.append(
            f"trimmed: host events under {trimmed['shortest_us']:g} µs that launched nothing are own time of what is "
            f"around them, allocations under {trimmed['smallest_bytes'] / 2**20:g} MiB are left out"
        )
    gpu = events["category"].isin(KERNEL_CATEGORIES)
    if not gpu.any():
        notes.append("no GPU events: captured on a CPU, or without ProfilerActivity.CUDA")
    elif not (events.loc[gpu, "correlation"] > 0).all():
        notes.append(
            "some kernels have no correlation id; they are shown without the call that launched them"
        )
    if not events["category"].isin(HOST_CATEGORIES).any():
        notes.append("no host events: kernels cannot be placed under modules and operators")
    if events["name"].cat.categories.str.contains("cudaGraphLaunch", regex=False).any():
        notes.append("CUDA graphs were launched: their kernels belong to the launch, not to single operators")
    if (info.get("world_size") or 1) > 1:
        notes.append(
            f"one rank of {info['world_size']}: waiting for the others is inside its communication kernels"
        )
    return tuple(notes)


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
    """Positions of the events by depth, the outermost first."""
    depth = np.full(len(parents), NOTHING)
    depths: list[np.ndarray] = []
    here = np.flatnonzero(parents == NOTHING)
    while len(here):
        depth[here] = len(depths)
        depths.append(here)
        above = np.where(parents == NOTHING, NOTHING, depth[parents])
        here = np.flatnonzero((above == len(depths) - 1) & (depth == NOTHING))
    return depths


def inherit(values: np.ndarray, parents: np.ndarray, by_depth: list[np.ndarray]) -> np.ndarray:
    """Every event's own value, or that of the nearest enclosing event that has one; -1 is none."""
    values = values.copy()
    for here in by_depth[1:]:
        values[here] = np.where(values[here] == NOTHING, values[parents[here]], values[here])
    return values


def launchers(host: pd.DataFrame, kernels: pd.DataFrame) -> np.ndarray:
    """For every kernel the position among the host events of the runtime call that launched it, or -1."""
    calls = np.flatnonzero(host["category"].isin(RUNTIME_CATEGORIES).to_numpy())
    numbers = host["correlation"].to_numpy()[calls]
    order = np.argsort(numbers, kind="stable")
    calls, numbers = calls[order], numbers[order]
    correlations = kernels["correlation"].to_numpy()
    if not len(numbers):
        return np.full(len(correlations), NOTHING)
    place = np.minimum(np.searchsorted(numbers, correlations), len(numbers) - 1)
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
