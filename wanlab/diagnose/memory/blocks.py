"""Allocations of a trace matched with their releases, each with the code that asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.diagnose import operators
from wanlab.diagnose.attribution import COMPONENTS, KINDS, OUTSIDE
from wanlab.diagnose.stacks import NOTHING, inherit, innermost, levels

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from wanlab.diagnose.attribution import Attribution
    from wanlab.diagnose.trace import Trace


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks that were allocated in a trace, one entry each, in order of time.

    Attributes:
        size_bytes: as the allocator counts it.
        start_us, end_us: of its life; infinity where it is not freed in the trace.
        event: innermost host event around the allocation, as a row of `trace.host`, -1 if none.
        range, operator: the named range and the operator around it, alike.
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

    A release of a block that was there before the trace has none and is left out.
    """
    import numpy as np

    start, size, end = [], [], []
    alive: dict[int, int] = {}
    addresses, sizes, times = (
        events[name].to_numpy().tolist() for name in ("address", "size_bytes", "time_us")
    )
    where = []
    for i, (address, bytes_, time) in enumerate(zip(addresses, sizes, times, strict=True)):
        if bytes_ > 0:
            if (
                old := alive.get(address)
            ) is not None:  # its release is not in the trace, but it must have been
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
    # What asks for memory is an operator, not the operator that only allocates.
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
    import numpy as np

    found = np.full(len(moments), NOTHING)
    host_threads = trace.host["thread"].to_numpy()
    for thread in np.unique(threads):
        rows = np.flatnonzero(host_threads == thread)
        mine = threads == thread
        if len(rows):
            offset = rows[0]  # the rows of a thread lie together
            parents = np.where(placed.parents[rows] == NOTHING, NOTHING, placed.parents[rows] - offset)
            times, which = innermost(trace.host.iloc[rows], parents, levels(parents))
            place = np.searchsorted(times, moments[mine], side="right") - 1
            inner = np.where(place >= 0, which[np.maximum(place, 0)], NOTHING)
            found[mine] = np.where(inner == NOTHING, NOTHING, inner + offset)
    return found
