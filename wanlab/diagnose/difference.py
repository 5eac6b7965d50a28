"""What changed between two flame graphs, stack by stack, with a sum that closes on the wall clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import pandas as pd

    from wanlab.diagnose.flame import Flame

UNCOVERED = "(idle, or running side by side)"
"""Wall clock less the sum of all stacks: positive where nothing ran, negative where threads or streams overlapped."""


@dataclass(frozen=True, eq=False)
class Difference:
    """Two flame graphs of one kind, laid over one another by stack.

    Attributes:
        frame: a row per stack of either: `path` (a tuple, outermost first), `before_us` and `after_us` (own time),
            `change_us`, `status` ("vanished", "new", "grew", "shrank", "same"); ordered by how much they changed.
            The `change_us` of all rows add up to `change_us` of the whole.
        before_us, after_us: wall clock of the two traces.
    """

    frame: pd.DataFrame
    before_us: float
    after_us: float

    @property
    def change_us(self) -> float:
        """Wall clock after less before."""
        return self.after_us - self.before_us

    def of(self, status: str) -> pd.DataFrame:
        """The rows of one status, largest change first."""
        return self.frame[self.frame["status"] == status]


def difference(before: Flame, after: Flame) -> Difference:
    """Compare two flame graphs, say before and after an optimisation.

    Raises:
        WanlabError: one is of the CPU, the other of the GPU.
    """
    import pandas as pd

    if before.kind != after.kind:
        raise WanlabError(f"a {before.kind} flame graph cannot be compared with one of the {after.kind}")
    own = [_own(flame) for flame in (before, after)]
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
    return Difference(frame.loc[order].reset_index(drop=True), before.wall_us, after.wall_us)


def _own(flame: Flame) -> dict[tuple[str, ...], float]:
    own = {
        path: float(time_us)
        for path, time_us in zip(flame.paths(), flame.frame["self_us"], strict=True)
        if path
    }
    own[(UNCOVERED,)] = flame.wall_us - flame.total_us
    return own


def _status(was: bool, there: bool, change_us: float) -> str:
    if not there:
        return "vanished"
    if not was:
        return "new"
    return "same" if change_us == 0 else "grew" if change_us > 0 else "shrank"
