"""What ran on the device in one call, by torch.profiler: kernels of any library in this process."""

from __future__ import annotations

from collections.abc import Callable

NAME_LENGTH = 160
"""Of a name that is kept: templates spell out thousands of characters."""


def profiled(call: Callable[[], object], *, on_gpu: bool = True) -> list[dict]:
    """Kernels of one call (operators on the CPU), longest first: name, whole; calls; time_ms."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    rows = []
    for event in profiler.key_averages():
        spent_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        rows.append({"name": event.key, "calls": event.count, "time_ms": spent_us / 1e3})
    return sorted(rows, key=lambda row: -row["time_ms"])


def longest(rows: list[dict], count: int) -> list[dict]:
    """The first rows, for a record: names are cut."""
    return [row | {"name": row["name"][:NAME_LENGTH]} for row in rows[:count]]
