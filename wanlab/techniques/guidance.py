"""What techniques of guidance have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

from wanlab.models.families import family_of
from wanlab.models.families.base import SEQUENTIAL
from wanlab.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from wanlab.techniques.denoising import Call, Inner

BOTH_DECIDE = "both decide whether the branch without text is computed"
"""Why two techniques that leave out that branch cannot go together."""
STANDS_OUTSIDE = "it tells what stands inside that the other branch of a step will not be needed"


def only_sequential(spec: ModelSpec) -> str:
    """Why the branches of guidance of a model cannot be told apart; empty if they can."""
    family = family_of(spec.pipeline_class)
    if family.guidance == SEQUENTIAL:
        return ""
    return f"a model whose branches of guidance are calls of their own; {spec.name} ({family}) computes them in one"


class WithoutText(ABC):
    """A rule that in some steps answers the branch without text from the branch with text of the same step."""

    name: str

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._with_text: torch.Tensor | None = None

    @abstractmethod
    def leaves_out(self, call: Call) -> bool:
        """Whether the step of a call does without it; the same for both branches of a step."""

    @abstractmethod
    def answer(self, call: Call, with_text: torch.Tensor) -> torch.Tensor:
        """What stands for the branch without text."""

    def learn(self, call: Call, with_text: torch.Tensor, without: torch.Tensor) -> None:  # noqa: B027 - not all do
        """Both branches of a step were computed."""

    def __call__(self, call: Call, inner: Inner) -> torch.Tensor:
        left_out = self.leaves_out(call)
        if call.branch == "cond":
            self._with_text = inner(replace(call, alone=True) if left_out else call)
            return self._with_text
        if call.branch != "uncond" or self._with_text is None:
            return inner(call)
        if left_out:
            return self.answer(call, self._with_text)
        without = inner(call)
        self.learn(call, self._with_text, without)
        return without
