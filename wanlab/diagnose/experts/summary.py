"""What was measured of the experts of a model, in one record and a few sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wanlab.diagnose.experts.boundary import BoundarySweep, Disagreement
from wanlab.diagnose.experts.switching import SwitchCost
from wanlab.diagnose.experts.timeline import Timeline


@dataclass(frozen=True, eq=False)
class ExpertSummary:
    """Which expert ran when, what a switch costs, how far they differ, what another boundary does.

    Attributes:
        timeline, switch: as measured.
        disagreement, boundaries: None where there is one expert, or no other boundary was tried.
    """

    timeline: Timeline
    switch: SwitchCost
    disagreement: Disagreement | None = None
    boundaries: BoundarySweep | None = None

    def row(self) -> dict[str, Any]:
        """The records of all of them as one."""
        parts = (self.timeline, self.switch, self.disagreement, self.boundaries)
        return {key: value for part in parts if part is not None for key, value in part.row().items()}

    def __str__(self) -> str:
        sentences = [f"{self.timeline}", self.switch.sentence]
        if self.disagreement is not None:
            sentences.append(f"{self.disagreement}")
        first, *others = sentences
        return ". ".join([first, *(text[:1].upper() + text[1:] for text in others)])
