"""A profile that was read back: its events as tables, and what it lacks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.models.generate import BEGINS, ENDS

if TYPE_CHECKING:
    import pandas as pd

SUFFIX = ".pt.trace.json.gz"
"""What TensorBoard's profiler plugin looks for in a folder."""
KERNEL_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
RUNTIME_CATEGORIES = ("cuda_runtime", "cuda_driver")
HOST_CATEGORIES = ("cpu_op", "user_annotation", "python_function", *RUNTIME_CATEGORIES)
STEP_PREFIX = "ProfilerStep#"


@dataclass(frozen=True, eq=False)
class Trace:
    """One process's trace.

    Attributes:
        events: one row per complete event, ordered by thread, start and falling end: `name` and `category` (pandas
            categories), `process` and `thread` (integer codes), `start_us` from the first event on, `time_us`,
            `correlation` (links a kernel to the runtime call that launched it; 0 where there is none), `stream`
            (-1 on the host), `size_bytes` (of a copy or fill on the GPU), `inputs` (pandas category: JSON
            `[shapes, types, values]` of an operator's inputs, values only of convolutions, "" where not recorded).
        memory: one row per allocation or release, in order of time: `time_us` (as `start_us`), `size_bytes`
            (negative for a release), `allocated_bytes` and `reserved_bytes` after it (-1 where unknown), `device`
            ("cpu", "cuda:0"), `address`, `thread` and `process` (as in `events`). Empty if it was not recorded.
        path: the file.
        devices: `deviceProperties` of the file, one dictionary per GPU.
        rank: of a distributed run, else None.
        generation: what `capture` noted: model, engines, device, dtype, settings, wall_ms, weights_bytes (per part);
            empty for a trace of other origin.
        notes: what the file lacks, in sentences.
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
        """What the GPU did: kernels, copies and fills."""
        return self.of(*KERNEL_CATEGORIES)

    @cached_property
    def host(self) -> pd.DataFrame:
        """What the host did, renumbered."""
        return self.of(*HOST_CATEGORIES).reset_index(drop=True)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """The profiler's steps: step, start_us, time_us."""
        names = self.events["name"].cat.categories
        wanted = names[names.str.startswith(STEP_PREFIX)]
        steps = self.of("user_annotation")
        steps = steps[steps["name"].isin(wanted)].sort_values("start_us")
        numbers = steps["name"].astype(str).str.removeprefix(STEP_PREFIX).astype(int)
        return steps.assign(step=numbers)[["step", "start_us", "time_us"]].reset_index(drop=True)

    @cached_property
    def window_us(self) -> tuple[float, float]:
        """Begin and end of the recorded generation; of the first and last event in a trace of other origin."""
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
        """What the trace is and what it lacks, a line each: fact, value."""
        import pandas as pd

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
    """Read a Chrome trace, `.json` or `.json.gz`, or a folder with one trace per rank: then that of the lowest rank.

    Raises:
        WanlabError: no such file, a truncated or empty file, one that is no profiler trace, or a folder without
            traces or with several of one rank.
    """
    path = Path(path)
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
    from wanlab.diagnose.trace_file import decode, tables

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
    steps, asked = generation.get("settings", {}).get("steps"), generation.get("asked_steps")
    if asked and steps != asked:
        notes.append(f"{steps} of {asked} steps, as many as make a trace that can be opened")
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
