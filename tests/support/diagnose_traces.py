"""Traces written by hand, event by event, in the profiler's own format."""

from __future__ import annotations

import json

from wanlab import diagnose


def event(name, start, time, category="cpu_op", thread=1, **args) -> dict:
    return {
        "ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": start, "dur": time, "args": args
    }  # fmt: skip


def launched(name, at, start, time, correlation, category="kernel", stream=7, **args) -> list[dict]:
    """A runtime call of 1 µs at `at`, and the kernel that it starts."""
    call = event("cudaLaunchKernel", at, 1, "cuda_runtime", correlation=correlation)
    return [
        call,
        event(
            name, start, time, category, thread=100 + stream, correlation=correlation, stream=stream, **args
        ),
    ]


def trace_of(folder, *events, name="t.json", **content):
    path = folder / name
    path.write_text(json.dumps({"traceEvents": list(events)} | content))
    return diagnose.read_trace(path)
