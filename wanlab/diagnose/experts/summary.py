"""Summary of all measurements of a model's experts: one record and a few sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wanlab.diagnose.experts.boundary import BoundarySweep, Disagreement
from wanlab.diagnose.experts.switching import SwitchCost
from wanlab.diagnose.experts.timeline import Timeline


@dataclass(frozen=True, eq=False)
class ExpertSummary:
    """When each expert ran, the cost of a switch, the difference of predictions, and the effect of the boundary.

    Attributes:
        timeline, switch: the measurements.
        disagreement, boundaries: None with one expert, or if no other boundary was measured.
    """

    timeline: Timeline
    switch: SwitchCost
    disagreement: Disagreement | None = None
    boundaries: BoundarySweep | None = None

    def row(self) -> dict[str, Any]:
        """One flat record of all measurements."""
        parts = (self.timeline, self.switch, self.disagreement, self.boundaries)
        return {key: value for part in parts if part is not None for key, value in part.row().items()}

    def __str__(self) -> str:
        sentences = [f"{self.timeline}", self.switch.sentence]
        if self.disagreement is not None:
            sentences.append(f"{self.disagreement}")
        first, *others = sentences
        return ". ".join([first, *(text[:1].upper() + text[1:] for text in others)])
