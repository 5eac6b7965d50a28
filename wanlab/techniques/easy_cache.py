"""EasyCache: a step whose prediction has hardly changed is answered from the last one that was computed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec

from wanlab.techniques.technique import Bound, Proof, Shares, Technique, proof_of_skips

if TYPE_CHECKING:
    import torch

    from wanlab.techniques.denoising import Call, Inner
    from wanlab.techniques.place import Place

FULL_FIRST = 2
"""Calls of an expert that are computed after it takes over: the change per step is known after two."""


class CacheSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a call is skipped.

    Attributes:
        threshold: sum of the predicted relative changes up to which calls are skipped; 0.05 to 0.2 in publications.
        first_percent: percent of the steps, from the first, that are computed.
    """

    threshold: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.05
    first_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 20.0


class EasyCache(Technique[CacheSettings]):
    """Zhou et al. 2025, "Less is enough: training-free video diffusion acceleration via runtime-adaptive caching"
    (arXiv:2507.02860), started anew when another expert takes over.

    With x the latents that a call takes and y what it predicts, the relative change of y since the last computed call is
    estimated as k |x - x'| / |y'|, where the primes are values of the step before and k = |dy| / |dx| of the last two
    computed calls. Estimates add up; while their sum is below the threshold, x + (y_c - x_c) of the last computed call is
    the answer. The branch with the text decides for both.
    """

    name = "easy_cache"
    does = "answers a step from the last computed one while the estimated change is small"
    tier = "lossy"
    order = 20
    order_reason = "it decides for both branches of guidance, so what skips a branch stands outside of it"
    Settings = CacheSettings

    def __init__(self, settings: CacheSettings | None = None) -> None:
        super().__init__(settings)
        self.rule: EasyCacheRule | None = None

    def bound(self, shares: Shares) -> Bound:
        computed = max(math.ceil(self.settings.first_percent / 100 * shares.steps), FULL_FIRST) + 1
        saved = shares.denoising * max(0.0, 1 - computed / shares.steps)
        return Bound(saved, f"{min(computed, shares.steps)} of {shares.steps} steps are always computed")

    def apply(self, place: Place) -> None:
        self.rule = EasyCacheRule(self.settings)
        place.add(self.rule)

    def proof(self, place: Place) -> Proof:
        seen = "too few steps"
        if self.decisions:
            smallest = min(decision.summed_change for decision in self.decisions)
            seen = f"the smallest sum of estimated changes was {smallest:.3g}"
        return proof_of_skips(place.calls, self.name, f"{seen}, the threshold is {self.settings.threshold:g}")

    @property
    def decisions(self) -> list[Decision]:
        """What was decided in the last generation, in order."""
        return [] if self.rule is None else self.rule.decisions


class Decision(NamedTuple):
    """Whether a step was skipped.

    Attributes:
        change: its estimated relative change. summed_change: with those of the steps since the last computed one.
    """

    step: int
    component: str
    change: float
    summed_change: float
    skipped: bool


class EasyCacheRule:
    """The cache of one generation."""

    name = EasyCache.name

    def __init__(self, settings: CacheSettings) -> None:
        self.settings = settings
        self.begin()

    def begin(self) -> None:
        self.decisions: list[Decision] = []
        self._forget()

    def _forget(self) -> None:
        self._computed = 0  # calls since the expert took over, which also numbers the last one
        self._rate: float | None = None
        self._sum = 0.0
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None  # x and y of the step before
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None  # of the last computed call
        self._apart: dict[str, tuple[int, torch.Tensor]] = {}  # branch -> number of the computed call, y - x
        self._skips = False

    def __call__(self, call: Call, inner: Inner) -> torch.Tensor:
        decides = call.branch != "uncond"
        if decides:
            if call.first:
                self._forget()
            self._skips = self._decide(call)
        kept = self._apart.get(call.branch)
        if self._skips and kept is not None and kept[0] == self._computed:
            x = self._noisy(call, kept[1])
            prediction = (x.float() + kept[1]).to(call.latents.dtype)
            if decides:
                self._before = (x, prediction)
            return prediction
        prediction = inner(call)
        x = self._noisy(call, prediction)
        if decides:
            self._learn(x, prediction)
        self._apart[call.branch] = (self._computed, prediction.float() - x.float())
        return prediction

    def _decide(self, call: Call) -> bool:
        first = math.ceil(self.settings.first_percent / 100 * call.steps)
        if self._rate is None or self._before is None or call.step < first or call.step == call.steps - 1:
            self._sum = 0.0
            return False
        x_before, y_before = self._before
        moved = _size(self._noisy(call, y_before) - x_before)
        change = self._rate * moved / max(_size(y_before), 1e-12)
        self._sum += change
        skips = self._sum < self.settings.threshold
        self.decisions.append(Decision(call.step, call.component, change, self._sum, skips))
        if not skips:
            self._sum = 0.0
        return skips

    def _learn(self, x: torch.Tensor, prediction: torch.Tensor) -> None:
        if self._last is not None:
            moved = _size(x - self._last[0])
            self._rate = _size(prediction - self._last[1]) / moved if moved > 0 else None
        self._last = self._before = (x, prediction)
        self._computed += 1

    @staticmethod
    def _noisy(call: Call, like: torch.Tensor) -> torch.Tensor:
        """The noisy latents among the channels that the denoiser takes: the first ones."""
        return call.latents[:, : like.shape[1]]


def _size(values: torch.Tensor) -> float:
    return float(values.float().abs().mean())
