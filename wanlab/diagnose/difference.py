"""Difference of two flame graphs or breakdowns, row by row; the rows add up to the change of the wall clock."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from wanlab.core.errors import WanlabError
from wanlab.diagnose.breakdown import Breakdown
from wanlab.diagnose.flame import Flame, cpu_flame, gpu_flame
from wanlab.diagnose.trace import Trace

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
