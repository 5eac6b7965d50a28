"""Flame graphs of a trace: time by stack, with the same totals as the trace; and the difference of two.

The CPU graph nests the host's events of each thread by time. The GPU graph puts every kernel below the host
stack that launched it (found by correlation id), so that a kernel is below its module, operator and call.
Formats of the exports: folded stacks (Gregg, "Flame Graphs", 2011) and speedscope's file format 0.0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from wanlab.core.errors import WanlabError
from wanlab.core.words import time_text
from wanlab.diagnose.breakdown import CATEGORY_NAMES, Breakdown
from wanlab.diagnose.trace import NOTHING, Trace, launchers, nest
from wanlab.diagnose.trace_events import STEP_PREFIX

NOT_LAUNCHED = "(launch not in the trace)"


@dataclass(frozen=True, eq=False)
class Flame:
    """A flame graph: a tree of stacks.

    Attributes:
        frame: one row per node, parents before children: `name`, `parent` (row number, -1 at the top),
            `depth`, `total_us`, `self_us`, `count` (events). Row 0 is the root.
        kind: `"cpu"` or `"gpu"`.
        wall_us: wall clock of the trace, from the start of its first event to the end of its last.
    """

    frame: pd.DataFrame
    kind: str
    wall_us: float

    @property
    def total_us(self) -> float:
        return float(self.frame["total_us"].iloc[0])

    def paths(self) -> list[tuple[str, ...]]:
        """The stack of every node, outermost first, without the root."""
        stacks: list[tuple[str, ...]] = []
        for name, parent in zip(self.frame["name"], self.frame["parent"], strict=True):
            stacks.append((*stacks[parent], name) if parent >= 0 else ())
        return stacks

    def folded(self) -> str:
        """Folded stacks, `a;b;c microseconds` per line, as read by flamegraph.pl and speedscope."""
        lines = []
        for path, self_us in zip(self.paths(), self.frame["self_us"], strict=True):
            if path and round(self_us) > 0:
                lines.append(f"{';'.join(part.replace(';', ':') for part in path)} {round(self_us)}")
        return "\n".join(lines) + "\n"

    def own_time(self) -> pd.DataFrame:
        """Own time by name over all stacks, largest first: name, self_ms, share_percent (of the total), count."""
        table = self.frame.iloc[1:].groupby("name", sort=False)[["self_us", "count"]].sum()
        table = table[table["self_us"] > 0].sort_values("self_us", ascending=False).reset_index()
        table.insert(1, "self_ms", table["self_us"] / 1e3)
        table.insert(2, "share_percent", 100 * table["self_us"] / (self.total_us or 1.0))
        return table.drop(columns="self_us")

    def speedscope(self, name: str) -> dict:
        """A sampled profile in speedscope's JSON format, one weighted sample per stack."""
        names = list(dict.fromkeys(self.frame["name"].iloc[1:]))
        number = {text: i for i, text in enumerate(names)}
        stacks = [
            ([number[part] for part in path], float(self_us))
            for path, self_us in zip(self.paths(), self.frame["self_us"], strict=True)
            if path and self_us > 0
        ]
        return {
            "$schema": "https://www.speedscope.app/file-format-schema.json",
            "shared": {"frames": [{"name": text} for text in names]},
            "profiles": [
                {
                    "type": "sampled",
                    "name": f"{name} ({self.kind})",
                    "unit": "microseconds",
                    "startValue": 0,
                    "endValue": sum(weight for _, weight in stacks),
                    "samples": [stack for stack, _ in stacks],
                    "weights": [weight for _, weight in stacks],
                }
            ],
        }


@dataclass(frozen=True, eq=False)
class Flames:
    """Both flame graphs of a trace.

    Attributes:
        cpu, gpu: None where the trace has no events of that kind.
        notes: why one is missing, and other limits of the trace.
    """

    cpu: Flame | None
    gpu: Flame | None
    notes: str

    @property
    def main(self) -> Flame:
        """The GPU's graph if there is one, else the host's."""
        return self.gpu or self.cpu

    def own_time(self, side: str, rows: int = 12) -> pd.DataFrame | None:
        """The frames with the most own time, of `"cpu"` or `"gpu"`; None where that side is missing."""
        flame = {"cpu": self.cpu, "gpu": self.gpu}[side]
        return None if flame is None else flame.own_time().head(rows).round(3)

    def row(self) -> dict[str, Any]:
        """Flat record: flame_ms, wall_ms, and the frame with the most own time."""
        flame = self.main
        totals = {"flame_ms": flame.total_us / 1e3, "wall_ms": flame.wall_us / 1e3}
        return totals | flame.own_time().iloc[0].to_dict()


def flames(trace: Trace, *, by_step: bool = False) -> Flames:
    """All flame graphs of a trace; arguments as in `cpu_flame`.

    Raises:
        WanlabError: the trace has neither CPU nor GPU events.
    """
    gpu = gpu_flame(trace, by_step=by_step) if trace.has_gpu else None
    cpu = cpu_flame(trace, by_step=by_step) if len(trace.host) or gpu is None else None
    return Flames(cpu, gpu, "; ".join(trace.notes))


def cpu_flame(trace: Trace, *, by_step: bool = False) -> Flame:
    """Host time of all threads by stack; the total is the sum of each thread's outermost events.

    Args:
        by_step: keep the profiler's steps as the outermost frames; else equal stacks of all steps are added.

    Raises:
        WanlabError: the trace has no host events.
    """
    host = _host_events(trace, by_step)
    if host.empty:
        raise WanlabError(f"{trace.path} has no CPU events; capture it with ProfilerActivity.CPU")
    parents = nest(host)
    tree = _Tree()
    names = host["name"].astype(str).to_numpy()
    times = host["time_us"].to_numpy()
    nodes = _place(tree, names, parents)
    for node, time_us in zip(nodes, times, strict=True):
        tree.total[node] += time_us
        tree.count[node] += 1
    return Flame(tree.frame(inclusive=True), "cpu", trace.wall_us)


def gpu_flame(trace: Trace, *, by_step: bool = False) -> Flame:
    """GPU time by the host stack that launched it, down to the kernel; the total is the sum of the kernels.

    Args:
        by_step: as in `cpu_flame`.

    Raises:
        WanlabError: the trace has no GPU events.
    """
    kernels = trace.kernels
    if kernels.empty:
        raise WanlabError(f"{trace.path} has no GPU events; look at its CPU flame graph")
    host = _host_events(trace, by_step)
    parents = nest(host)
    tree = _Tree()
    nodes = _place(tree, host["name"].astype(str).to_numpy(), parents)
    lost = None
    for name, launch, time_us in zip(
        kernels["name"].astype(str), launchers(host, kernels).tolist(), kernels["time_us"], strict=True
    ):
        if launch == NOTHING:
            lost = tree.child(0, NOT_LAUNCHED) if lost is None else lost
            above = lost
        else:
            # The runtime call is left out: the kernel is placed directly below the event that made the call.
            above = nodes[parents[launch]] if parents[launch] >= 0 else 0
        node = tree.child(above, name)
        tree.total[node] += time_us
        tree.count[node] += 1
    return Flame(tree.frame(inclusive=False), "gpu", trace.wall_us)


def _host_events(trace: Trace, by_step: bool) -> pd.DataFrame:
    host = trace.host
    if by_step:
        return host
    names = host["name"].cat.categories
    return host[~host["name"].isin(names[names.str.startswith(STEP_PREFIX)])].reset_index(drop=True)


class _Tree:
    """Nodes by (parent, name); node 0 is the root."""

    def __init__(self) -> None:
        self.names, self.parents, self.total, self.count = ["all"], [-1], [0.0], [0]
        self._children: dict[tuple[int, str], int] = {}

    def child(self, parent: int, name: str) -> int:
        key = (parent, name)
        node = self._children.get(key)
        if node is None:
            node = self._children[key] = len(self.names)
            self.names.append(name)
            self.parents.append(parent)
            self.total.append(0.0)
            self.count.append(0)
        return node

    def frame(self, *, inclusive: bool) -> pd.DataFrame:
        """The table of `Flame`. `inclusive`: `total` already has the whole time of a node, else only its own time."""
        total, parents = np.array(self.total), np.array(self.parents)
        children = np.zeros_like(total)
        depth = np.zeros(len(total), dtype=int)
        for node in range(1, len(total)):
            depth[node] = depth[parents[node]] + 1
        if inclusive:
            np.add.at(children, parents[1:], total[1:])
            total[0] = children[0]
            own = np.maximum(total - children, 0.0)
            own[0] = 0.0
        else:
            own = total.copy()
            for node in range(len(total) - 1, 0, -1):
                total[parents[node]] += total[node]
        table = pd.DataFrame(
            {
                "name": self.names,
                "parent": parents,
                "depth": depth,
                "total_us": total,
                "self_us": own,
                "count": self.count,
            }
        )
        # Nodes that only host events created, without GPU time below, are dropped from a GPU graph.
        return table if inclusive else _without_empty(table)


def _without_empty(table: pd.DataFrame) -> pd.DataFrame:
    nonempty = (table["total_us"] > 0).to_numpy(copy=True)
    nonempty[0] = True
    renumbered = np.cumsum(nonempty) - 1
    table = table[nonempty].reset_index(drop=True)
    above = table["parent"].to_numpy()
    table["parent"] = np.where(above >= 0, renumbered[np.maximum(above, 0)], -1)
    return table


def _place(tree: _Tree, names: np.ndarray, parents: np.ndarray) -> list[int]:
    """The node of every event; parents come before children."""
    nodes: list[int] = []
    for name, parent in zip(names.tolist(), parents.tolist(), strict=True):
        nodes.append(tree.child(nodes[parent] if parent >= 0 else 0, name))
    return nodes


UNCOVERED = "(idle, or running side by side)"
"""Wall clock minus the sum of all stacks: positive where nothing ran, negative where threads or streams overlapped."""
KEYS = ("stack", "name")


@dataclass(frozen=True, eq=False)
class Difference:
    """Difference of two profiles.

    Attributes:
        frame: one row per stack, name or category of either: `path` (a tuple, outermost first), `before_us` and
            `after_us` (own time), `change_us`, `status` ("vanished", "new", "grew", "shrank", "same"), largest change
            first. The `change_us` of all rows add up to `change_us` of the whole.
        before_us, after_us: wall clock of the two traces.
    """

    frame: pd.DataFrame
    before_us: float
    after_us: float

    @property
    def change_us(self) -> float:
        """Wall clock after minus wall clock before."""
        return self.after_us - self.before_us

    @property
    def headline(self) -> str:
        """Which trace is shorter, by how much, and the row that changed most."""
        percent, word = 100 * self.change_us / self.before_us, "longer" if self.change_us > 0 else "shorter"
        most = self.frame.iloc[0]
        name = CATEGORY_NAMES.get(most["path"][-1], most["path"][-1])
        return (
            f"The second trace is {abs(percent):.1f} % {word}: {time_text(self.after_us / 1e3)} after"
            f" {time_text(self.before_us / 1e3)}. Most changed {name}, by {time_text(most['change_us'] / 1e3)}."
            " Each was recorded once, so noise is not known."
        )

    def of(self, status: str) -> pd.DataFrame:
        """The rows of one status, largest change first."""
        return self.frame[self.frame["status"] == status]


def difference(before: Flame | Breakdown, after: Flame | Breakdown, *, by: str = "stack") -> Difference:
    """Compare two profiles, for example before and after an optimisation.

    Args:
        before, after: two flame graphs of one kind, or two breakdowns.
        by: key of the rows of flame graphs: "stack" is the whole stack; "name" is the outermost and the innermost
            frame, which stay the same when the frames between them change (compilation, fusion).

    Raises:
        WanlabError: a CPU and a GPU graph, a breakdown and a flame graph, or an unknown `by`.
    """
    if by not in KEYS:
        raise WanlabError(f"by is {' or '.join(map(repr, KEYS))}, not {by!r}")
    kinds = [profile.kind if isinstance(profile, Flame) else "breakdown" for profile in (before, after)]
    if kinds[0] != kinds[1]:
        raise WanlabError(
            f"two profiles of one kind are compared, not one of {kinds[0]} and one of {kinds[1]}"
        )
    own = [_own(profile, by) for profile in (before, after)]
    paths = list(dict.fromkeys([*own[0], *own[1]]))
    frame = pd.DataFrame(
        {
            "path": paths,
            "before_us": [own[0].get(path, 0.0) for path in paths],
            "after_us": [own[1].get(path, 0.0) for path in paths],
        }
    )
    frame["change_us"] = frame["after_us"] - frame["before_us"]
    frame["status"] = [
        _status(path in own[0], path in own[1], change)
        for path, change in zip(paths, frame["change_us"], strict=True)
    ]
    order = frame["change_us"].abs().sort_values(ascending=False, kind="stable").index
    walls = [_wall_us(profile) for profile in (before, after)]
    return Difference(frame.loc[order].reset_index(drop=True), *walls)


def flame_differences(before: Trace, after: Trace) -> tuple[Difference, Difference]:
    """Differences of two traces by function or kernel, and by stack: of the GPUs where both have one, else of the hosts."""
    graph = gpu_flame if before.has_gpu and after.has_gpu else cpu_flame
    pair = graph(before), graph(after)
    return difference(*pair, by="name"), difference(*pair)


def _wall_us(profile: Flame | Breakdown) -> float:
    return profile.wall_us if isinstance(profile, Flame) else 1e3 * profile.wall_ms


def _own(profile: Flame | Breakdown, by: str) -> dict[tuple[str, ...], float]:
    if isinstance(profile, Breakdown):
        rows = zip(profile.frame["category"], profile.frame["time_ms"], strict=True)
        return {(category,): 1e3 * time_ms for category, time_ms in rows}
    own: dict[tuple[str, ...], float] = {}
    for path, time_us in zip(profile.paths(), profile.frame["self_us"], strict=True):
        if path:
            key = path if by == "stack" or len(path) < 3 else (path[0], path[-1])
            own[key] = own.get(key, 0.0) + float(time_us)
    own[(UNCOVERED,)] = profile.wall_us - profile.total_us
    return own


def _status(in_before: bool, in_after: bool, change_us: float) -> str:
    if not in_after:
        return "vanished"
    if not in_before:
        return "new"
    return "same" if change_us == 0 else "grew" if change_us > 0 else "shrank"
