"""Where the wall clock of a trace went: shares that add up, what ran side by side, the work done, the bounds.

Every moment of the trace is given to one category. While the GPU works it is that of the running kernel (arithmetic
before copies, where both run); while the GPU waits, or there is none, it is what the host's main thread is at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.diagnose.attribution import COMPONENTS, EXPERTS, OUTSIDE, Attribution, attribute
from wanlab.diagnose.categories import (
    CATEGORIES,
    INDEX,
    category_of,
    host_categories,
    kernel_categories,
    waiting_categories,
)
from wanlab.diagnose.stacks import NOTHING, innermost, levels

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from wanlab.diagnose.trace import Trace

GAP_US = 10.0


@dataclass(frozen=True, eq=False)
class Breakdown:
    """Where the time went.

    Attributes:
        frame: a row per category that took time, largest first: `category`, `time_ms` (wall clock given to it alone; all
            rows add up to `wall_ms`), `share_percent`, `hidden_ms` (more GPU time of it, beside kernels of another row),
            `calls` (kernels, on a CPU operators), `tflop` and `moved_gb` (from recorded shapes; 0 where unknown),
            `format` (numbers of most of that work), `tflop_per_s`, `gb_per_s`, `amdahl_bound` (speed-up of the whole if
            this row cost nothing).
        parts: component x category: `component`, `category`, `time_ms`, `tflop`.
        wall_ms: of the trace's window.
        recorded_ms: wall clock of the generation as the capture itself took it, None if the file does not say.
        gpu: `busy_percent`, `kernels`, `launch_gaps` (over 10 µs), `launch_gap_median_us`, `launch_gap_ms` (all);
            empty without a GPU.
        host_busy_percent: of the wall clock the main thread was in an operator or runtime call.
        notes: what could not be told apart.
    """

    frame: pd.DataFrame
    parts: pd.DataFrame
    wall_ms: float
    recorded_ms: float | None
    gpu: dict[str, float]
    host_busy_percent: float
    notes: tuple[str, ...]

    @property
    def closes_percent(self) -> float:
        """How far the rows miss the wall clock: of the generation where it was recorded, else of the trace."""
        wall = self.recorded_ms or self.wall_ms
        return 100 * (self.frame["time_ms"].sum() / wall - 1)

    def __str__(self) -> str:
        if not self.gpu:
            return f"the host is in operators {self.host_busy_percent:.0f} % of the time"
        return (
            f"the GPU is busy {self.gpu['busy_percent']:.1f} % of the time, with {self.gpu['kernels']:,} kernels and "
            f"{self.gpu['launch_gaps']:,} gaps over {GAP_US:.0f} µs"
        )

    def share_percent(self, category: str) -> float:
        """Share of a category, 0 if it took no time."""
        row = self.frame[self.frame["category"] == category]
        return float(row["share_percent"].iloc[0]) if len(row) else 0.0

    def experts(self) -> pd.DataFrame:
        """Each expert's own time and work: component, category, time_ms, tflop, share_percent (of the component's
        time), flop_percent (of its operations)."""
        table = self.parts[self.parts["component"].isin(EXPERTS)].copy()
        whole = table.groupby("component")[["time_ms", "tflop"]].transform("sum")
        table["share_percent"] = 100 * table["time_ms"] / whole["time_ms"]
        table["flop_percent"] = 100 * table["tflop"] / whole["tflop"]
        return table.reset_index(drop=True)

    def row(self) -> dict[str, float]:
        """Everything as one flat record: wall_ms, <category>_percent, gpu_busy_percent, host_busy_percent, kernels..."""
        shares = {f"{name}_percent": self.share_percent(name) for name in CATEGORIES}
        gpu = {f"gpu_{name}" if name == "busy_percent" else name: value for name, value in self.gpu.items()}
        return {
            "wall_ms": self.wall_ms,
            "closes_percent": self.closes_percent,
            "host_busy_percent": self.host_busy_percent,
            **gpu,
            **shares,
        }


def breakdown(trace: Trace) -> Breakdown:
    """Divide the wall clock of a trace among the categories; see `Breakdown`.

    A VAE or text encoder is one row, whatever its operators; inside experts an operator is told by its kind and by
    the attention module around it. Where the trace has no named ranges, everything counts as an expert's.
    """
    import numpy as np

    placed = attribute(trace)
    window, kernels = trace.window_us, trace.kernels
    begins = kernels["start_us"].to_numpy()
    begins, ends = np.clip(begins, *window), np.clip(begins + kernels["time_us"].to_numpy(), *window)
    times, inner = _main_thread(trace, placed)
    marks = np.unique(np.concatenate([window, np.clip(times, *window), begins, ends]))
    stretch_us = np.diff(marks)

    event = _at(marks[:-1], times, inner)
    category = np.append(host_categories(trace, placed), INDEX["launch_and_idle"])[event]
    component = np.append(placed.component, NOTHING)[event]
    busy = np.append(placed.own_kind != NOTHING, False)[event]
    of_kernel, component_of_kernel = kernel_categories(trace, placed)
    running = np.full(len(stretch_us), NOTHING)
    if trace.has_gpu:
        running, which = _running(marks, begins, ends, of_kernel, component_of_kernel)
        category = np.where(running != NOTHING, running, waiting_categories(category))
        component = np.where(running != NOTHING, which, component)
    component = np.where(component == NOTHING, COMPONENTS.index(OUTSIDE), component)
    table_us = np.zeros((len(COMPONENTS), len(CATEGORIES)))
    np.add.at(table_us, (component, category), stretch_us)
    alone_us = np.bincount(running + 1, weights=stretch_us, minlength=len(CATEGORIES) + 1)[1:]
    work = category_of(placed.component, placed.attention, placed.kind)
    work[placed.selecting] = INDEX["expert_switching"]
    notes = list(trace.notes)
    if not placed.has_ranges:
        notes.append("no named ranges: components, and self- from cross-attention, cannot be told apart")
    return Breakdown(
        _frame(trace, placed, work, table_us.sum(axis=0), alone_us, of_kernel),
        _parts(table_us, placed, work),
        trace.wall_us / 1e3,
        trace.generation.get("wall_ms"),
        _gpu(begins, ends, trace.wall_us) if trace.has_gpu else {},
        100 * float(stretch_us[busy].sum()) / trace.wall_us,
        tuple(notes),
    )


def _at(moments: np.ndarray, times: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Which event is the innermost at each moment, -1 for none."""
    import numpy as np

    if not len(times):
        return np.full(len(moments), NOTHING)
    place = np.searchsorted(times, moments, side="right") - 1
    return np.where(place >= 0, inner[np.maximum(place, 0)], NOTHING)


def _main_thread(trace: Trace, placed: Attribution) -> tuple[np.ndarray, np.ndarray]:
    """What the busiest host thread is at, as `stacks.innermost` gives it, with rows of `trace.host`."""
    import numpy as np

    host = trace.host
    if host.empty:
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    outer = placed.parents == NOTHING
    per_thread = host[outer].groupby("thread")["time_us"].sum()
    rows = np.flatnonzero((host["thread"] == per_thread.idxmax()).to_numpy())
    offset = rows[0]  # the rows of a thread lie together
    parents = np.where(placed.parents[rows] == NOTHING, NOTHING, placed.parents[rows] - offset)
    times, which = innermost(host.iloc[rows], parents, levels(parents))
    return times, np.where(which == NOTHING, NOTHING, which + offset)


def _running(marks, begins, ends, category, component) -> tuple[np.ndarray, np.ndarray]:
    """Category and component of what the GPU runs in each stretch between marks, -1 where it waits."""
    import numpy as np

    component = np.where(component == NOTHING, COMPONENTS.index(OUTSIDE), component)
    pairs, code = np.unique(category * len(COMPONENTS) + component, return_inverse=True)
    running = np.full(len(marks) - 1, NOTHING)
    which = np.full(len(marks) - 1, NOTHING)
    first, last = np.searchsorted(marks, begins), np.searchsorted(marks, ends)
    for i in range(len(pairs) - 1, -1, -1):  # the categories that come first are written last
        mine = code == i
        change = np.zeros(len(marks), dtype=np.int64)
        np.add.at(change, first[mine], 1)
        np.add.at(change, last[mine], -1)
        active = np.cumsum(change)[:-1] > 0
        running[active], which[active] = divmod(int(pairs[i]), len(COMPONENTS))
    return running, which


def _frame(
    trace: Trace,
    placed: Attribution,
    work: np.ndarray,
    time_us: np.ndarray,
    alone_us: np.ndarray,
    of_kernel: np.ndarray,
) -> pd.DataFrame:
    """The rows of `Breakdown.frame`.

    Args:
        work: category of the work of every host event.
        time_us, alone_us: per category, of the wall clock and of it while its kernels ran.
        of_kernel: category of every kernel.
    """
    import numpy as np
    import pandas as pd

    n, wall_us = len(CATEGORIES), trace.wall_us
    if trace.has_gpu:
        spent_us = np.bincount(of_kernel, weights=trace.kernels["time_us"].to_numpy(), minlength=n)
        calls = np.bincount(of_kernel, minlength=n)
        hidden_us = np.maximum(spent_us - alone_us, 0.0)
    else:
        spent_us, hidden_us = time_us, np.zeros(n)
        calls = np.bincount(host_categories(trace, placed)[placed.own_kind != NOTHING], minlength=n)
    flop = np.bincount(work, weights=placed.flop, minlength=n)
    moved = np.bincount(work, weights=placed.moved_bytes, minlength=n)
    if trace.has_gpu:  # of a copy the bytes are known
        copied = (
            trace.kernels["size_bytes"].to_numpy() * (trace.kernels["category"] == "gpu_memcpy").to_numpy()
        )
        moved = moved + np.bincount(of_kernel, weights=copied, minlength=n)
    rows = []
    for i, name in enumerate(CATEGORIES):
        if time_us[i] <= 0 and hidden_us[i] <= 0:
            continue
        seconds = spent_us[i] / 1e6
        rows.append(
            {
                "category": name,
                "time_ms": time_us[i] / 1e3,
                "share_percent": 100 * time_us[i] / wall_us,
                "hidden_ms": hidden_us[i] / 1e3,
                "calls": int(calls[i]),
                "tflop": flop[i] / 1e12,
                "moved_gb": moved[i] / 1e9,
                "format": _format(placed, work == i),
                "tflop_per_s": flop[i] / 1e12 / seconds if seconds and flop[i] else np.nan,
                "gb_per_s": moved[i] / 1e9 / seconds if seconds and moved[i] else np.nan,
                "amdahl_bound": wall_us / (wall_us - time_us[i]) if time_us[i] < wall_us else np.inf,
            }
        )
    return pd.DataFrame(rows).sort_values("time_ms", ascending=False, kind="stable").reset_index(drop=True)


def _format(placed: Attribution, mine: np.ndarray) -> str:
    """Number format of most of the operations, or of most of the bytes where there are none."""
    import pandas as pd

    weight = placed.flop if placed.flop[mine].any() else placed.moved_bytes
    totals = pd.Series(weight[mine]).groupby(placed.format[mine]).sum()
    totals = totals[(totals > 0) & (totals.index != "")]
    return str(totals.idxmax()) if len(totals) else ""


def _parts(table_us: np.ndarray, placed: Attribution, work: np.ndarray) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    flop = np.zeros_like(table_us)
    component = np.where(placed.component == NOTHING, COMPONENTS.index(OUTSIDE), placed.component)
    np.add.at(flop, (component, work), placed.flop)
    rows = [
        {"component": name, "category": category, "time_ms": table_us[i, j] / 1e3, "tflop": flop[i, j] / 1e12}
        for i, name in enumerate(COMPONENTS)
        for j, category in enumerate(CATEGORIES)
        if table_us[i, j] > 0
    ]
    return pd.DataFrame(rows)


def _gpu(begins: np.ndarray, ends: np.ndarray, wall_us: float) -> dict[str, float]:
    """How full the GPU was: any kernel, copy or fill on any stream counts."""
    import numpy as np

    order = np.argsort(begins, kind="stable")
    reached = np.maximum.accumulate(ends[order])
    gaps = np.maximum(begins[order][1:] - reached[:-1], 0.0)
    busy = reached[-1] - begins.min() - gaps.sum()
    waits = gaps[gaps > GAP_US]
    return {
        "busy_percent": 100 * float(busy) / wall_us,
        "kernels": len(begins),
        "launch_gaps": len(waits),
        "launch_gap_median_us": float(np.median(gaps)) if len(gaps) else 0.0,
        "launch_gap_ms": float(gaps.sum()) / 1e3,
    }
