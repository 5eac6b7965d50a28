"""How exact an attention is: its error against float64 on sampled queries."""

from __future__ import annotations

import torch

from wanlab.techniques.attention.kernels import Attention

QUERIES = 64

LIMITS = {"bfloat16": 4e-3, "float16": 5e-4, "float32": 1e-5, "float64": 1e-12}
"""dtype -> largest error of a kernel that counts as exact: twice what rounding the result alone makes in half precision.
Kernels of PyTorch and FlashAttention have 0.0016 to 0.0022 in bfloat16 on an H200; SageAttention, in 8 bits, has 0.013."""


def sampled_queries(tokens: int, queries: int = QUERIES, seed: int = 0) -> torch.Tensor:
    """Numbers of some tokens, all different, in order."""
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:queries].sort()[0]


def exact_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    picked: torch.Tensor,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of some queries in float64, one head at a time.

    Args:
        query, key, value: `[B, L, H, D]`. picked: numbers of the queries, `[N]`.
        allowed: `[N, L]`, or `[H, N, L]` by head: which keys each of them may see, or what is added to its scores; None is
            all.

    Returns:
        `[B, N, H, D]` in float64.
    """
    batch, _, heads, size = query.shape
    output = query.new_empty(batch, len(picked), heads, size, dtype=torch.float64)
    picked = picked.to(query.device)
    for number in range(batch):
        for head in range(heads):
            scores = query[number, picked, head].double() @ key[number, :, head].double().t() * size**-0.5
            if allowed is not None:
                own = (allowed if allowed.ndim == 2 else allowed[head]).to(query.device)
                scores = scores.masked_fill(~own, float("-inf")) if own.dtype == torch.bool else scores + own
            output[number, :, head] = scores.softmax(-1) @ value[number, :, head].double()
    return output


def attention_error(
    attention: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    queries: int = QUERIES,
    seed: int = 0,
    reference: torch.Tensor | None = None,
) -> float:
    """Norm of the difference to float64 over its norm, on sampled queries.

    Args:
        query, key, value: `[B, L, H, D]`. reference: `exact_attention` of the queries that `seed` samples.
    """
    picked = sampled_queries(query.shape[1], queries, seed)
    exact = exact_attention(query, key, value, picked) if reference is None else reference
    output = attention(query, key, value)[:, picked.to(query.device)].double()
    return float((output - exact).norm() / exact.norm())
