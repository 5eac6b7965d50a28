"""Schedulers that tell others how far a generation is."""

from __future__ import annotations

import copy
from functools import wraps
from typing import Any, Protocol

from wanlab.models.schedulers import named_as


class Clock(Protocol):
    """What follows the steps of a generation. Copies of a scheduler share it: its `__deepcopy__` returns itself."""

    def begin(self, num_steps: int) -> None:
        """A generation of this number of steps begins."""

    def advance(self) -> None:
        """The scheduler made a step."""


def with_clock(scheduler: Any, clock: Clock | None) -> Any:
    """A copy of a scheduler, as it keeps state between steps, that also tells a clock, besides those that it told before."""
    changed = copy.deepcopy(scheduler)
    if clock is None:
        return changed
    if not hasattr(changed, "wanlab_clocks"):
        changed.__class__ = _telling(type(changed))
        changed.wanlab_clocks = ()
    changed.wanlab_clocks = (*changed.wanlab_clocks, clock)
    return changed


def _telling(base: Any) -> type:
    """A scheduler class that tells its clocks; its methods keep the signatures that diffusers inspects."""

    class TellingScheduler(base):
        @wraps(base.set_timesteps)
        def set_timesteps(self, num_inference_steps=None, *args, **kwargs):
            result = super().set_timesteps(num_inference_steps, *args, **kwargs)
            self.wanlab_asked = len(self.timesteps) if num_inference_steps is None else num_inference_steps
            # Schedulers made from this one's configuration have no clock.
            for clock in getattr(self, "wanlab_clocks", ()):
                clock.begin(getattr(self, "num_inference_steps", None) or self.wanlab_asked)
            return result

        @wraps(base.step)
        def step(self, *args, **kwargs):
            result = super().step(*args, **kwargs)
            for clock in getattr(self, "wanlab_clocks", ()):
                clock.advance()
            return result

    return named_as(TellingScheduler, base)
