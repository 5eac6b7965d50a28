"""The peak explained from a trace's allocations: what was alive at that moment, whose it was, and what was only reserved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.diagnose import operators
from wanlab.diagnose.attribution import COMPONENTS, EXPERTS, KINDS, OUTSIDE, attribute
from wanlab.diagnose.memory.blocks import Blocks, match
from wanlab.diagnose.stacks import NOTHING, inherit
from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from wanlab.diagnose.attribution import Attribution
    from wanlab.diagnose.trace import Trace

GIB = 1 << 30
POINTS = 1500
"""Moments of a timeline; of each stretch the one with the most memory is kept, so that no peak is lost."""


@dataclass(frozen=True, eq=False)
class MemoryAccount:
    """What a generation held at its peak, and when.

    Attributes:
        frame: rows that add up to `peak_bytes`: `part` ("weights", "activations", "workspace", "text_embedding",
            "fragmentation", "other": what was there before the capture and is no weight, and blocks too small for the
            trace), `component` (in which it was allocated; for weights whose they are),
            `size_bytes`, `share_percent`, `blocks`.
        blocks: the blocks alive at the peak, largest first: `size_mib`, `component`, `range`, `operator`,
            `allocated_ms`, `freed_ms` (NaN if not in the trace).
        timeline: `time_ms`, `before` (bytes that were there when the trace began) and a column of bytes per component.
        churn: per step and component: `step`, `component`, `allocations`, `churn_gib` (allocated and freed within it).
        device: "cuda:0" or "cpu".
        peak_bytes: what the process held of the device: on a GPU what the allocator had reserved when most was
            allocated, on a CPU what was allocated.
        peak_ms: when.
        reserved_peak_bytes: most that was ever reserved; -1 where nothing is.
        notes: what could not be told.
    """

    frame: pd.DataFrame
    blocks: pd.DataFrame
    timeline: pd.DataFrame
    churn: pd.DataFrame
    device: str
    peak_bytes: int
    peak_ms: float
    reserved_peak_bytes: int
    notes: tuple[str, ...]

    def size_bytes(self, part: str) -> int:
        """All rows of one part."""
        return int(self.frame.loc[self.frame["part"] == part, "size_bytes"].sum())

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
    attention that asked for it gave it back before it returned, or never (a library keeps that of its handle); a text
    embedding if it was made by the text encoder, or between that and the next component (inputs are prepared there,
    too), and was kept through denoising; an activation otherwise. What was there before the capture is weights: on a GPU
    the allocator's own total says how much, on a CPU the note of the capture does.

    Raises:
        WanlabError: the trace has no allocations.
    """
    import numpy as np
    import pandas as pd

    if trace.memory.empty:
        raise WanlabError(f"{trace.path} has no allocations; capture it with memory=True")
    device = next((d for d in trace.memory["device"].cat.categories if d.startswith("cuda")), "cpu")
    events = trace.memory[trace.memory["device"] == device].reset_index(drop=True)
    placed = attribute(trace)
    blocks = match(trace, events, placed)
    weights = trace.generation.get("weights_bytes", {})
    on_gpu = device != "cpu"
    before = (
        int(events["allocated_bytes"].iloc[0] - events["size_bytes"].iloc[0])
        if on_gpu
        else sum(weights.values())
    )
    total = (
        events["allocated_bytes"].to_numpy()
        if on_gpu
        else before + np.cumsum(events["size_bytes"].to_numpy())
    )
    top = int(np.argmax(total))
    peak_us, peak = float(events["time_us"].iloc[top]), int(total[top])
    reserved = int(events["reserved_bytes"].iloc[top]) if on_gpu else peak
    rows = _weight_rows(weights, before)
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
    return MemoryAccount(
        frame.sort_values("size_bytes", ascending=False, kind="stable").reset_index(drop=True),
        _alive(trace, blocks, live),
        _timeline(blocks, before, (total, events["time_us"].to_numpy())),
        _churn(trace, blocks),
        device,
        reserved,
        peak_us / 1e3,
        int(events["reserved_bytes"].max()) if on_gpu else -1,
        tuple(notes),
    )


def _row(part: str, component: str, size: int, blocks: int = 0) -> dict:
    return {"part": part, "component": component, "size_bytes": int(size), "blocks": blocks}


def _weight_rows(weights: dict[str, int], before: int) -> list[dict]:
    """What was there before the capture, by the part of the pipeline that owns it; the rest is nobody's."""
    names = {
        "transformer": "expert_high" if "transformer_2" in weights else "expert",
        "transformer_2": "expert_low",
    }
    if (
        sum(weights.values()) > before or not weights
    ):  # some are elsewhere, or nobody wrote down whose they are
        return [_row("weights", OUTSIDE, before)]
    return [_row("weights", names.get(part, part), size) for part, size in weights.items()]


def _parts(trace: Trace, placed: Attribution, blocks: Blocks) -> np.ndarray:
    """Part of every block: 0 activations, 1 workspace, 2 text embedding."""
    import numpy as np

    host = trace.host
    ends = (host["start_us"] + host["time_us"]).to_numpy()
    strong = np.isin(placed.own_kind, [KINDS.index(operators.LINEAR), KINDS.index(operators.ATTENTION)])
    product = inherit(np.where(strong, np.arange(len(host)), NOTHING), placed.parents, placed.by_depth)
    of_block = np.append(product, NOTHING)[blocks.event]
    given_back = blocks.end_us <= np.append(ends, -np.inf)[of_block]
    # What a product takes and never gives back is the workspace of a library's handle; its output is freed some time.
    inside = (of_block != NOTHING) & (given_back | np.isinf(blocks.end_us))
    names = host["name"].astype(str).to_numpy()
    encoding, denoising = names == "text_encoder", np.isin(names, EXPERTS)
    if not encoding.any() or not denoising.any():
        return np.where(inside, 1, 0)
    starts = host["start_us"].to_numpy()
    others = np.isin(names, [name for name in COMPONENTS if name != "text_encoder"])
    after = starts[others & (starts >= ends[encoding].max())]
    made = (blocks.start_us >= starts[encoding].min()) & (blocks.start_us < after.min(initial=np.inf))
    kept = made & (blocks.end_us > starts[denoising].max())
    return np.select([inside, kept], [1, 2], 0)


def _live_rows(blocks: Blocks, live: np.ndarray, part: np.ndarray) -> list[dict]:
    import numpy as np

    rows = []
    for number, name in enumerate(("activations", "workspace", "text_embedding")):
        for i, component in enumerate(COMPONENTS):
            mine = live & (part == number) & (blocks.component == i)
            if mine.any():
                rows.append(
                    _row(name, component, int(blocks.size_bytes[mine].sum()), int(np.count_nonzero(mine)))
                )
    return rows


def _alive(trace: Trace, blocks: Blocks, live: np.ndarray, most: int = 200) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

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
    """Bytes per component at the moments that matter."""
    import numpy as np
    import pandas as pd

    total, times = totals
    edges = np.linspace(times[0], times[-1], POINTS + 1)
    bins = np.searchsorted(edges, times, side="right")
    order = np.lexsort((total, bins))
    last = np.append(bins[order][1:] != bins[order][:-1], True)
    moments = np.sort(times[order[last]])
    table = {"time_ms": moments / 1e3, "before": np.full(len(moments), before)}
    for i, component in enumerate(COMPONENTS):
        mine = blocks.component == i
        if mine.any():
            held = np.zeros(len(moments))
            for at, sign in ((blocks.start_us[mine], 1), (blocks.end_us[mine], -1)):
                rank = np.argsort(at, kind="stable")
                sums = np.concatenate([[0], np.cumsum(blocks.size_bytes[mine][rank])])
                held += sign * sums[np.searchsorted(at[rank], moments, side="right")]
            table[component] = held
    return pd.DataFrame(table)


def _churn(trace: Trace, blocks: Blocks) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    starts = trace.steps["start_us"].to_numpy()
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
