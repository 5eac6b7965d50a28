"""Attention over some blocks only: its kernels, and how far it is from all blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

from wanlab.techniques.attention.blocks import BlockTable
from wanlab.techniques.attention.kernels import KERNELS, compiled_flex, heads_first

KERNEL_BLOCK = 128
"""Tokens of the blocks that GPU kernels leave out."""


@functools.lru_cache(maxsize=8)
def _lists(table: BlockTable, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of the kept key blocks of each query block and their numbers in order: `[1, 1, Q]`, `[1, 1, Q, K]`, int32."""
    kept = table.kept.to(device)
    order = torch.argsort((~kept).int(), dim=1, stable=True)
    return kept.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()


@functools.lru_cache(maxsize=2)
def _mask(table: BlockTable, device: torch.device) -> torch.Tensor:
    return table.of_tokens().to(device)


@functools.lru_cache(maxsize=8)
def _block_mask(table: BlockTable, device: torch.device) -> BlockMask:
    # A block that ends after the last token must be masked inside.
    whole = torch.ones(len(table.kept), dtype=torch.bool)
    whole[-1] = table.tokens % table.block == 0
    full = table.kept & whole[None] & whole[:, None]
    partial = BlockTable(table.kept & ~full, table.block, table.tokens, "")
    kept = table.kept.to(device)

    def inside(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return kept[query // table.block, key // table.block]

    lists = (*_lists(partial, device), *_lists(BlockTable(full, table.block, table.tokens, ""), device))
    sizes = (table.tokens, table.tokens)
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=table.block, mask_mod=inside, seq_lengths=sizes)


def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: BlockTable) -> torch.Tensor:
    """All scores, of which those outside are masked: the same numbers, and nothing saved."""
    mask = _mask(table, query.device)
    run = heads_first(lambda *heads: F.scaled_dot_product_attention(*heads, attn_mask=mask))
    return run(query, key, value)


def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: BlockTable) -> torch.Tensor:
    """PyTorch's flex_attention, compiled."""
    mask = _block_mask(table, query.device)
    return heads_first(lambda *heads: compiled_flex()(*heads, block_mask=mask))(query, key, value)


def flash_attention_4(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: BlockTable
) -> torch.Tensor:
    """FlashAttention-4 on Hopper. All kept blocks are listed as whole ones, in rising order, since it masks what is behind
    the last token in the last block of a list."""
    from flash_attn.cute import flash_attn_func  # an optional package
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    count, order = _lists(table, query.device)
    none = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(count),
        mask_block_idx=torch.zeros_like(order),
        full_block_cnt=count,
        full_block_idx=order,
        block_size=(table.block, table.block),
    )
    output: Any = flash_attn_func(query, key, value, block_sparse_tensors=none)
    return output[0] if isinstance(output, tuple) else output


Sparse = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, BlockTable], torch.Tensor]

SPARSE: dict[str, Sparse] = {"flash-attention-4": flash_attention_4, "flex": flex, "masked": masked}


def lacks_kernel(
    kernel: str,
    device: torch.device,
    block: int,
    dtype: torch.dtype | None = None,
    head_size: int | None = None,
) -> str:
    """What a kernel needs and is not here; empty if it can run."""
    if kernel == "masked":
        return ""
    if reason := KERNELS[kernel].lacks(device, dtype, head_size):
        return reason
    if kernel == "flash-attention-4" and torch.cuda.get_device_capability(device) != (9, 0):
        return "a GPU of compute capability 9.0 for blocks of flash-attention-4; flex has them too"
    return (
        ""
        if block == KERNEL_BLOCK
        else f"blocks of {KERNEL_BLOCK} tokens for {kernel}; the setting `block` is {block}"
    )


def kernel_here(
    device: torch.device, block: int, dtype: torch.dtype | None = None, head_size: int | None = None
) -> str:
    """The fastest kernel for blocks that runs on a device."""
    return next(name for name in SPARSE if not lacks_kernel(name, device, block, dtype, head_size))
