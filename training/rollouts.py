"""Where the experts come to by themselves: latents on the way from noise to a clip, as the pipeline samples them.

An expert learns the velocity at latents that are made of a true clip and noise. When it samples, it begins where its own
earlier steps ended, which is a little blurred. Here it is shown such latents too, and what they should have become, so that
its last steps learn to mend what the steps before them left.
(The idea of training on one's own states: Ross, Gordon and Bagnell 2011, "A reduction of imitation learning ...".)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from training import architecture
from training.architecture import BOUNDARY_RATIO, GUIDANCE_SCALE
from training.loop import autocast

STEPS = (4, 6, 10, 10, 10, 20)
"""Steps of a sampling, drawn with equal chance: mostly the default."""


class States(NamedTuple):
    """Latents on the way, and what belongs to them; `[N, ...]` each."""

    noisy: torch.Tensor
    sigma: torch.Tensor
    latents: torch.Tensor
    condition: torch.Tensor
    text: torch.Tensor


def guidance(both: torch.Tensor) -> torch.Tensor:
    """Velocity with guidance at the default scale, of velocities with text and, behind them, without it `[2B, ...]`
    (Ho and Salimans 2022)."""
    with_text, without = both.chunk(2)
    return without + GUIDANCE_SCALE * (with_text - without)


def guided(
    expert: Callable[..., tuple[torch.Tensor]],
    inputs: torch.Tensor,
    sigma: torch.Tensor,
    text: torch.Tensor,
    no_text: torch.Tensor,
) -> torch.Tensor:
    """Velocity with guidance at the default scale, `[B, C, T', H', W']`, of both branches in one call.

    Args:
        inputs: latents, mask and condition `[B, 2C + 4, T', H', W']`.
        sigma: noise levels `[B]`.
        text: embeddings `[B, L, D]`; `no_text` is that of the empty caption, `[L, D]`.
    """
    both = torch.cat([text, no_text.expand_as(text)])
    velocity = expert(torch.cat([inputs, inputs]), sigma.repeat(2) * 1000, both, return_dict=False)[0]
    return guidance(velocity.float())


class Rollouts:
    """Latents from which an expert takes its steps of a sampling, drawn anew when all were handed out.

    Args:
        high: the high-noise expert.
        low: the low-noise expert; None keeps the latents of the high-noise one, which need no other.
        draw: number of clips to their latents, conditions and text embeddings, without dropped captions.
        mask: `[1, 4, T', H', W']`, one in the frame that is given.
        no_text: embedding of the empty caption, `[L, D]`.
        count: clips that are sampled at once.
        refresh: called before each sampling, to bring the high-noise expert up to date.
    """

    def __init__(
        self,
        high: torch.nn.Module,
        low: torch.nn.Module | None,
        draw: Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        mask: torch.Tensor,
        no_text: torch.Tensor,
        count: int,
        refresh: Callable[[], None] | None = None,
    ) -> None:
        self.high, self.low, self.draw = high, low, draw
        self.mask, self.no_text, self.count, self.refresh = mask, no_text, count, refresh
        self.states: States | None = None
        self.next = 0

    def __call__(self, count: int) -> States:
        """The next `count` states; never more than `self.count`."""
        if self.states is None or self.next + count > len(self.states.sigma):
            self.states, self.next = self._sample(), 0
        rows = slice(self.next, self.next + count)
        self.next += count
        return States(*(values[rows] for values in self.states))

    @torch.no_grad()
    def _sample(self) -> States:
        if self.refresh is not None:
            self.refresh()
        latents, condition, text = self.draw(self.count)
        device = latents.device
        known = torch.cat([self.mask.expand(self.count, -1, -1, -1, -1), condition], dim=1)
        scheduler = architecture.scheduler()
        scheduler.set_timesteps(STEPS[int(torch.randint(len(STEPS), ()))], device=device)
        noisy, kept = torch.randn_like(latents), []
        for time in scheduler.timesteps:
            is_high = float(time) >= 1000 * BOUNDARY_RATIO
            expert = self.high if is_high else self.low
            if expert is None:
                break
            sigma = (time / 1000).float().expand(self.count)
            if is_high == (self.low is None):
                kept.append(States(noisy, sigma, latents, condition, text))
            with autocast(device):
                velocity = guided(expert, torch.cat([noisy, known], dim=1), sigma, text, self.no_text)
            noisy = scheduler.step(velocity, time, noisy, return_dict=False)[0]
        joined = [torch.cat(values) for values in zip(*kept, strict=True)]
        order = torch.randperm(len(joined[0]), device=device)
        return States(*(values[order] for values in joined))
