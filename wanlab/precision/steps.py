"""Formats that change within a generation: the scheduler counts the step, and layers read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from wanlab.core.errors import WanlabError
from wanlab.precision.plan import Plan, check_steps


class StepClock:
    """The range of steps in which a generation is.

    Both branches of guidance come before the scheduler's step, so they are in one step. The range is a string, on which
    compiled code is specialised: one version of a block per range, not per step.

    Attributes:
        bands: ranges of steps, inclusive, in which nothing changes in any component.
        band: the current one, such as `"0-3"`; None outside a generation.
    """

    def __init__(self, plan: Plan, bands: list[tuple[int, int]]) -> None:
        self.plan, self.bands = plan, bands
        self.step: int | None = None
        self.band: str | None = None

    def begin(self, num_steps: int) -> None:
        """Start a generation of this number of steps.

        Raises:
            WanlabError: the plan is for another number.
        """
        check_steps(self.plan, num_steps)
        self._set(0)

    def advance(self) -> None:
        """Go to the next step; after the last one there is none."""
        if self.step is not None:
            self._set(self.step + 1 if self.step + 1 < self.plan.num_steps else None)

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Set the step inside the block.

        Raises:
            WanlabError: the plan has no such step.
        """
        if not 0 <= step < self.plan.num_steps:
            raise WanlabError(f"plan {self.plan.name} has steps 0 to {self.plan.num_steps - 1}, not {step}")
        before = self.step
        self._set(step)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, step: int | None) -> None:
        self.step = step
        self.band = (
            None if step is None else next(step_range_name(b) for b in self.bands if b[0] <= step <= b[1])
        )

    def __deepcopy__(self, memo) -> StepClock:
        """Copies of a network or of its scheduler share the clock."""
        return self


class SteppedLayer(torch.nn.Module):
    """A layer with a format for every range of steps; its weights in all of them are in memory.

    Attributes:
        variants: format -> layer; `"as-loaded"` is the original.
        by_band: range of steps -> its variant.
    """

    def __init__(
        self, variants: Mapping[str, torch.nn.Module], by_band: dict[str, str], clock: StepClock
    ) -> None:
        super().__init__()
        self.variants = torch.nn.ModuleDict(variants)
        self.by_band, self.clock = by_band, clock

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the first range of steps, for networks that take a dtype from it."""
        return next(iter(self.variants.values())).weight

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        band = self.clock.band
        if band is None:
            raise WanlabError(
                "this plan changes with the step, and no generation is running; call inside `with applied.at(step)`"
            )
        return self.variants[self.by_band[band]](values)


def all_bands(assignment) -> list[tuple[int, int]]:
    """Ranges of steps in which nothing changes in any component; empty where nothing ever does."""
    bands = [band for name in assignment.components for band in assignment.bands(name) if band[0] is not None]
    if not bands:
        return []
    starts = sorted({first for first, _ in bands})
    return list(
        zip(starts, [start - 1 for start in starts[1:]] + [assignment.plan.num_steps - 1], strict=True)
    )


def step_range_name(band: tuple[int, int]) -> str:
    """`(0, 3)` as `"0-3"`."""
    return f"{band[0]}-{band[1]}"
