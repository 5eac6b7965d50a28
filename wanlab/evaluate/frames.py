"""Scores of frames alone: PSNR, SSIM and MS-SSIM of a batch on its device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanlab.errors import WanlabError

if TYPE_CHECKING:
    import torch

_SIGMA, _RADIUS = 1.5, 5
_C1, _C2 = 0.01**2, 0.03**2
WINDOW = 2 * _RADIUS + 1
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the scales of MS-SSIM, fine to coarse (Wang et al. 2003, section 3.2)."""


def psnr(original: torch.Tensor, optimized: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each frame in dB, 10 log10(1 / MSE) over all pixels and channels.

    Args:
        original, optimized: `[N, 3, H, W]` in `[0, 1]`.

    Returns:
        float64 `[N]`; infinite for equal frames.
    """
    error = (original.double() - optimized.double()).square().flatten(1).mean(1)
    return -10 * error.log10()


def ssim(original: torch.Tensor, optimized: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each frame (Wang et al., 2004), mean over pixels and channels.

    Gaussian window of 11 pixels with sigma 1.5, population covariance, data range 1, borders where
    the window does not fit left out: scikit-image's `structural_similarity` with `gaussian_weights`.

    Args:
        original, optimized: `[N, 3, H, W]` in `[0, 1]`, at least 11 pixels a side.

    Returns:
        float64 `[N]`; 1 for equal frames.

    Raises:
        WanlabError: frames under 11 pixels a side.
    """
    _check_size(original, "SSIM")
    luminance, structure = _similarity(original.float(), optimized.float())
    return (luminance * structure).double().flatten(1).mean(1)


def scales(height: int, width: int) -> int:
    """How many scales of MS-SSIM fit frames of this size; 5 from 176 pixels a side, the published number."""
    fitting = [level for level in range(len(SCALE_WEIGHTS)) if min(height, width) >> level >= WINDOW]
    return len(fitting)


def ms_ssim(original: torch.Tensor, optimized: torch.Tensor) -> torch.Tensor:
    """Multi-scale structural similarity of each frame (Wang, Simoncelli and Bovik, 2003), mean over channels.

    Five scales, each half of the one before. Frames under 176 pixels a side have room for fewer: the weights of
    those that fit are scaled to add up to 1, and scores of different numbers of scales must not be compared.

    Args:
        original, optimized: `[N, 3, H, W]` in `[0, 1]`, at least 11 pixels a side.

    Returns:
        float64 `[N]`; 1 for equal frames.

    Raises:
        WanlabError: frames under 11 pixels a side.
    """
    import torch
    import torch.nn.functional as functional

    _check_size(original, "MS-SSIM")
    count = scales(*original.shape[-2:])
    weights = [weight / sum(SCALE_WEIGHTS[:count]) for weight in SCALE_WEIGHTS[:count]]
    x, y = original.float(), optimized.float()
    score = torch.ones(original.shape[:2], dtype=torch.float64, device=original.device)
    for level, weight in enumerate(weights):
        if level:
            odd = [side % 2 for side in x.shape[-2:]]
            x, y = (functional.avg_pool2d(side, 2, padding=odd) for side in (x, y))
        luminance, structure = _similarity(x, y)
        each = luminance * structure if level == count - 1 else structure
        # A scale that is anticorrelated counts as nothing alike: a root of it would not be a number.
        score *= each.double().mean((2, 3)).clamp(min=0) ** weight
    return score.mean(1)


def _check_size(frames: torch.Tensor, name: str) -> None:
    height, width = frames.shape[-2:]
    if min(height, width) < WINDOW:
        raise WanlabError(f"{name} needs frames of at least {WINDOW}x{WINDOW}; these are {height}x{width}")


def _similarity(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Luminance, and contrast times structure, where the window fits: `[N, 3, H - 10, W - 10]` each."""
    import torch
    import torch.nn.functional as functional

    offset = torch.arange(-_RADIUS, _RADIUS + 1, device=x.device, dtype=torch.float32)
    window = torch.exp(-0.5 * (offset / _SIGMA) ** 2)
    window = window / window.sum()

    def blur(z: torch.Tensor) -> torch.Tensor:
        flat = z.flatten(0, 1).unsqueeze(1)  # [N * 3, 1, H, W]
        flat = functional.conv2d(flat, window.view(1, 1, -1, 1))
        return functional.conv2d(flat, window.view(1, 1, 1, -1)).view(*z.shape[:2], *_inner(z))

    # Variances do not change with the origin; one in the middle halves the rounding error.
    x, y = x - 0.5, y - 0.5
    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x * mean_x
    variance_y = blur(y * y) - mean_y * mean_y
    covariance = blur(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x * mean_x + mean_y * mean_y + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return luminance, structure


def _inner(z: torch.Tensor) -> tuple[int, int]:
    return z.shape[2] - 2 * _RADIUS, z.shape[3] - 2 * _RADIUS
