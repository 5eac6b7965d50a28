"""Where techniques are switched on: a copy of a model that shares its weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pandas as pd
import torch

from wanlab.models.clocks import with_clock
from wanlab.models.pipeline import Model
from wanlab.models.variants import shared_copy
from wanlab.techniques.denoising import Denoising, Rule


@dataclass(eq=False)
class Place:
    """A copy of a model on which techniques are switched on; all weights are shared with the original.

    Networks are changed first, then compiled or replaced by engines, and at last the rules stand around their calls
    (`finish`).

    Attributes:
        model: the copy.
        denoising: the calls of its denoisers, and the rules around them.
        bare: the model that `finish` was given: compiled and with engines, without the rules.
    """

    model: Model
    denoising: Denoising = field(default_factory=Denoising)
    _own: dict[str, torch.nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.bare = _copied(self.model)

    def add(self, rule: Rule) -> None:
        """Put a rule around all that is around the calls of the denoisers so far."""
        self.denoising.rules.append(rule)

    def network(self, component: str) -> torch.nn.Module:
        """A component's network with modules of its own, made once, whose weights are those of the original."""
        part = self.model.spec.part_of(component)
        if part not in self._own:
            self._own[part] = shared_copy(self.model.component(component))
            setattr(self.model.pipeline, part, self._own[part])
        return self._own[part]

    def finish(self, model: Model) -> Model:
        """A copy of `self.model`, or of what compilers and engines made of it, with the rules around its denoisers."""
        self.model, self.bare = _copied(model), model
        self.model.pipeline.scheduler = with_clock(model.pipeline.scheduler, self.denoising)
        self.denoising.install(self.model)
        return self.model

    @property
    def calls(self) -> pd.DataFrame:
        """The calls of the last generation, as `Denoising.frame`."""
        return self.denoising.frame()


def _copied(model: Model) -> Model:
    changed = copy.copy(model)
    changed.pipeline = copy.copy(model.pipeline)
    return changed
