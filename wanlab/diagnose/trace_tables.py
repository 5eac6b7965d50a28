"""Tables about experts, attention and triage from a saved profile, without the model or GPU of the capture."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pandas as pd

from wanlab.core.errors import WanlabError
from wanlab.diagnose.breakdown import (
    COMPONENTS,
    CROSS,
    EXPERTS,
    INDEX,
    KINDS,
    Attribution,
    attribute,
    breakdown,
    kernel_categories,
)
from wanlab.diagnose.memory.account import memory_account
from wanlab.diagnose.operators import ATTENTION
from wanlab.diagnose.trace import NOTHING, Trace, inherit, launchers
from wanlab.models.families.base import block_order

_BLOCK = re.compile(
    r"(expert\w*(?:\._orig_mod)?|(?!expert|vae_|text_encoder|image_encoder)[\w.]*?)\.(\w{0,40}blocks)\.(\d{1,6})(?:\.|$)"
)
"""Network, list and number of a block in the name of a range; a list inside another part of an expert is none of these."""


def layer_numbers(names: Iterable[str]) -> dict[str, int]:
    """Number of the layer of every range that is a block of a denoiser or inside one, as in an attention map: those of
    `single_transformer_blocks` follow after all `transformer_blocks` among the names."""
    found = {name: match.groups() for name in names if (match := _BLOCK.match(name))}
    sizes: dict[str, dict[str, int]] = {}
    for network, blocks, number in found.values():
        lists = sizes.setdefault(network, {})
        lists[blocks] = max(lists.get(blocks, 0), int(number) + 1)
    first = {
        (network, blocks): sum(lists[other] for other in _ordered(lists)[: _ordered(lists).index(blocks)])
        for network, lists in sizes.items()
        for blocks in lists
    }
    return {name: first[network, blocks] + int(number) for name, (network, blocks, number) in found.items()}


def _ordered(lists: Iterable[str]) -> list[str]:
    return sorted(lists, key=lambda name: (block_order(name), name))


def expert_calls(trace: Trace) -> pd.DataFrame:
    """Every call of an expert in a profile: step, component, call (in its step), host_ms (of the call itself) and, with a
    GPU, gpu_ms (of the kernels that it launched) and kernels.

    Raises:
        WanlabError: the trace names no experts.
    """
    host, placed = trace.host, attribute(trace)
    rows = np.flatnonzero(host["name"].astype(str).isin(EXPERTS).to_numpy())
    if not len(rows):
        raise WanlabError(f"{trace.path} names no experts; capture it with `diagnose.capture`")
    starts = host["start_us"].to_numpy()[rows]
    step = np.searchsorted(trace.steps["start_us"].to_numpy(), starts, side="right") - 1
    frame = pd.DataFrame(
        {
            "step": step,
            "component": host["name"].astype(str).to_numpy()[rows],
            "start_us": starts,
            "row": rows,
        }
    ).sort_values("start_us")
    frame.insert(2, "call", frame.groupby("step").cumcount())
    frame["host_ms"] = host["time_us"].to_numpy()[frame["row"]] / 1e3
    if trace.has_gpu:
        mark = np.full(len(host), NOTHING)
        mark[rows] = rows
        of_kernel = _of_launch(trace, inherit(mark, placed.parents, placed.by_depth))
        times = trace.kernels["time_us"].to_numpy()
        spent = np.bincount(of_kernel[of_kernel >= 0], weights=times[of_kernel >= 0], minlength=len(host))
        count = np.bincount(of_kernel[of_kernel >= 0], minlength=len(host))
        frame["gpu_ms"] = spent[frame["row"]] / 1e3
        frame["kernels"] = count[frame["row"]]
    return frame.drop(columns=["start_us", "row"]).reset_index(drop=True)


def attention_layers(trace: Trace) -> pd.DataFrame:
    """Time of the attention of each layer in a profile, with the columns of `layer_times` except those of heads: on a GPU
    the kernels of one call, else the operators.

    Raises:
        WanlabError: the trace names no layers with attention.
    """
    host, placed = trace.host, attribute(trace)
    names = host["name"].cat
    layers = layer_numbers(names.categories)
    numbers = np.array([layers.get(name, NOTHING) for name in names.categories])
    layer = inherit(numbers[names.codes], placed.parents, placed.by_depth)
    call = inherit(_attention_call(placed), placed.parents, placed.by_depth)
    if trace.has_gpu:
        category, _ = kernel_categories(trace, placed)
        event, times = _of_launch(trace, np.arange(len(host))), trace.kernels["time_us"].to_numpy()
        selected = np.isin(category, [INDEX["self_attention"], INDEX["cross_attention"]])
    else:
        attends = placed.own_kind == KINDS.index(ATTENTION)
        nested = np.append(attends, False)[placed.parents] & (placed.parents != NOTHING)
        event, times, selected = np.arange(len(host)), host["time_us"].to_numpy(), attends & ~nested
    selected &= (event != NOTHING) & (layer[event] != NOTHING)
    event, times = event[selected], times[selected]
    if not len(event):
        raise WanlabError(f"{trace.path} names no layers with attention; capture it with `diagnose.capture`")
    frame = pd.DataFrame(
        {
            "component": [COMPONENTS[i] for i in placed.component[event]],
            "kind": np.where(placed.attention[event] == CROSS, "cross", "self"),
            "layer": layer[event],
            "call": call[event],
            "time_ms": times / 1e3,
        }
    )
    keys = ["component", "kind", "layer"]
    each = frame.groupby([*keys, "call"], sort=False)["time_ms"].sum().reset_index()
    grouped = each.groupby(keys, sort=False)["time_ms"]
    table = grouped.agg(calls="size", median_ms="median", min_ms="min", max_ms="max").reset_index()
    return table.sort_values(["kind", "component", "layer"], ascending=[False, True, True], ignore_index=True)


def traced_measurements(trace: Trace) -> dict[str, float]:
    """The measurements for `triage` that a profile contains, with the names that notebooks record.

    Memory is left out where the profile holds only a part of it.

    Raises:
        WanlabError: the profile lists a GPU but has no event of it: whether the host was the limit cannot be told.
    """
    if trace.may_lack_gpu:
        raise WanlabError(f"{trace.path} is not diagnosed: {trace.cautions[0]}")
    measurements = {f"breakdown.{name}": float(value) for name, value in breakdown(trace).row().items()}
    if (trace.memory["size_bytes"] > 0).any():
        account = memory_account(trace)
        if not account.lower_bound:
            measurements |= {f"memory.{name}": float(value) for name, value in account.row().items()}
    if trace.device_bytes:
        measurements["14_memory.device_memory_gib"] = trace.device_bytes / 2**30
    return measurements


def _of_launch(trace: Trace, values: np.ndarray) -> np.ndarray:
    """For every kernel the value of the host event that launched it; -1 if that is not in the trace."""
    return np.append(values, NOTHING)[launchers(trace.host, trace.kernels)]


def _attention_call(placed: Attribution) -> np.ndarray:
    """The outermost event of each attention module, which identifies its calls."""
    first = np.full(len(placed.parents), NOTHING)
    known = placed.attention != NOTHING
    above = np.append(known, False)[placed.parents] & (placed.parents != NOTHING)
    begins = np.flatnonzero(known & ~above)
    first[begins] = begins
    return first
