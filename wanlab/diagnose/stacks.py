"""Stacks of host events: what encloses what, what a part inherits from what is above it, and who launched a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanlab.diagnose.trace import RUNTIME_CATEGORIES

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

NOTHING = -1


def nest(events: pd.DataFrame) -> np.ndarray:
    """For every event the position of the event of its thread that encloses it, -1 for the outermost.

    Args:
        events: ordered as `Trace.events`: by thread, start and falling end.

    An event that outlasts the one it starts in (clocks of two sources, rounded) counts as inside it.
    """
    import numpy as np

    threads = events["thread"].to_numpy().tolist()
    starts = events["start_us"].to_numpy().tolist()
    ends = (events["start_us"] + events["time_us"]).to_numpy().tolist()
    parents = np.full(len(starts), NOTHING, dtype=np.int64)
    stack: list[int] = []
    current = None
    for i, (thread, start) in enumerate(zip(threads, starts, strict=True)):
        if thread != current:
            current = thread
            stack.clear()
        while stack and ends[stack[-1]] <= start:
            stack.pop()
        if stack:
            parents[i] = stack[-1]
        stack.append(i)
    return parents


def levels(parents: np.ndarray) -> list[np.ndarray]:
    """Positions of the events by depth, the outermost first."""
    import numpy as np

    depth = np.full(len(parents), NOTHING)
    found, here = [], np.flatnonzero(parents == NOTHING)
    while len(here):
        depth[here] = len(found)
        found.append(here)
        above = np.where(parents == NOTHING, NOTHING, depth[parents])
        here = np.flatnonzero((above == len(found) - 1) & (depth == NOTHING))
    return found


def inherit(values: np.ndarray, parents: np.ndarray, by_depth: list[np.ndarray]) -> np.ndarray:
    """Every event's own value, or that of the nearest event above that has one; -1 is none."""
    import numpy as np

    values = values.copy()
    for here in by_depth[1:]:
        values[here] = np.where(values[here] == NOTHING, values[parents[here]], values[here])
    return values


def launchers(host: pd.DataFrame, kernels: pd.DataFrame) -> np.ndarray:
    """For every kernel the position among the host events of the runtime call that launched it, or -1."""
    import numpy as np

    calls = np.flatnonzero(host["category"].isin(RUNTIME_CATEGORIES).to_numpy())
    numbers = host["correlation"].to_numpy()[calls]
    order = np.argsort(numbers, kind="stable")
    calls, numbers = calls[order], numbers[order]
    wanted = kernels["correlation"].to_numpy()
    if not len(numbers):
        return np.full(len(wanted), NOTHING)
    place = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
    return np.where((numbers[place] == wanted) & (wanted != 0), calls[place], NOTHING)


def innermost(
    events: pd.DataFrame, parents: np.ndarray, by_depth: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """One thread's events as a sequence: from `times[i]` on, `events` row `which[i]` is the innermost (-1: none).

    Args:
        events: of one thread, with `parents` and `by_depth` of the same rows.
    """
    import numpy as np

    starts = events["start_us"].to_numpy()
    ends = starts + events["time_us"].to_numpy()
    depth = np.zeros(len(starts), dtype=np.int64)
    for level, here in enumerate(by_depth):
        depth[here] = level
        if level:
            ends[here] = np.minimum(ends[here], ends[parents[here]])
    # An event of no length is never the innermost of a stretch of time.
    lasting = np.flatnonzero(ends > starts)
    times = np.concatenate([ends[lasting], starts[lasting]])
    which = np.concatenate([parents[lasting], lasting])
    opens = np.repeat([0, 1], len(lasting))
    # At one moment ends come before starts, inner ends before outer ones, outer starts before inner ones.
    order = np.lexsort((np.concatenate([-depth[lasting], depth[lasting]]), opens, times))
    return times[order], which[order]
