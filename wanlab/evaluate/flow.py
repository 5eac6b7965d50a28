"""Optical flow of a clip, all pairs of frames at once on their device, and frames moved along it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RADIUS, WARPS, SMALLEST_SIDE = 7, 10, 16
DETERMINANT = 1e-14


def optical_flow(frames: torch.Tensor, previous: torch.Tensor, *, warps: int = WARPS) -> torch.Tensor:
    """Where each pixel of a frame was in the frame before, by iterative Lucas-Kanade on a pyramid.

    The method and its constants are those of `skimage.registration.optical_flow_ilk` (Le Besnerais and Champagnat,
    "Dense optical flow by iterative local window registration", 2005), which takes one pair at a time on the CPU.

    Args:
        frames, previous: `[N, H, W]` grey, in `[0, 1]`.
        warps: refinements on each level of the pyramid.

    Returns:
        `[N, 2, H, W]` in pixels (y, x): `frames[n][p]` shows what `previous[n][p + flow]` showed.
    """
    import torch
    import torch.nn.functional as functional

    pyramid = [(frames[:, None].float(), previous[:, None].float())]
    while min(pyramid[-1][0].shape[-2:]) >= 2 * SMALLEST_SIDE:
        size = [(side + 1) // 2 for side in pyramid[-1][0].shape[-2:]]
        pyramid.append(
            tuple(functional.interpolate(x, size, mode="bilinear", antialias=True) for x in pyramid[-1])
        )
    flow = torch.zeros(len(frames), 2, *pyramid[-1][0].shape[-2:], device=frames.device)
    for reference, moving in reversed(pyramid):
        size = reference.shape[-2:]
        if flow.shape[-2:] != size:
            grown = [new / old for new, old in zip(size, flow.shape[-2:], strict=True)]
            scale = torch.tensor(grown, device=flow.device).view(1, 2, 1, 1)
            flow = functional.interpolate(flow, size, mode="bilinear", align_corners=False) * scale
        for _ in range(warps):
            flow = _refined(reference, moving, flow)
    return flow


def _refined(reference: torch.Tensor, moving: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    import torch

    warped = warp(moving, flow)
    gy, gx = (torch.gradient(warped, dim=axis)[0] for axis in (2, 3))
    error = gy * flow[:, :1] + gx * flow[:, 1:] + reference - warped
    terms = torch.cat([gy * gy, gy * gx, gx * gx, gy * error, gx * error], dim=1)
    yy, yx, xx, by, bx = _window_mean(terms).double().split(1, dim=1)
    determinant = yy * xx - yx * yx
    known = determinant.abs() >= DETERMINANT  # elsewhere nothing is to be seen, and nothing moves
    determinant = torch.where(known, determinant, torch.ones_like(determinant))
    solved = torch.cat([xx * by - yx * bx, yy * bx - yx * by], dim=1) / determinant
    return torch.where(known, solved, torch.zeros_like(solved)).float()


def _window_mean(x: torch.Tensor) -> torch.Tensor:
    import torch.nn.functional as functional

    side = 2 * RADIUS + 1
    x = functional.pad(x, (RADIUS,) * 4, mode="reflect")
    return functional.avg_pool2d(functional.avg_pool2d(x, (side, 1), 1), (1, side), 1)


def warp(frames: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Frames `[N, C, H, W]` read at `p + flow`, bilinear; outside, the nearest pixel of the edge."""
    import torch.nn.functional as functional

    y, x, (height, width) = *_target(flow), frames.shape[-2:]
    grid = _unit(x, width), _unit(y, height)
    return functional.grid_sample(
        frames, _stack(grid), mode="bilinear", padding_mode="border", align_corners=True
    )


def inside(flow: torch.Tensor) -> torch.Tensor:
    """Which pixels come from inside the frame before: bool `[N, 1, H, W]`."""
    y, x, (height, width) = *_target(flow), flow.shape[-2:]
    return ((y >= 0) & (y <= height - 1) & (x >= 0) & (x <= width - 1))[:, None]


def _target(flow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    height, width = flow.shape[-2:]
    y = torch.arange(height, device=flow.device, dtype=flow.dtype).view(1, -1, 1)
    x = torch.arange(width, device=flow.device, dtype=flow.dtype).view(1, 1, -1)
    return y + flow[:, 0], x + flow[:, 1]


def _unit(position: torch.Tensor, size: int) -> torch.Tensor:
    return 2 * position / max(size - 1, 1) - 1


def _stack(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.stack(pair, dim=-1)
