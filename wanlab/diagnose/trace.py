"""A profiler's Chrome trace as columns: read fast, checked, with what is missing said.

The format is the Trace Event Format (Google, 2016) as PyTorch's Kineto writes it: complete events (`ph` "X")
with microseconds, category, thread and arguments; a kernel and the runtime call that launched it carry one
correlation id.
"""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import pandas as pd

KERNEL_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
RUNTIME_CATEGORIES = ("cuda_runtime", "cuda_driver")
HOST_CATEGORIES = ("cpu_op", "user_annotation", "python_function", *RUNTIME_CATEGORIES)
STEP_PREFIX = "ProfilerStep#"


class _Args(msgspec.Struct, gc=False):
    correlation: int | float | None = 0
    stream: int | str | None = -1


class _Event(msgspec.Struct, gc=False):
    ph: str = ""
    cat: str = ""
    name: str = ""
    pid: int | str = 0
    tid: int | str = 0
    ts: float | str | None = None
    dur: float | None = None
    args: _Args | None = None


class _File(msgspec.Struct):
    """The parts of a trace file that are read; msgspec skips the rest without making objects of it."""

    traceEvents: list[_Event]
    deviceProperties: list[dict] = []
    distributedInfo: dict | None = None


@dataclass(frozen=True, eq=False)
class Trace:
    """Complete events of one process's trace.

    Attributes:
        events: one row per event, ordered by thread, start and falling end: `name` and `category` (pandas
            categories), `process` and `thread` (integer codes), `start_us` from the first event on, `time_us`,
            `correlation` (0 where there is none), `stream` (-1 on the host).
        path: the file.
        devices: `deviceProperties` of the file, one dictionary per GPU.
        rank: of a distributed run, else None.
        notes: what the file lacks, in sentences.
    """

    events: pd.DataFrame
    path: Path
    devices: tuple[dict[str, Any], ...] = ()
    rank: int | None = None
    notes: tuple[str, ...] = field(default=())

    def of(self, *categories: str) -> pd.DataFrame:
        """The events of some categories."""
        return self.events[self.events["category"].isin(categories)]

    @cached_property
    def kernels(self) -> pd.DataFrame:
        """What the GPU did: kernels, copies and fills."""
        return self.of(*KERNEL_CATEGORIES)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """The profiler's steps: step, start_us, time_us."""
        names = self.events["name"].cat.categories
        wanted = names[names.str.startswith(STEP_PREFIX)]
        steps = self.of("user_annotation")
        steps = steps[steps["name"].isin(wanted)].sort_values("start_us")
        numbers = steps["name"].astype(str).str.removeprefix(STEP_PREFIX).astype(int)
        return steps.assign(step=numbers)[["step", "start_us", "time_us"]].reset_index(drop=True)

    @property
    def wall_us(self) -> float:
        """From the first start to the last end."""
        return float((self.events["start_us"] + self.events["time_us"]).max())

    def facts(self) -> pd.DataFrame:
        """What the trace is and what it lacks, a line each: fact, value."""
        import pandas as pd

        facts = {
            "file": self.path.name,
            "size_bytes": self.path.stat().st_size,
            "events": len(self.events),
            "steps": len(self.steps),
            "wall_ms": round(self.wall_us / 1e3, 3),
            "kernels": len(self.kernels),
            "rank": self.rank,
        }
        rows = [*facts.items(), *(("note", note) for note in self.notes)]
        return pd.DataFrame([(name, str(value)) for name, value in rows], columns=["fact", "value"])

    @property
    def has_gpu(self) -> bool:
        return not self.kernels.empty


def read_trace(path: str | os.PathLike) -> Trace:
    """Read a Chrome trace, `.json` or `.json.gz`.

    Raises:
        WanlabError: no such file, a truncated or empty file, or one that is no profiler trace.
    """
    path = Path(path)
    content = _decode(_bytes(path), path)
    events = _columns(content.traceEvents)
    if events.empty:
        raise WanlabError(f"{path} has no complete events; was the profiler's active step ever reached?")
    info = content.distributedInfo or {}
    notes = []
    if not events["category"].isin(KERNEL_CATEGORIES).any():
        notes.append("no GPU events: captured on a CPU, or without ProfilerActivity.CUDA")
    elif not (events.loc[events["category"].isin(KERNEL_CATEGORIES), "correlation"] > 0).all():
        notes.append(
            "some kernels have no correlation id; they are shown without the call that launched them"
        )
    if events["name"].cat.categories.str.contains("cudaGraphLaunch", regex=False).any():
        notes.append("CUDA graphs were launched: their kernels belong to the launch, not to single operators")
    return Trace(events, path, tuple(content.deviceProperties), info.get("rank"), tuple(notes))


def _bytes(path: Path) -> bytes:
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


def _decode(raw: bytes, path: Path) -> Any:
    try:
        return msgspec.json.decode(raw, type=_File, strict=False)
    except msgspec.ValidationError as error:
        raise WanlabError(f"{path} is not a profiler trace: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WanlabError(f"{path} is cut off or not JSON: {error}") from error


def _columns(events: list) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    kept = [e for e in events if e.ph == "X" and e.ts is not None and e.dur is not None]
    args = [e.args for e in kept]
    start = np.array([float(e.ts) for e in kept])
    thread, _ = pd.factorize(pd.Series([(e.pid, e.tid) for e in kept], dtype=object))
    process, _ = pd.factorize(pd.Series([e.pid for e in kept], dtype=object))
    table = pd.DataFrame(
        {
            "name": pd.Categorical([e.name for e in kept]),
            "category": pd.Categorical([e.cat for e in kept]),
            "process": process,
            "thread": thread,
            "start_us": start - (start.min() if len(start) else 0.0),
            "time_us": np.array([e.dur for e in kept], dtype=float),
            "correlation": np.array([a.correlation or 0 if a else 0 for a in args], dtype=np.int64),
            "stream": np.array(
                [a.stream if a and isinstance(a.stream, int) else -1 for a in args], dtype=np.int64
            ),
        }
    )
    order = np.lexsort((-table["time_us"], table["start_us"], table["thread"]))
    return table.iloc[order].reset_index(drop=True)
