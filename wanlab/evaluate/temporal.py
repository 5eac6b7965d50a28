"""How a video moves beside how the original moves: flicker, motion energy, and errors along the optical flow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanlab.evaluate import flow as optical

if TYPE_CHECKING:
    import numpy as np
    import torch

STILL = 0.1 / 255
"""A tenth of a step of 8 bits, added to the original's motion, so that a still original divides too."""

FLOW_SIDE = 96
"""Pixels of the shorter side at which flow is found and followed; what matters moves at this size."""

VISIBILITY = 50.0
"""alpha of Lai et al. 2018: a pixel counts by exp(-alpha |O[t] - warped O[t-1]|^2), next to nothing where uncovered."""


def flicker(original: torch.Tensor, optimized: torch.Tensor) -> torch.Tensor:
    """Change from frame to frame that the original does not have: mean |(Q[t] - Q[t-1]) - (O[t] - O[t-1])|.

    A difference that stays (a colour cast, a blur of a still scene) is none; one that comes and goes is.

    Args:
        original, optimized: `[N, 3, H, W]` in `[0, 1]`, frames that follow each other.

    Returns:
        float64 `[N - 1]`, in intensity, for frames 1 to N - 1.
    """
    error = optimized - original
    return (error[1:] - error[:-1]).abs().double().flatten(1).mean(1)


def motion(frames: torch.Tensor) -> torch.Tensor:
    """Motion energy, mean |X[t] - X[t-1]|: float64 `[N - 1]` in intensity."""
    return (frames[1:] - frames[:-1]).abs().double().flatten(1).mean(1)


def motion_ratio(original: np.ndarray, optimized: np.ndarray) -> np.ndarray:
    """Motion of the optimised video over that of the original, from the motion energies of a whole clip.

    The mean over frames is the ratio of the clip's energies; a frame's value says what it adds to that ratio, since
    a frame in which the original hardly moves has no ratio of its own.
    """
    return 1 + (optimized - original) / (original.mean() + STILL)


def warp_errors(original: torch.Tensor, optimized: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much changes along the original's motion, in the original and in the optimised video.

    E_warp of Lai et al., "Learning Blind Video Temporal Consistency" (2018): each frame less the one before moved
    along the optical flow of the original, where the mask says that the original shows the same thing in both. Root
    mean square over pixels, at `FLOW_SIDE` pixels of the shorter side.

    Args:
        original, optimized: `[N, 3, H, W]` in `[0, 1]`, frames that follow each other.

    Returns:
        float64 `[N - 1]` in intensity, of the original and of the optimised video.
    """
    import torch

    small = [_shrunk(frames) for frames in (original, optimized)]
    grey = small[0].mean(1)
    flow = optical.optical_flow(grey[1:], grey[:-1])
    moved = [frames[1:] - optical.warp(frames[:-1], flow) for frames in small]
    seen = torch.exp(-VISIBILITY * moved[0].square().sum(1, keepdim=True)) * optical.inside(flow)
    weight = seen.double().flatten(1).sum(1).clamp(min=1e-9)
    first, second = (
        ((error.square().mean(1, keepdim=True) * seen).double().flatten(1).sum(1) / weight).sqrt()
        for error in moved
    )
    return first, second


def _shrunk(frames: torch.Tensor) -> torch.Tensor:
    import torch.nn.functional as functional

    shorter = min(frames.shape[-2:])
    if shorter <= FLOW_SIDE:
        return frames.float()
    size = [round(side * FLOW_SIDE / shorter) for side in frames.shape[-2:]]
    return functional.interpolate(frames.float(), size, mode="bilinear", antialias=True)
