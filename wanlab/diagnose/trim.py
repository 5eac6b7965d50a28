"""A trace made small enough to be kept beside a result: same kernels, same stacks, fewer words."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

from wanlab.diagnose.stacks import NOTHING
from wanlab.diagnose.trace import HOST_CATEGORIES, KERNEL_CATEGORIES, RUNTIME_CATEGORIES

_KEPT_ARGS = {
    "cpu_op": ("Input Dims", "Input type"),
    "kernel": ("correlation", "stream", "device"),
    "gpu_memcpy": ("correlation", "stream", "device", "bytes"),
    "gpu_memset": ("correlation", "stream", "device", "bytes"),
    "cuda_runtime": ("correlation",),
    "cuda_driver": ("correlation",),
    "cpu_instant_event": ("Total Reserved", "Total Allocated", "Bytes", "Device Id", "Device Type", "Addr"),
}


def trim(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    shortest_us: float = 20.0,
    smallest_bytes: int = 1 << 20,
) -> Path:
    """Write a smaller trace that says the same: kernels, launches, ranges, steps and times stay as they are.

    Left out are host events that launched nothing and took less than `shortest_us` (their time becomes own time of what
    encloses them), allocations below `smallest_bytes` (the totals beside the others still count them), flow arrows,
    GPU annotations, the profiler's own overhead, and the arguments that no reader here uses.

    Args:
        source, target: `.json` or `.json.gz`.

    Raises:
        WanlabError: as `read_trace`.
    """
    from wanlab.diagnose.trace_file import unpack

    content = json.loads(unpack(Path(source)))
    events = content["traceEvents"]
    origin = min(float(event["ts"]) for event in events if event.get("ph") == "X" and "ts" in event)
    kept = [_slim(event, origin) for event in _kept(events, shortest_us, smallest_bytes)]
    content = {key: value for key, value in content.items() if key not in ("traceEvents", "traceName")}
    content["trimmed"] = {"shortest_us": shortest_us, "smallest_bytes": smallest_bytes}
    text = json.dumps(content | {"traceEvents": kept}, separators=(",", ":"))
    target = Path(target)
    # No time in the header: the same trace gives the same file.
    packed = gzip.compress(text.encode(), 9, mtime=0) if target.suffix == ".gz" else text.encode()
    target.write_bytes(packed)
    return target


def _kept(events: list[dict], shortest_us: float, smallest_bytes: int) -> list[dict]:
    launched = {
        event["args"]["correlation"]
        for event in events
        if event.get("cat") in KERNEL_CATEGORIES and "correlation" in event.get("args", {})
    }
    needed = _needed(events, launched, shortest_us)
    kept = []
    for i, event in enumerate(events):
        phase, category = event.get("ph"), event.get("cat")
        if phase == "X" and category in HOST_CATEGORIES:
            keep = i in needed
        elif event.get("name") == "[memory]":
            keep = abs(event["args"]["Bytes"]) >= smallest_bytes
        else:
            keep = phase == "M" or category in KERNEL_CATEGORIES
        if keep:
            kept.append(event)
    return kept


def _needed(events: list[dict], launched: set, shortest_us: float) -> set[int]:
    """Positions of the host events that are long, are ranges, or enclose a launch."""
    host = [i for i, e in enumerate(events) if e.get("ph") == "X" and e.get("cat") in HOST_CATEGORIES]
    host.sort(
        key=lambda i: (str(events[i]["pid"]), str(events[i]["tid"]), events[i]["ts"], -events[i]["dur"])
    )
    needed: set[int] = set()
    stack: list[int] = []
    thread: Any = NOTHING
    for i in host:
        event = events[i]
        if (event["pid"], event["tid"]) != thread:
            thread = (event["pid"], event["tid"])
            stack.clear()
        while stack and events[stack[-1]]["ts"] + events[stack[-1]]["dur"] <= event["ts"]:
            stack.pop()
        stack.append(i)
        launches = event["cat"] in RUNTIME_CATEGORIES and event.get("args", {}).get("correlation") in launched
        if launches or event["cat"] == "user_annotation" or event["dur"] >= shortest_us:
            needed.update(stack)
    return needed


def _slim(event: dict, origin: float) -> dict:
    event = {key: value for key, value in event.items() if key not in ("id", "s", "bp")}
    if "ts" in event:
        event["ts"] = round(float(event["ts"]) - origin, 2)
    if "dur" in event:
        event["dur"] = round(event["dur"], 2)
    wanted = _KEPT_ARGS.get(event.get("cat", ""))
    if "args" in event and event.get("ph") != "M":
        names = (wanted or ()) + (("Concrete Inputs",) if "conv" in event["name"] else ())
        event["args"] = {key: event["args"][key] for key in names if key in event["args"]}
    return event
