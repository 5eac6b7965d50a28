"""Batched guidance: both branches of a step in one call of twice the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from wanlab.core.lazy import LazyModule
from wanlab.models.spec import ModelSpec
from wanlab.techniques.guidance import only_sequential
from wanlab.techniques.technique import Bound, NoSettings, Proof, Shares, Technique, answered

if TYPE_CHECKING:
    import torch

    from wanlab.techniques.denoising import Call, Inner
    from wanlab.techniques.place import Place
else:  # a configuration is read without them
    torch = LazyModule("torch")

_FIXED = "its graph has one size of batch"


class BatchedGuidance(Technique[NoSettings]):
    """The operations are the same; small models gain, whose kernels leave the device idle. The first step of each expert
    calls the branches apart, as only then both texts are known."""

    name = "batched_guidance"
    does = "computes both branches of guidance in one call of twice the batch"
    tier = "numeric"
    order = 10
    order_reason = "it makes the calls of the network, so every rule that may skip one stands outside of it"
    not_on: ClassVar[Mapping[str, str]] = {"onnxruntime": _FIXED, "tensorrt": _FIXED, "tvm": _FIXED}

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        return only_sequential(spec)

    def bound(self, shares: Shares) -> Bound:
        saved = shares.denoising / 2 if shares.branches == 2 else 0.0
        return Bound(saved, "both branches would take the time of one, which only a device that idles allows")

    def apply(self, place: Place) -> None:
        place.add(PairRule())

    def proof(self, place: Place) -> Proof:
        calls = place.calls
        if not (calls["by"] == self.name).any():
            return Proof(
                False,
                f"{self.name} joined none of {len(calls)} calls: no step needs both branches of guidance.",
            )
        return Proof(True, f"{self.name} answered {answered(calls, self.name)} from a call of both branches.")


class PairRule:
    """The pairs of one generation."""

    name = BatchedGuidance.name

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._texts: dict[str, torch.Tensor] = {}  # branch -> its text
        self._both: torch.Tensor | None = None  # kept, so that what remembers texts knows it again
        self._other: tuple[str, int, torch.Tensor] | None = None  # expert, step, prediction without text

    def __call__(self, call: Call, inner: Inner) -> torch.Tensor:
        if call.text is None or call.branch not in ("cond", "uncond"):
            return inner(call)
        if (
            call.branch == "uncond"
            and self._other is not None
            and self._other[:2] == (call.component, call.step)
        ):
            return self._other[2]
        self._texts[call.branch] = call.text
        if call.branch == "uncond" or call.alone or call.first or "uncond" not in self._texts:
            return inner(call)
        batch = call.latents.shape[0]
        both = replace(call, alone=True, arguments=self._paired(call.arguments, batch))
        with_text, without = inner(both).split(batch)
        self._other = (call.component, call.step, without)
        return with_text

    def _paired(self, arguments: dict[str, Any], batch: int) -> dict[str, Any]:
        if self._both is None:
            self._both = torch.cat([self._texts["cond"], self._texts["uncond"]])

        def twice(name: str, value: Any) -> Any:
            if name == "encoder_hidden_states":
                return self._both
            is_batched = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == batch
            return torch.cat([value, value]) if is_batched else value

        return {name: twice(name, value) for name, value in arguments.items()}
