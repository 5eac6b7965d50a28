"""What LPIPS does with the features of two frames, in one pass over them.

The networks come from their packages; this is the arithmetic behind them: features scaled to unit length per pixel,
squared differences, a learnt weight per channel. Written out, it reads and writes the features a dozen times. On an
NVIDIA GPU one Triton kernel reads them once; elsewhere it is PyTorch.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EPSILON = 1e-10  # of both packages' normalize_tensor
TILE = 8192  # numbers of each side that one program of the kernel holds


def distance_map(first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Distance of two layers' features at each of their pixels.

    Args:
        first, second: `[N, C, H, W]`, of equal layout in memory.
        weight: `[C]`.

    Returns:
        float32 `[N, H, W]`: sum over channels of weight * (first / |first| - second / |second|)^2.
    """
    if first.is_cuda and find_spec("triton") and not _torch_version_is_hip():
        return _by_triton(first, second, weight)
    return by_torch(first, second, weight)


def by_torch(first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`distance_map` in PyTorch."""
    import torch

    lengths = [torch.linalg.vector_norm(side, dim=1, keepdim=True) + EPSILON for side in (first, second)]
    difference = (first / lengths[0]).sub_(second / lengths[1])
    return torch.einsum("nchw,c->nhw", difference.square_(), weight)


def _torch_version_is_hip() -> bool:
    import torch

    return torch.version.hip is not None


def _by_triton(first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    import torch

    if first.stride() != second.stride():
        second = torch.empty_like(first).copy_(second)
    if first.stride(2) != first.shape[3] * first.stride(3):  # the kernel counts pixels in one go
        first, second = first.contiguous(), second.contiguous()
    count, channels, height, width = first.shape
    out = torch.empty(count, height, width, device=first.device, dtype=torch.float32)
    wide = 1 << (channels - 1).bit_length()
    block = max(16, TILE // wide)
    grid = (-(-height * width // block), count)
    with torch.cuda.device(first.device) if first.is_cuda else torch.no_grad():
        _kernel()[grid](
            first,
            second,
            weight,
            out,
            height * width,
            first.stride(0),
            first.stride(1),
            first.stride(3),
            CHANNELS=channels,
            WIDE=wide,
            BLOCK=block,
            EPSILON=EPSILON,
        )
    return out


@lru_cache(maxsize=1)
def _kernel():
    from wanlab.evaluate.lpips_kernel import distance_kernel

    return distance_kernel
