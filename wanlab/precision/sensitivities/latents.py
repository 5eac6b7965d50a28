"""The latents around a call: which of them are free, how large they end, and random directions of their shape."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free_latents(given: Sequence[torch.Tensor], velocity: torch.Tensor) -> torch.Tensor:
    """1, or 0 in the first frame where it is given to the model (at timestep 0) and put back after the last step."""
    import torch

    timestep = given[1]
    mask = torch.ones(1, 1, velocity.shape[2], 1, 1, device=velocity.device)
    if timestep.ndim == 2 and bool((timestep == 0).any()):
        mask[:, :, 0] = 0.0
    return mask


def final_norm_sq(given: Sequence[torch.Tensor], velocity: torch.Tensor, sigma: float | None) -> float:
    """Squared norm of the latents that a call's velocity leads to at once: x - sigma v, exact at the last step."""
    latents = given[0][:, : velocity.shape[1]].float()
    ended = latents - free_latents(given, velocity) * (sigma or 0.0) * velocity
    return float((ended**2).sum().double()) or 1.0


def draw(like: torch.Tensor, count: int, *seeds: object) -> list[torch.Tensor]:
    """Standard normal directions, the same on every device."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(repr(seeds).encode()))
    return [torch.randn(like.shape, generator=generator).to(like.device) for _ in range(count)]
