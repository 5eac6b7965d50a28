"""Attention over some blocks only: its kernels, and the means of the blocks that are left out.

With S the keys that a query q sees, a block b that it does not see, of n_b tokens, has the mean key k_b and the mean value
v_b. Where a head adds the means back, its output is

    (sum over j in S of exp(q k_j) v_j + sum over b of n_b exp(q k_b) v_b)
    / (sum over j in S of exp(q k_j) + sum over b of n_b exp(q k_b)),

so every block counts by an estimate of its mass, which is never above the true one (the exponential is convex). It is the
attention over the seen keys and one more key for each block, with log n_b added to its score, and is computed like that, or
from the logarithms of the two sums where a kernel gives that of the first. Means of blocks in place of their tokens are from
Zeng et al. 2022, "Multi resolution analysis for approximate self-attention" (arXiv:2207.10284), who take the mean of the
queries too; that each query has its own estimate, and blocks are left out by a pattern, is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask

from wanlab.techniques.attention.blocks import BlockTable, HeadTable, block_means, block_sizes
from wanlab.techniques.attention.errors import exact_attention
from wanlab.techniques.attention.kernels import KERNELS, compiled_flex, heads_first

KERNEL_BLOCK = 128
"""Tokens of the blocks that GPU kernels leave out."""


Table = BlockTable | HeadTable


@functools.lru_cache(maxsize=128)
def _list(table: BlockTable, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of the kept key blocks of each query block and their numbers in order: `[Q]`, `[Q, K]`, int32."""
    kept = table.kept.to(device)
    order = torch.argsort((~kept).int(), dim=1, stable=True)
    return kept.sum(1).to(torch.int32), order.to(torch.int32)


def _lists(table: Table, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`_list` of all heads: `[1, H, Q]` and `[1, H, Q, K]`, with one head for a table that all share."""
    each = [_list(own, device) for own in (table.tables if isinstance(table, HeadTable) else (table,))]
    counts, orders = (torch.stack(parts)[None] for parts in zip(*each, strict=True))
    return counts, orders


@functools.lru_cache(maxsize=2)
def _mask(table: BlockTable, device: torch.device) -> torch.Tensor:
    return table.of_tokens().to(device)


@functools.lru_cache(maxsize=128)
def _apart(table: BlockTable) -> tuple[BlockTable, BlockTable]:
    """The blocks of a table that must be masked inside, since they end behind the last token, and the others."""
    whole = torch.ones(len(table.kept), dtype=torch.bool)
    whole[-1] = table.tokens % table.block == 0
    full = table.kept & whole[None] & whole[:, None]
    tables = (BlockTable(kept, table.block, table.tokens, "") for kept in (table.kept & ~full, full))
    return next(tables), next(tables)


def _block_mask(table: Table, device: torch.device) -> BlockMask:
    heads = table.tables if isinstance(table, HeadTable) else (table,)
    none = (False,) * len(heads)
    apart = zip(*map(_apart, heads), strict=True)
    partial, full = (HeadTable(tables, none) for tables in apart)
    kept = torch.stack([_kept(own, device) for own in heads])
    block, several = table.block, len(heads) > 1

    def inside(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return kept[head if several else 0, query // block, key // block]

    lists = (*_lists(partial, device), *_lists(full, device))
    sizes = (table.tokens, table.tokens)
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=block, mask_mod=inside, seq_lengths=sizes)


@functools.lru_cache(maxsize=128)
def _kept(table: BlockTable, device: torch.device) -> torch.Tensor:
    return table.kept.to(device)


@functools.lru_cache(maxsize=8)
def _shared_mask(table: BlockTable, device: torch.device) -> BlockMask:
    return _block_mask(table, device)


def adds_means(table: Table) -> bool:
    """Whether a head adds the means of what it leaves out."""
    return isinstance(table, HeadTable) and any(table.added)


def with_means(tensor: torch.Tensor, block: int) -> torch.Tensor:
    """Tokens, and behind them the mean of each block: `[B, L + blocks, H, D]`."""
    return torch.cat([tensor, block_means(tensor, block).to(tensor.dtype)], 1)


def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: Table) -> torch.Tensor:
    """All scores, of which those outside are masked: the same numbers, and nothing saved."""
    device, dtype = query.device, query.dtype

    def attend(tensors: tuple[torch.Tensor, ...], mask: torch.Tensor) -> torch.Tensor:
        return heads_first(lambda *heads: F.scaled_dot_product_attention(*heads, attn_mask=mask))(*tensors)

    if isinstance(table, BlockTable):
        return attend((query, key, value), _mask(table, device))
    means = adds_means(table)
    more = tuple(with_means(each, table.block) for each in (key, value)) if means else (key, value)
    if len(table.tables) * table.tokens * more[0].shape[1] <= MOST_MASK:
        return attend((query, *more), _masks(table, device, dtype))
    outputs = []
    for head in range(len(table.tables)):
        tensors = tuple(each[:, :, head : head + 1] for each in (query, *more))
        outputs.append(attend(tensors, _head_mask(table, head).to(device, dtype if means else torch.bool)))
    return torch.cat(outputs, 2)


MOST_MASK = 1 << 21
"""Elements of the masks of all heads up to which these are made once and kept."""


def _head_mask(table: HeadTable, head: int) -> torch.Tensor:
    """What a head may see, `[L, L]`; with means what it adds to the scores, `[L, L + blocks]`."""
    return table.bias(head) if adds_means(table) else table.tables[head].of_tokens()


@functools.lru_cache(maxsize=48)
def _masks(table: HeadTable, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    masks = torch.stack([_head_mask(table, head) for head in range(len(table.tables))])
    return masks.to(device, dtype if adds_means(table) else torch.bool)


def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: Table) -> torch.Tensor:
    """PyTorch's flex_attention, compiled."""
    device = query.device
    mask = _shared_mask(table, device) if isinstance(table, BlockTable) else _block_mask(table, device)
    heads = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    if not adds_means(table):
        return compiled_flex()(*heads, block_mask=mask).transpose(1, 2)
    output, beside = cast(Any, compiled_flex())(*heads, block_mask=mask, return_aux=AuxRequest(lse=True))
    return add_means(output.transpose(1, 2), beside.lse, query, key, value, cast(HeadTable, table))


def flash_attention_4(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: Table
) -> torch.Tensor:
    """FlashAttention-4 on Hopper. All kept blocks are listed as whole ones, in rising order, since it masks what is behind
    the last token in the last block of a list."""
    from flash_attn.cute import flash_attn_func  # an optional package
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    count, order = _lists(table, query.device)
    lists = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(count),
        mask_block_idx=torch.zeros_like(order),
        full_block_cnt=count,
        full_block_idx=order,
        block_size=(table.block, table.block),
    )
    if adds_means(table):
        output, sums = flash_attn_func(query, key, value, block_sparse_tensors=lists, return_lse=True)[:2]
        return add_means(output, sums, query, key, value, cast(HeadTable, table))
    output = cast(Any, flash_attn_func(query, key, value, block_sparse_tensors=lists))
    return output[0] if isinstance(output, tuple) else output


def exact_sparse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    picked: torch.Tensor,
    table: Table | None = None,
) -> torch.Tensor:
    """Attention of some queries over the blocks of a table in float64, `[B, N, H, D]`; over all without one.

    Args:
        query, key, value: `[B, L, H, D]`. picked: numbers of the queries, `[N]`.
    """
    if not isinstance(table, HeadTable):
        return exact_attention(query, key, value, picked, None if table is None else table.of_tokens(picked))
    outputs = []
    for head, (own, added) in enumerate(zip(table.tables, table.added, strict=True)):
        each = [tensor[:, :, head : head + 1] for tensor in (query, key, value)]
        allowed = own.of_tokens(picked)
        if added:
            each[1:] = [with_means(tensor.double(), table.block) for tensor in each[1:]]
            allowed = table.bias(head, picked)
        outputs.append(exact_attention(each[0], each[1], each[2], picked, allowed))
    return torch.cat(outputs, 2)


MOST_SCORES = 1 << 26
"""Scores of queries and means that are in memory at once: 256 MiB in float32."""


def add_means(
    output: torch.Tensor,
    sums: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: HeadTable,
) -> torch.Tensor:
    """Put the means of the blocks that a kernel left out into its output, for the heads that add them.

    Args:
        output: of the kernel, `[B, L, H, D]`. sums: logarithm of the sum of exponentials of its scores, `[B, H, L]`.
        query, key, value: `[B, L, H, D]`.
    """
    tokens, block, device = table.tokens, table.block, query.device
    sizes = block_sizes(tokens, block).to(device).log()
    blocks = torch.arange(tokens, device=device) // block
    at_once = max(1, MOST_SCORES // (len(query) * len(sizes)))
    result = output.clone()
    for head in (number for number, added in enumerate(table.added) if added):
        keys, values = (block_means(each[:, :, head : head + 1], block)[:, :, 0] for each in (key, value))
        seen = _kept(table.tables[head], device)
        for start in range(0, tokens, at_once):
            some = slice(start, start + at_once)
            scores = query[:, some, head].to(keys.dtype) @ keys.mT * query.shape[-1] ** -0.5 + sizes
            scores = scores.masked_fill(seen[blocks[some]], float("-inf"))
            first = sums[:, head, some, None].to(scores.dtype)
            whole = torch.logaddexp(first, scores.logsumexp(-1, keepdim=True))
            own = output[:, some, head].to(scores.dtype) * (first - whole).exp()
            result[:, some, head] = (own + (scores - whole).exp() @ values).to(output.dtype)
    return result


Sparse = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Table], torch.Tensor]

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
