"""Attention in FP8: how queries, keys and values become codes, the kernel for them, its simulation, and its error.

The mean of V over the tokens is taken off before and added to the output after, which is exact, since every row of the
softmax sums to one; Hopper's FP8 products add up in short accumulators, in which a common mean drowns the rest. The mean
of K over the tokens moves all scores of a query alike, so the softmax does not see it (Zhang et al. 2024, SageAttention,
arXiv:2410.02367). Rotating Q and K by one Hadamard matrix leaves their products as they are and spreads outliers over the
channels (Shah et al. 2024, FlashAttention-3, arXiv:2407.08608).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch

from wanlab.techniques.attention.errors import QUERIES, attention_error, exact_attention, sampled_queries
from wanlab.techniques.attention.kernels import KERNELS, Attention

CODES = torch.float8_e4m3fn
LARGEST = torch.finfo(CODES).max

HEADROOM = 256.0
"""What the weights of the softmax, at most 1, are multiplied with before they are rounded, as in FlashAttention-3: e4m3 has
steps of 1/512 near zero."""

SCORES = 1 << 24
"""Scores that the simulation holds at once."""


class Coded(NamedTuple):
    """Queries, keys and values in 8 bits.

    Attributes:
        query, key, value: codes, `[B, L, H, D]`.
        scales: of the three, `[B, H]` in float32; a code times its scale is what it stands for.
        value_mean: what was taken off the values, `[B, 1, H, D]` in float32.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    value_mean: torch.Tensor


def hadamard(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The Hadamard matrix of the largest power of two that divides `size`, with entries of 1 and -1 (Sylvester 1867)."""
    matrix = torch.ones(1, 1, device=device, dtype=dtype)
    while size % (2 * len(matrix)) == 0:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def rotated(values: torch.Tensor) -> torch.Tensor:
    """Channels, the last axis, rotated by a Hadamard matrix over its root, in parts of its size."""
    matrix = hadamard(values.shape[-1], values.device, values.dtype)
    parts = values.unflatten(-1, (-1, len(matrix))) @ matrix
    return parts.flatten(-2).float() * len(matrix) ** -0.5


def coded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rotate: bool = False,
    value_mean: bool = True,
    key_mean: bool = True,
) -> Coded:
    """Queries, keys and values, `[B, L, H, D]`, as codes with a scale for each head.

    Args:
        rotate: whether queries and keys are rotated. value_mean, key_mean: whether these means are taken off.
    """
    mean = value.float().mean(1, keepdim=True)
    mean = mean if value_mean else torch.zeros_like(mean)
    if key_mean:
        key = (key.float() - key.float().mean(1, keepdim=True)).to(key.dtype)
    if rotate:
        query, key = rotated(query), rotated(key)
    (q, q_scale), (k, k_scale), (v, v_scale) = map(_codes, (query.float(), key.float(), value.float() - mean))
    return Coded(q, k, v, (q_scale, k_scale, v_scale), mean)


def _codes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = values.abs().amax((1, 3)).clamp_min(1e-12) / LARGEST  # [B, H]
    return (values / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(CODES), scale


@functools.cache
def _compiled_coded() -> Callable[..., Coded]:
    return torch.compile(coded, dynamic=False)


def simulated(codes: Coded) -> torch.Tensor:
    """Attention of codes in PyTorch, `[B, L, H, D]` in float32: products of the values that codes stand for, in float32; the
    weights of the softmax are rounded to 8 bits as the kernel does."""
    query, key, value = (
        (each.float() * scale[:, None, :, None]).transpose(1, 2)
        for each, scale in zip(codes[:3], codes.scales, strict=True)
    )
    batch, heads, tokens, size = query.shape
    output = torch.empty_like(query)
    step = max(1, SCORES // (batch * heads * key.shape[2]))
    for start in range(0, tokens, step):
        scores = query[:, :, start : start + step] @ key.transpose(2, 3) * size**-0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        rounded = (weights * HEADROOM).to(CODES).float() / HEADROOM
        output[:, :, start : start + step] = rounded @ value / weights.sum(-1, keepdim=True)
    return output.transpose(1, 2)


def flash_attention_3(codes: Coded) -> torch.Tensor:
    """Attention of codes by FlashAttention-3, `[B, L, H, D]` in bfloat16."""
    from fa3_fwd_interface import flash_attn_func  # an optional package

    scales = dict(zip(("q_descale", "k_descale", "v_descale"), codes.scales, strict=True))
    output: Any = flash_attn_func(*codes[:3], **scales)
    return output[0] if isinstance(output, tuple) else output


KERNELS_FP8 = {"flash-attention-3": flash_attention_3, "simulated": simulated}


def fp8_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel: str,
    rotate: bool = False,
    told: Callable[[str, torch.dtype], None] | None = None,
    value_mean: bool = True,
    key_mean: bool = True,
) -> torch.Tensor:
    """Attention in FP8, `[B, L, H, D]` in the dtype of the queries.

    Args:
        kernel: one of `KERNELS_FP8`. rotate, value_mean, key_mean: see `coded`.
        told: called with the kernel and the dtype of what it multiplies, once it has run.
    """
    make = _compiled_coded() if query.device.type == "cuda" else coded
    codes = make(query, key, value, rotate, value_mean, key_mean)
    output = KERNELS_FP8[kernel](codes)
    if told is not None:
        told(kernel, codes.query.dtype)
    return (output.float() + codes.value_mean).to(query.dtype)


def kernel_here(device: torch.device, head_size: int | None = None) -> str:
    """The kernel in FP8 of a device: FlashAttention-3 where it runs, else the simulation."""
    return "simulated" if lacks_kernel(device, head_size) else "flash-attention-3"


def lacks_kernel(device: torch.device, head_size: int | None = None) -> str:
    """What FlashAttention-3 in FP8 needs and is not here; empty if it can run. Any dtype can be made codes."""
    return KERNELS["flash-attention-3"].lacks(device, None, head_size)


VARIANTS: dict[str, dict[str, bool]] = {
    "fp8": {"value_mean": True, "key_mean": True},
    "fp8, rotated": {"value_mean": True, "key_mean": True, "rotate": True},
    "fp8, V's mean left": {"value_mean": False, "key_mean": True},
    "fp8, both means left": {"value_mean": False, "key_mean": False},
}


def fp8_errors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    kernel: str = "auto",
    queries: int = QUERIES,
    variants: Sequence[str] = tuple(VARIANTS),
) -> pd.DataFrame:
    """Error of attention in FP8 against float64 on sampled queries, beside that of bfloat16.

    Args:
        query, key, value: `[B, L, H, D]`; their values in bfloat16 are what every variant starts from.
        kernel: one of `KERNELS_FP8`; `"auto"` is `kernel_here`. variants: of `VARIANTS`.

    Returns:
        DataFrame: variant (`"bf16"` first), kernel, error (norm of the difference over the norm), times_bf16.
    """
    query, key, value = (each.to(torch.bfloat16) for each in (query, key, value))
    kernel = kernel_here(query.device, query.shape[-1]) if kernel == "auto" else kernel
    reference = exact_attention(query, key, value, sampled_queries(query.shape[1], queries))

    def error(attention: Attention) -> float:
        return attention_error(attention, query, key, value, queries=queries, reference=reference)

    own = "sdpa-flash"
    bf16 = error(KERNELS[own].run)
    rows = [{"variant": "bf16", "kernel": own, "error": bf16, "times_bf16": 1.0}]
    for variant in variants:
        chosen: dict[str, Any] = {"kernel": kernel} | VARIANTS[variant]
        found = error(functools.partial(fp8_attention, **chosen))
        rows.append({"variant": variant, "kernel": kernel, "error": found, "times_bf16": found / bf16})
    return pd.DataFrame(rows)
