"""What the sampler makes of the velocities: the latents as a weighted sum of them, read off the scheduler itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class SamplerWeights:
    """Latents of a generation as `start[k] * first latents + sum over j of weights[k, j] * velocity j`.

    Attributes:
        start: `[steps + 1]`.
        weights: `[steps + 1, steps]`; row k is what step k is given, the last row the final latents. The last row is
            the sampler's step sizes, with what a multistep method adds to them.
    """

    start: np.ndarray
    weights: np.ndarray

    @property
    def final(self) -> np.ndarray:
        """Weight of each step's velocity in the final latents, `[steps]`."""
        return self.weights[-1]


def sampler_weights(model, steps: int) -> SamplerWeights:
    """The weights of every step's velocity in the latents, without a forward of the network.

    Samplers of flow matching (Euler, UniPC, DPM-Solver++ without thresholding) are linear in the latents and the
    velocities, so one run over unit vectors tells all weights, whatever the order of the method. The scheduler is a
    copy.

    Raises:
        WanlabError: a scheduler that is not linear or draws noise.
    """
    import numpy as np
    import torch

    def run(scale: float) -> torch.Tensor:
        scheduler = model.pipeline.scheduler.__class__.from_config(model.pipeline.scheduler.config)
        scheduler.set_timesteps(steps, device="cpu")
        # One channel per unknown: the first latents, then the velocity of each step.
        latents = torch.zeros(1, steps + 1, 1, 1, 1, dtype=torch.float64)
        latents[0, 0] = scale
        seen = [latents.flatten().clone()]
        for step, timestep in enumerate(scheduler.timesteps):
            velocity = torch.zeros_like(latents)
            velocity[0, step + 1] = scale
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            seen.append(latents.flatten().double().clone())
        return torch.stack(seen)

    once, twice = run(1.0), run(2.0)
    if not torch.allclose(2 * once, twice, rtol=1e-6, atol=1e-9):
        name = type(model.pipeline.scheduler).__name__
        raise WanlabError(f"{name} is not linear in its velocities; take UniPC or Euler without thresholding")
    table = once.numpy()
    return SamplerWeights(np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1:]))
