"""Events of a trace file as tables: what their category means, which have times that cannot be, and allocations."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from wanlab.diagnose.trace_file import NONE, Args, Event, as_float

DEVICE_TYPES = {0: "cpu", 1: "cuda", 6: "hip", 9: "xla", 12: "xpu", 13: "mps", 15: "hpu", 19: "mtia"}
"""c10::DeviceType, as in "[memory]" events; 20 is an accelerator that is registered under a name of its own."""
KERNEL_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
RUNTIME_CATEGORIES = ("cuda_runtime", "cuda_driver")
HOST_CATEGORIES = ("cpu_op", "user_annotation", "python_function", *RUNTIME_CATEGORIES)
STEP_PREFIX = "ProfilerStep#"
RANGE = re.compile(
    r"^(?:(text_encoder(?:_[23])?|image_encoder|vae_encoder|vae_decoder|expert(?:_high|_low)?)(?:\.|$)|ProfilerStep#\d)"
)
"""Names of ranges that `capture` records, and of the profiler's steps."""

MEANINGS = {
    **{name: name for name in (*KERNEL_CATEGORIES, *HOST_CATEGORIES)},
    # Kineto before 2022; its words began with capital letters.
    "operator": "cpu_op",
    "runtime": "cuda_runtime",
    "memcpy": "gpu_memcpy",
    "memset": "gpu_memset",
    "python": "python_function",
    # Accelerators of Intel, AMD, Cambricon, Moore Threads, and those that PyTorch knows as PrivateUse1.
    "xpu_runtime": "cuda_runtime",
    "xpu_driver": "cuda_driver",
    "hip_runtime": "cuda_runtime",
    "privateuse1_runtime": "cuda_runtime",
    "privateuse1_driver": "cuda_driver",
    "mlu_runtime": "cuda_runtime",
    "mlu_memcpy": "gpu_memcpy",
    "mlu_memset": "gpu_memset",
    "musa_runtime": "cuda_runtime",
    "profilerstep": "user_annotation",
    # Processes without categories, in a file of torch.autograd.profiler.
    "cpu functions": "cpu_op",
    "cuda functions": "kernel",
}
"""Category in a file, in small letters -> its name in Kineto today, for CUDA."""
IGNORED = frozenset(
    (
        "trace", "gpu_user_annotation", "mlu_user_annotation", "overhead", "external_correlation", "cpu_instant_event",
        "fwdbwd", "ac2g", "async_gpu", "async_cpu_to_gpu", "cuda_sync", "cuda_event", "xpu_sync", "hardware_counters",
        "xpu_scope_profiler", "cuda_profiler_range",
    )
)  # fmt: skip
"""Categories of events that are neither work of the host nor of the GPU: spans, marks, waits, counters."""
LARGEST_BYTES = 2**42
"""A block of more is a mistake of the profiler; a million of these still add up in 64 bits."""
DAY_US, HOUR_US, MINUTE_US = 86_400e6, 3_600e6, 60e6


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of a trace, and what of the file is not in them.

    Attributes:
        events, memory: as `Trace.events` and `Trace.memory`.
        unknown: events of unknown categories that are not on a thread of the host, and may so be work of an accelerator:
            category, events, time_ms.
        set_aside: number of events per reason: times that cannot be.
        legacy: whether categories are those of an older Kineto.
    """

    events: pd.DataFrame
    memory: pd.DataFrame
    unknown: pd.DataFrame
    set_aside: dict[str, int]
    legacy: bool


def tables(events: list[Event]) -> Tables:
    """Tables of the events of a file, without those whose category is unknown or whose times cannot be."""
    complete = [event for event in events if event.ph == "X"]
    start = np.array([as_float(event.ts) for event in complete], dtype=float)
    time = np.array([as_float(event.dur) for event in complete], dtype=float)
    sound, set_aside = plausible(start, time)
    category, label = _categories(events, complete)
    known = np.array([bool(name) for name in category], dtype=bool)
    on_host = {(e.pid, e.tid) for e, name in zip(complete, category, strict=True) if name in HOST_CATEGORIES}
    rows = np.flatnonzero(sound & known)
    origin = start[rows].min() if len(rows) else 0.0
    chosen = [complete[i] for i in rows.tolist()]
    thread, process, where = _places(chosen)
    args = [event.args or NO_ARGS for event in chosen]
    table = pd.DataFrame(
        {
            "name": pd.Categorical([event.name or "" for event in chosen]),
            "category": pd.Categorical([category[i] for i in rows.tolist()]),
            "process": process,
            "thread": thread,
            "start_us": start[rows] - origin,
            "time_us": time[rows],
            "correlation": _integers(a.correlation for a in args),
            "stream": _integers((a.stream for a in args), -1),
            "size_bytes": np.maximum(_integers(a.copied for a in args), 0),
            "inputs": pd.Categorical([_inputs(e.name or "", a) for e, a in zip(chosen, args, strict=True)]),
        }
    )
    order = np.lexsort((-table["time_us"], table["start_us"], table["thread"]))
    blocks = [e for e in events if e.name == "[memory]" and e.args is not None and e.args.size is not None]
    return Tables(
        table.iloc[order].reset_index(drop=True),
        _memory(blocks, origin, where),
        _unknown(complete, label, sound & ~known, time, on_host),
        set_aside,
        any((event.cat or "").lower() in LEGACY for event in chosen),
    )


NO_ARGS = Args()
LEGACY = ("operator", "runtime", "memcpy", "memset")


def plausible(start: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Which events have times that can be, and the number of the others by reason.

    Not plausible are a start or duration that is missing or not finite, a negative duration, one of over a day, and a start
    more than an hour away from most events, or at 0 and more than a minute before the next: profilers write 0 where
    the driver gave no time. A pause of that length cannot be in a trace whose events are counted in microseconds.

    Args:
        start, time: microseconds; NaN where missing.
    """
    missing = ~(np.isfinite(start) & np.isfinite(time))
    negative = ~missing & (time < 0)
    endless = ~missing & (time > DAY_US)
    sound = ~(missing | negative | endless)
    far = np.zeros(len(start), dtype=bool)
    rows = np.flatnonzero(sound)
    if len(rows):
        rows = rows[np.argsort(start[rows], kind="stable")]
        begins, reached = start[rows], np.maximum.accumulate((start + time)[rows])
        pause = begins[1:] - reached[:-1]
        breaks = (pause > HOUR_US) | ((pause > MINUTE_US) & (begins[:-1] <= 0) & (begins[1:] > 0))
        group = np.concatenate([[0], np.cumsum(breaks)])
        far[rows[group != np.bincount(group).argmax()]] = True
        zero = far & (start == 0)
    reasons = {
        "without a start or a duration": missing,
        "of negative duration": negative,
        "longer than a day": endless,
    }
    if far.any():
        reasons |= {"at time 0": zero, "hours away from the others": far & ~zero}
    counts = {reason: int(marked.sum()) for reason, marked in reasons.items() if marked.any()}
    return sound & ~far, counts


def _categories(events: list[Event], complete: list[Event]) -> tuple[list[str], list[str]]:
    """Each complete event's category as Kineto names it today, "" if unknown; and as it is in the file.

    Events without a category are known by their process, as in files of torch.autograd.profiler.
    """
    processes = {
        event.pid: str(event.args.name)
        for event in events
        if event.ph == "M" and event.name == "process_name" and event.args is not None and event.args.name
    }
    cached: dict[tuple, str] = {}
    meanings, labels = [], []
    for event in complete:
        label = event.cat or processes.get(event.pid, str(event.pid))
        key = (label, event.name if label == "Operator" else None)
        found = cached.get(key)
        if found is None:
            found = cached[key] = meaning(label, event.name or "")
        meanings.append(found)
        labels.append(label)
    return meanings, labels


def meaning(label: str, name: str) -> str:
    """Category as Kineto names it today, "" if unknown.

    Args:
        label: category in the file, or the name of the process where events have none.
        name: name of the event: an older Kineto does not tell ranges from operators.
    """
    word = label.lower()
    if label == "Operator" and RANGE.match(name):
        return "user_annotation"
    return MEANINGS.get(word, label if word in IGNORED else "")


def _unknown(
    complete: list[Event], labels: list[str], rows: np.ndarray, time: np.ndarray, on_host: set[tuple]
) -> pd.DataFrame:
    places = [i for i in np.flatnonzero(rows).tolist() if (complete[i].pid, complete[i].tid) not in on_host]
    frame = pd.DataFrame({"category": [labels[i] for i in places], "time_ms": time[places] / 1e3})
    grouped = frame.groupby("category", sort=False)["time_ms"].agg(events="size", time_ms="sum")
    return grouped.sort_values("events", ascending=False, kind="stable").reset_index()


def _integer(value: int | float | str | None, missing: int, largest: int = 2**63 - 1) -> int:
    """A number as an integer, `missing` where it is none or beyond 64 bits; text may be hexadecimal."""
    if type(value) is int:
        number = value
    else:
        try:
            number = int(value, 0) if isinstance(value, str) else int(value or 0)
        except (ValueError, OverflowError):
            return missing
    return number if -largest <= number <= largest else missing


def _integers(
    values: Iterable[int | float | str | None], missing: int = 0, largest: int = 2**63 - 1
) -> np.ndarray:
    return np.array([_integer(value, missing, largest) for value in values], dtype=np.int64)


def _places(events: list[Event]) -> tuple[np.ndarray, np.ndarray, dict]:
    """Codes of thread and process of each event, and {(pid, tid): codes}."""
    threads: dict[tuple, tuple[int, int]] = {}
    processes: dict[int | float | str | None, int] = {}
    codes = np.empty((len(events), 2), dtype=np.int64)
    for i, e in enumerate(events):
        key = (e.pid, e.tid)
        code = threads.get(key)
        if code is None:
            code = threads[key] = (len(threads), processes.setdefault(e.pid, len(processes)))
        codes[i] = code
    return codes[:, 0], codes[:, 1], threads


def _inputs(name: str, args: Args) -> str:
    """Shapes, types and, where strides and padding matter, values of an operator's inputs, as JSON; "" if not recorded."""
    dims = args.dims if args.dims is not NONE else args.old_dims
    if dims is NONE:
        return ""
    values = bytes(args.concrete).decode() if "conv" in name and args.concrete is not NONE else "[]"
    types = bytes(args.types).decode() if args.types is not NONE else "[]"
    return f"[{bytes(dims).decode()},{types},{values}]"


def _memory(blocks: list[Event], origin: float, where: dict) -> pd.DataFrame:
    start = np.array([as_float(event.ts) for event in blocks], dtype=float) - origin
    sound = np.isfinite(start) & (np.abs(start) < DAY_US)
    blocks = [blocks[i] for i in np.flatnonzero(sound).tolist()]
    args = [event.args for event in blocks]
    unknown = (-1, -1)
    table = pd.DataFrame(
        {
            "time_us": start[sound],
            "size_bytes": _integers((a.size for a in args), 0, LARGEST_BYTES),
            "allocated_bytes": _integers((_or_unknown(a.allocated) for a in args), -1, LARGEST_BYTES),
            "reserved_bytes": _integers((_or_unknown(a.reserved) for a in args), -1, LARGEST_BYTES),
            "device": pd.Categorical([_device(a) for a in args]),
            "address": np.array([max(_integer(a.address, 0, 2**64 - 1), 0) for a in args], dtype=np.uint64),
            "thread": np.array([where.get((e.pid, e.tid), unknown)[0] for e in blocks], dtype=np.int64),
            "process": np.array([where.get((e.pid, e.tid), unknown)[1] for e in blocks], dtype=np.int64),
        }
    )
    return table.sort_values("time_us", kind="stable").reset_index(drop=True)


def _or_unknown(value: int | float | str | None) -> int | float | str:
    return -1 if value is None else value


def _device(args: Args) -> str:
    number = _integer(args.device_type, 0)
    kind = DEVICE_TYPES.get(number, f"device type {number}")
    return kind if kind == "cpu" else f"{kind}:{max(_integer(args.device_id, 0), 0)}"
