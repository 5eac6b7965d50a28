"""Memory peak of a trace, explained by its allocations: blocks in use, their owners, and reserved memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from wanlab.core.errors import WanlabError
from wanlab.core.words import size_text
from wanlab.diagnose import operators
from wanlab.diagnose.breakdown import COMPONENTS, EXPERTS, KINDS, OUTSIDE, Attribution, attribute
from wanlab.diagnose.trace import NOTHING, Trace, inherit, innermost, levels
from wanlab.models.spec import ENCODERS


@dataclass(frozen=True, eq=False)
class Blocks:
    """Allocated blocks of a trace, one entry each, in order of time.

    Attributes:
        size_bytes: size according to the allocator.
        start_us, end_us: start and end of its life; infinity where it is not freed in the trace.
        event: innermost host event around the allocation, as a row of `trace.host`, -1 if none.
        range, operator: named range and operator around the allocation, as rows of `trace.host`.
        component: index into `COMPONENTS`.
    """

    size_bytes: np.ndarray
    start_us: np.ndarray
    end_us: np.ndarray
    event: np.ndarray
    range: np.ndarray
    operator: np.ndarray
    component: np.ndarray

    def names(self, trace: Trace, events: np.ndarray) -> list[str]:
        """Names of host events, "" for none."""
        names = trace.host["name"]
        return [str(names.iloc[i]) if i != NOTHING else "" for i in events.tolist()]


def match(trace: Trace, events: pd.DataFrame, placed: Attribution) -> Blocks:
    """Match the releases of one device's `Trace.memory` with their allocations, by address.

    A release of a block that was allocated before the trace has no match and is left out.
    """
    start: list[float] = []
    size: list[float] = []
    end: list[float] = []
    alive: dict[int, int] = {}
    addresses, sizes, times = (
        events[name].to_numpy().tolist() for name in ("address", "size_bytes", "time_us")
    )
    where = []
    for i, (address, bytes_, time) in enumerate(zip(addresses, sizes, times, strict=True)):
        if bytes_ > 0:
            if (
                old := alive.get(address)
            ) is not None:  # its release is not in the trace, but the block must have been released
                end[old] = time
            alive[address] = len(start)
            start.append(time)
            size.append(bytes_)
            end.append(np.inf)
            where.append(i)
        elif (block := alive.pop(address, None)) is not None:
            end[block] = time
    start_us = np.array(start, dtype=float)
    event = _around(trace, placed, start_us, events["thread"].to_numpy()[where])
    host = trace.host
    number = np.arange(len(host))
    ranges = np.where((host["category"] == "user_annotation").to_numpy(), number, NOTHING)
    # The operator of a block is the one that needs memory, not an operator that only allocates.
    asking = (host["category"] == "cpu_op").to_numpy() & (
        placed.own_kind != KINDS.index(operators.ALLOCATION)
    )

    def nearest(own: np.ndarray) -> np.ndarray:
        return np.append(inherit(own, placed.parents, placed.by_depth), NOTHING)[event]

    component = np.append(placed.component, NOTHING)[event]
    return Blocks(
        np.array(size, dtype=np.int64),
        start_us,
        np.array(end, dtype=float),
        event,
        nearest(ranges),
        nearest(np.where(asking, number, NOTHING)),
        np.where(component == NOTHING, COMPONENTS.index(OUTSIDE), component),
    )


def _around(trace: Trace, placed: Attribution, moments: np.ndarray, threads: np.ndarray) -> np.ndarray:
    """The innermost host event around each moment on its thread, as a row of `trace.host`."""
    around = np.full(len(moments), NOTHING)
    host_threads = trace.host["thread"].to_numpy()
    for thread in np.unique(threads):
        rows = np.flatnonzero(host_threads == thread)
        on_thread = threads == thread
        if len(rows):
            offset = rows[0]  # the rows of a thread are contiguous
            parents = np.where(placed.parents[rows] == NOTHING, NOTHING, placed.parents[rows] - offset)
            times, which = innermost(trace.host.iloc[rows], parents, levels(parents))
            place = np.searchsorted(times, moments[on_thread], side="right") - 1
            inner = np.where(place >= 0, which[np.maximum(place, 0)], NOTHING)
            around[on_thread] = np.where(inner == NOTHING, NOTHING, inner + offset)
    return around


GIB = 1 << 30
PART_NAMES = {
    "weights": "weights",
    "activations": "activations",
    "workspace": "workspace",
    "text_embedding": "text embedding, inputs",
    "fragmentation": "reserved, not used",
    "other": "other",
}
"""Part of the peak -> its name in text."""
MEANS = {
    "workspace": ", which one operator needs only while it runs",
    "activations": ", which pass from one operator to the next",
    "fragmentation": ": the allocator holds it, and nothing is in it",
}
"""Part of the peak -> what it is, as the end of a sentence, where its name does not tell."""

POINTS = 1500
"""Limit of moments in a timeline; of each interval the moment with the most memory is kept, so that no peak is lost."""


@dataclass(frozen=True, eq=False)
class MemoryAccount:
    """Memory of a generation at its peak, and over time.

    Attributes:
        frame: rows that add up to `peak_bytes`: `part` ("weights", "activations", "workspace", "text_embedding",
            "fragmentation", "other": memory from before the capture that is not weights, and blocks too small for the
            trace), `component` (in which it was allocated; for weights their owner),
            `size_bytes`, `share_percent`, `blocks`.
        blocks: the blocks in use at the peak, largest first: `size_mib`, `component`, `range`, `operator`,
            `allocated_ms`, `freed_ms` (NaN if not in the trace).
        timeline: `time_ms`, `before` (bytes in use when the trace began) and a column of bytes per component.
        churn: per denoising step (what comes after the last counts with it) and component: `step`, `component`,
            `allocations`, `churn_gib` (allocated and freed within it).
        device: "cuda:0" or "cpu".
        peak_bytes: memory of the process on the device: on a GPU the reserved memory at the moment of the largest
            allocated amount, on a CPU the allocated memory.
        peak_ms: time of the peak.
        reserved_peak_bytes: largest reserved amount; -1 where nothing is reserved or it was not recorded.
        lower_bound: whether memory from before the trace is missing in all of this: the profiler recorded no totals.
        notes: limits of the analysis.
    """

    frame: pd.DataFrame
    blocks: pd.DataFrame
    timeline: pd.DataFrame
    churn: pd.DataFrame
    device: str
    peak_bytes: int
    peak_ms: float
    reserved_peak_bytes: int
    lower_bound: bool
    notes: tuple[str, ...]

    def size_bytes(self, part: str) -> int:
        """Sum of all rows of one part."""
        return int(self.frame.loc[self.frame["part"] == part, "size_bytes"].sum())

    @property
    def headline(self) -> str:
        """The largest part of the peak, and the peak."""
        parts = self.frame.groupby("part")["size_bytes"].sum()
        most, least = parts.idxmax(), "at least " if self.lower_bound else ""
        share, name = f"{100 * parts.max() / self.peak_bytes:.0f} %", PART_NAMES[most]
        without = ", without what was there before the trace" if self.lower_bound else ""
        of = f"{least}{size_text(self.peak_bytes)} on {'the CPU' if self.device == 'cpu' else 'the GPU'}{without}"
        return f"The peak is {of}, and {share} of that is {name}{MEANS.get(most, '')}."

    @property
    def tiles(self) -> tuple[tuple[str, str, str], ...]:
        """Key figures: the peak and its largest parts."""
        parts = self.frame.groupby("part")["size_bytes"].sum().sort_values(ascending=False).head(3)
        reserved = f"{size_text(self.reserved_peak_bytes)} reserved" if self.reserved_peak_bytes > 0 else ""
        peak = ("peak memory", size_text(self.peak_bytes), reserved or "allocated in one generation")
        shares = {part: f"{100 * size / self.peak_bytes:.0f} % of the peak" for part, size in parts.items()}
        return (peak, *((PART_NAMES[part], size_text(parts[part]), share) for part, share in shares.items()))

    def row(self) -> dict[str, float]:
        """Flat record: peak_gib, <part>_gib, allocations, churn_gib_per_step (median over steps)."""
        parts = ("weights", "activations", "workspace", "text_embedding", "fragmentation", "other")
        steps = self.churn.groupby("step")["churn_gib"].sum()
        return {
            "peak_gib": self.peak_bytes / GIB,
            **{f"{part}_gib": self.size_bytes(part) / GIB for part in parts},
            "allocations": int(self.churn["allocations"].sum()),
            "churn_gib_per_step": float(steps.median()) if len(steps) else 0.0,
        }


def memory_account(trace: Trace) -> MemoryAccount:
    """Explain the peak of a trace that was captured with `memory=True`.

    A block belongs to the component in whose range it was allocated. It is workspace if the product, convolution or
    attention that allocated it freed it before it returned, or never (a library keeps that of its handle); text
    embedding if it was allocated in the text encoder, or between it and the next component (where inputs are prepared
    too), and kept through denoising; an activation otherwise. Memory from before the capture is weights: its size is on
    a GPU the allocator's own total, on a CPU a note of the capture.

    Where the file has no totals (-1) they are summed from the allocations and releases, and what was there before is the
    weights that the capture noted, or else at least what the trace releases without having allocated it.

    Raises:
        WanlabError: the trace has no allocations.
    """
    if trace.memory.empty or not (trace.memory["size_bytes"] > 0).any():
        raise WanlabError(f"{trace.path} has no allocations; capture it with memory=True")
    allocating = trace.memory.loc[trace.memory["size_bytes"] > 0, "device"].unique().tolist()
    device = min(allocating, key=lambda name: (name == "cpu", name))
    events = trace.memory[trace.memory["device"] == device].reset_index(drop=True)
    placed = attribute(trace)
    blocks = match(trace, events, placed)
    weights = trace.generation.get("weights_bytes", {})
    on_gpu = device != "cpu"
    total, before, lower_bound = _totals(events, sum(weights.values()), on_gpu)
    top = int(np.argmax(total))
    peak_us, peak = float(events["time_us"].iloc[top]), int(total[top])
    # The allocator reserves what it hands out; less than that was not recorded.
    known = on_gpu and events["reserved_bytes"].iloc[top] >= peak
    reserved = int(events["reserved_bytes"].iloc[top]) if known else peak
    rows = _weight_rows(weights, before) if before else []
    live = (blocks.start_us <= peak_us) & (peak_us < blocks.end_us)
    rows += _live_rows(blocks, live, _parts(trace, placed, blocks))
    accounted = sum(row["size_bytes"] for row in rows)
    rows.append(_row("other", OUTSIDE, peak - accounted))
    rows.append(_row("fragmentation", OUTSIDE, reserved - peak))
    frame = pd.DataFrame([row for row in rows if row["size_bytes"]])
    frame.insert(3, "share_percent", 100 * frame["size_bytes"] / reserved)
    notes = list(trace.notes)
    if not on_gpu:
        notes.append("a CPU reserves nothing ahead: there is no fragmentation to see")
    elif not known:
        notes.append("reserved memory was not recorded: fragmentation is unknown")
    if lower_bound:
        notes.insert(
            0,
            "the profiler recorded no totals: they are summed from the allocations and releases, and memory from before the"
            " trace is not in them",
        )
    return MemoryAccount(
        frame.sort_values("size_bytes", ascending=False, kind="stable").reset_index(drop=True),
        _alive(trace, blocks, live),
        _timeline(blocks, before, (total, events["time_us"].to_numpy())),
        _churn(trace, blocks),
        device,
        reserved,
        peak_us / 1e3,
        int(events["reserved_bytes"].max()) if known else -1,
        lower_bound,
        tuple(notes),
    )


def _totals(events: pd.DataFrame, weights_bytes: int, on_gpu: bool) -> tuple[np.ndarray, int, bool]:
    """Allocated bytes after each event, those before the first, and whether both are only lower bounds."""
    sizes = events["size_bytes"].to_numpy()
    change = np.cumsum(sizes)
    recorded = events["allocated_bytes"]
    offset = (recorded - change).where(recorded >= 0)
    if on_gpu and offset.notna().any():
        # Where single totals are missing, the last one known goes on with the sizes.
        offset = offset.ffill().bfill().to_numpy().astype(np.int64)
        total = change + offset
        before = int(total[0] - sizes[0])
        if before >= 0 and total.min() >= 0:
            return total, before, False
    released = max(0, -int(change.min()))
    before = max(weights_bytes, released)
    return before + change, before, on_gpu and not weights_bytes


def _row(part: str, component: str, size: int, blocks: int = 0) -> dict:
    return {"part": part, "component": component, "size_bytes": int(size), "blocks": blocks}


def _weight_rows(weights: dict[str, int], before: int) -> list[dict]:
    """Memory from before the capture, by the part of the pipeline that owns it; the remainder has no owner."""
    names = {
        "transformer": "expert_high" if "transformer_2" in weights else "expert",
        "transformer_2": "expert_low",
    }
    if (
        sum(weights.values()) > before or not weights
    ):  # some are on another device, or their owner was not recorded
        return [_row("weights", OUTSIDE, before)]
    return [_row("weights", names.get(part, part), size) for part, size in weights.items()]


def _parts(trace: Trace, placed: Attribution, blocks: Blocks) -> np.ndarray:
    """Part of every block: 0 activations, 1 workspace, 2 text embedding."""
    host = trace.host
    ends = (host["start_us"] + host["time_us"]).to_numpy()
    strong = np.isin(placed.own_kind, [KINDS.index(operators.LINEAR), KINDS.index(operators.ATTENTION)])
    product = inherit(np.where(strong, np.arange(len(host)), NOTHING), placed.parents, placed.by_depth)
    of_block = np.append(product, NOTHING)[blocks.event]
    given_back = blocks.end_us <= np.append(ends, -np.inf)[of_block]
    # A block that a product never frees is the workspace of a library's handle; its output is freed at some time.
    inside = (of_block != NOTHING) & (given_back | np.isinf(blocks.end_us))
    names = host["name"].astype(str).to_numpy()
    encoding, denoising = np.isin(names, ENCODERS), np.isin(names, EXPERTS)
    if not encoding.any() or not denoising.any():
        return np.where(inside, 1, 0)
    starts = host["start_us"].to_numpy()
    others = np.isin(names, [name for name in COMPONENTS if name not in ENCODERS])
    after = starts[others & (starts >= ends[encoding].max())]
    embedding = (blocks.start_us >= starts[encoding].min()) & (blocks.start_us < after.min(initial=np.inf))
    text = embedding & (blocks.end_us > starts[denoising].max())
    return np.select([inside, text], [1, 2], 0)


def _live_rows(blocks: Blocks, live: np.ndarray, part: np.ndarray) -> list[dict]:
    rows = []
    for number, name in enumerate(("activations", "workspace", "text_embedding")):
        for i, component in enumerate(COMPONENTS):
            selected = live & (part == number) & (blocks.component == i)
            if selected.any():
                rows.append(
                    _row(
                        name,
                        component,
                        int(blocks.size_bytes[selected].sum()),
                        int(np.count_nonzero(selected)),
                    )
                )
    return rows


def _alive(trace: Trace, blocks: Blocks, live: np.ndarray, most: int = 200) -> pd.DataFrame:
    rows = np.flatnonzero(live)
    rows = rows[np.argsort(-blocks.size_bytes[rows], kind="stable")][:most]
    return pd.DataFrame(
        {
            "size_mib": blocks.size_bytes[rows] / (1 << 20),
            "component": [COMPONENTS[i] for i in blocks.component[rows]],
            "range": blocks.names(trace, blocks.range[rows]),
            "operator": blocks.names(trace, blocks.operator[rows]),
            "allocated_ms": blocks.start_us[rows] / 1e3,
            "freed_ms": np.where(np.isinf(blocks.end_us[rows]), np.nan, blocks.end_us[rows] / 1e3),
        }
    )


def _timeline(blocks: Blocks, before: int, totals: tuple[np.ndarray, np.ndarray]) -> pd.DataFrame:
    """Bytes per component at the selected moments."""
    total, times = totals
    edges = np.linspace(times[0], times[-1], POINTS + 1)
    bins = np.searchsorted(edges, times, side="right")
    order = np.lexsort((total, bins))
    last = np.append(bins[order][1:] != bins[order][:-1], True)
    moments = np.sort(times[order[last]])
    table = {"time_ms": moments / 1e3, "before": np.full(len(moments), before)}
    for i, component in enumerate(COMPONENTS):
        own = blocks.component == i
        if own.any():
            in_use = np.zeros(len(moments))
            for at, sign in ((blocks.start_us[own], 1), (blocks.end_us[own], -1)):
                rank = np.argsort(at, kind="stable")
                sums = np.concatenate([[0], np.cumsum(blocks.size_bytes[own][rank])])
                in_use += sign * sums[np.searchsorted(at[rank], moments, side="right")]
            table[component] = in_use
    return pd.DataFrame(table)


def _churn(trace: Trace, blocks: Blocks) -> pd.DataFrame:
    starts = trace.steps["start_us"].to_numpy()[: trace.generation.get("settings", {}).get("steps")]
    step = np.maximum(np.searchsorted(starts, blocks.start_us, side="right") - 1, 0)
    freed_in = np.maximum(np.searchsorted(starts, blocks.end_us, side="right") - 1, 0)
    freed = np.where(np.isfinite(blocks.end_us) & (freed_in == step), blocks.size_bytes, 0)
    frame = pd.DataFrame(
        {
            "step": step,
            "component": [COMPONENTS[i] for i in blocks.component],
            "allocations": 1,
            "churn_gib": freed / GIB,
        }
    )
    return frame.groupby(["step", "component"], sort=False).sum().reset_index()
