"""Guidance interval: guidance at some noise levels only; elsewhere the branch with text is the prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec

from wanlab.models.spec import ModelSpec
from wanlab.techniques.guidance import BOTH_DECIDE, STANDS_OUTSIDE, WithoutText, only_sequential
from wanlab.techniques.technique import Bound, Proof, Shares, Technique, answered

if TYPE_CHECKING:
    import torch

    from wanlab.techniques.denoising import Call
    from wanlab.techniques.place import Place


class IntervalSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where guidance is computed.

    Attributes:
        low, high: noise levels sigma, 0 (clean) to 1 (noise), between which guidance is computed, both included.
    """

    low: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.3
    high: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0


class GuidanceInterval(Technique[IntervalSettings]):
    """Kynkäänniemi et al. 2024, "Applying guidance in a limited interval improves sample and distribution quality in
    diffusion models" (arXiv:2404.07724)."""

    name = "guidance_interval"
    does = "computes the branch without text at some noise levels only, and guides nowhere else"
    tier = "lossy"
    order = 31
    order_reason = STANDS_OUTSIDE
    not_with: ClassVar[Mapping[str, str]] = {"guidance_gate": BOTH_DECIDE}
    Settings = IntervalSettings

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        if self.settings.low > self.settings.high:
            return f"an interval whose low end {self.settings.low:g} is above its high end {self.settings.high:g}"
        return only_sequential(spec)

    def bound(self, shares: Shares) -> Bound:
        saved = shares.denoising / 2 if shares.branches == 2 else 0.0
        return Bound(saved, "half of the work of the steps outside the interval; here of all")

    def apply(self, place: Place) -> None:
        place.add(IntervalRule(self.settings))

    def proof(self, place: Place) -> Proof:
        calls = place.calls
        if not (calls["by"] == self.name).any():
            return Proof(
                False,
                f"{self.name} left out none of {len(calls)} calls: every step lies in the interval, or has no guidance.",
            )
        return Proof(True, f"{self.name} answered {answered(calls, self.name)}.")


class IntervalRule(WithoutText):
    """The interval of one generation."""

    name = GuidanceInterval.name

    def __init__(self, settings: IntervalSettings) -> None:
        self.settings = settings
        super().__init__()

    def leaves_out(self, call: Call) -> bool:
        return not self.settings.low <= call.timestep / 1000 <= self.settings.high

    def answer(self, call: Call, with_text: torch.Tensor) -> torch.Tensor:
        return with_text
