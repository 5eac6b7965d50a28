"""What one call does: kernels on a GPU, operators on the CPU, by kind; and the operations that it needs at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from wanlab.diagnose import operators

COLUMNS = ["name", "kind", "calls", "time_ms", "share_percent"]
OTHER = "other"
"""The kind of what is no product, no attention and no simple operator, such as copies inside a library."""


def call_kernels(call: Callable[[], object], device: torch.device | str) -> pd.DataFrame:
    """Kernels of one call by torch.profiler, of whatever library in this process; on the CPU PyTorch's operators.

    Take it after timing: the profiler slows what it watches, so its sum is not the latency.

    Args:
        call: without arguments. It runs twice: libraries choose their kernels at the first.

    Returns:
        name, kind (see `diagnose.operators.kind`, or `"other"`), calls, time_ms, share_percent of the sum; longest first.
    """
    on_gpu = torch.device(device).type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    call()
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=[activity]) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    rows = []
    for event in profiler.key_averages():
        time_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if time_us > 0:
            rows.append((event.key, event.count, time_us / 1e3))
    return kernel_table(pd.DataFrame(rows, columns=["name", "calls", "time_ms"]))


def kernel_table(rows: pd.DataFrame, kind: Callable[[str], str | None] = operators.kind) -> pd.DataFrame:
    """The columns of `call_kernels` from name, calls and time_ms.

    Args:
        kind: name -> what it is; None stands for `"other"`.
    """
    kinds = [kind(name) or OTHER for name in rows["name"]]
    total = rows["time_ms"].sum() or 1.0
    table = rows.assign(kind=kinds, share_percent=100 * rows["time_ms"] / total)
    return table.sort_values("time_ms", ascending=False, kind="stable", ignore_index=True)[COLUMNS]


@dataclass(frozen=True)
class Operations:
    """Operations of one call, a multiply-add as two.

    Attributes:
        linear: of matrix products. attention: of scaled dot products. convolution: of convolutions.
    """

    linear: float = 0.0
    attention: float = 0.0
    convolution: float = 0.0

    @property
    def flop(self) -> float:
        return self.linear + self.attention + self.convolution


def count_operations(call: Callable[[], Any]) -> tuple[Operations, Any]:
    """Operations of one call of eager PyTorch, by torch.utils.flop_counter; and what the call returned."""
    # PyTorch registers no count for the attention kernel of the CPU.
    cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_of_cpu}
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        output = call()
    sums = {"linear": 0.0, "attention": 0.0, "convolution": 0.0}
    for operator, flop in counter.get_flop_counts().get("Global", {}).items():
        name = str(operator)
        kind = "attention" if "attention" in name else "convolution" if "conv" in name else "linear"
        sums[kind] += flop
    return Operations(**sums), output


def _attention_of_cpu(query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_flop(query, key, value)
