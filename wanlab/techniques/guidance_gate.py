"""Guidance gate: late steps reuse the difference that guidance made, instead of computing the branch without text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec

from wanlab.models.spec import ModelSpec
from wanlab.techniques.guidance import BOTH_DECIDE, STANDS_OUTSIDE, WithoutText, only_sequential
from wanlab.techniques.technique import Bound, Proof, Shares, Technique, proof_of_skips

if TYPE_CHECKING:
    import torch

    from wanlab.techniques.denoising import Call
    from wanlab.techniques.place import Place


class GateSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the gate is.

    Attributes:
        after_percent: percent of the steps after which the branch without text is no longer computed.
    """

    after_percent: Annotated[float, msgspec.Meta(ge=0, lt=100)] = 50.0


class GuidanceGate(Technique[GateSettings]):
    """The branch without text becomes c - d, with c the branch with text of this step, and d the difference of both in the
    last step that computed them. As "LinearAG" in Castillo et al. 2023 (arXiv:2312.12487) with a constant difference. An
    expert that takes over computes both once, since the difference belongs to an expert and its guidance scale.
    """

    name = "guidance_gate"
    does = "stops computing the branch without text in late steps and keeps its last difference"
    tier = "lossy"
    order = 30
    order_reason = STANDS_OUTSIDE
    not_with: ClassVar[Mapping[str, str]] = {"guidance_interval": BOTH_DECIDE}
    Settings = GateSettings

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        return only_sequential(spec)

    def bound(self, shares: Shares) -> Bound:
        computed = min(math.ceil(self.settings.after_percent / 100 * shares.steps), shares.steps)
        saved = shares.denoising / 2 * (1 - computed / shares.steps) if shares.branches == 2 else 0.0
        return Bound(saved, f"half of the work of {shares.steps - computed} of {shares.steps} steps")

    def apply(self, place: Place) -> None:
        place.add(GateRule(self.settings))

    def proof(self, place: Place) -> Proof:
        return proof_of_skips(
            place.calls, self.name, "no step after the gate computes two branches of guidance"
        )


class GateRule(WithoutText):
    """The gate of one generation."""

    name = GuidanceGate.name

    def __init__(self, settings: GateSettings) -> None:
        self.settings = settings
        super().__init__()

    def begin(self) -> None:
        super().begin()
        self._apart: dict[str, torch.Tensor] = {}  # expert -> c - u of the last step that computed both

    def leaves_out(self, call: Call) -> bool:
        if call.first and call.branch == "cond":
            self._apart.pop(call.component, None)
        gate = math.ceil(self.settings.after_percent / 100 * call.steps)
        return call.step >= gate and call.component in self._apart

    def answer(self, call: Call, with_text: torch.Tensor) -> torch.Tensor:
        return with_text - self._apart[call.component]

    def learn(self, call: Call, with_text: torch.Tensor, without: torch.Tensor) -> None:
        self._apart[call.component] = with_text - without
