"""A local window over latent frames, as a mask that flex_attention skips blocks by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Tokens along a side of the blocks that flex_attention computes or skips."""


def pair_share(latent_frames: int, window_frames: int) -> float:
    """Share of the pairs of query and key that are in the window."""
    near = [
        min(n + window_frames, latent_frames - 1) - max(n - window_frames, 0) + 1
        for n in range(latent_frames)
    ]
    return sum(near) / latent_frames**2


def window_mask(tokens: int, latent_frames: int, window_frames: int, device: Any = "cpu") -> BlockMask:
    """A flex_attention mask that lets a query see its own latent frame and some on each side.

    Built from blocks: `create_block_mask` holds tokens x tokens booleans unless it is compiled.

    Args:
        tokens: divisible by latent_frames. window_frames: on each side.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    per_frame = tokens // latent_frames

    def near(batch, head, query, key):
        return (query // per_frame - key // per_frame).abs() <= window_frames

    first = torch.arange(0, tokens, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp_max(tokens - 1)
    low, high = first // per_frame, last // per_frame
    nearest = torch.maximum(low[None] - high[:, None], low[:, None] - high[None])
    farthest = torch.maximum(high[None] - low[:, None], high[:, None] - low[None])
    whole = last - first == BLOCK - 1  # a block over the end must be masked
    full = (farthest <= window_frames) & whole[None] & whole[:, None]
    partial = (nearest <= window_frames) & ~full

    def ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
        return blocks.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()

    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=BLOCK, mask_mod=near, seq_lengths=(tokens, tokens)
    )
