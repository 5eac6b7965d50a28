"""Attention of the Wan experts in a form that exports to plain operators."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of neighbouring channels, bit for bit what diffusers computes.

    The original writes the even and the odd channels into an empty tensor, which exports to ScatterND
    (slow everywhere, and no engine fuses it). Stacking the two and flattening is the same tensor.

    Args:
        x: `[B, S, H, D]`.
        cos, sin: `[1, S, 1, D]`, every value twice.

    Returns:
        `[B, S, H, D]`, dtype of `x`.
    """
    import torch

    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class ExportableAttention:
    """Attention processor for `WanAttention` without in-place writes or backend dispatch.

    For experts without CLIP image embeddings (all of Wan2.2), with `attention_mask=None`.

    Attributes:
        fused: say rotary embedding and attention as the operators of ONNX opset 23. They take heads inside the
            last axis, so that nothing needs to be transposed.
    """

    def __init__(self, *, fused: bool) -> None:
        self.fused = fused

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ) -> torch.Tensor:
        """`[B, S, C]` to `[B, S, C]`, as `WanAttnProcessor.__call__`."""
        from diffusers.models.transformers.transformer_wan import _get_qkv_projections

        query, key, value = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        mix = self._with_operators if self.fused else self._with_arithmetic
        mixed = mix(query, key, value, attn.heads, rotary_emb).type_as(query)
        return attn.to_out[1](attn.to_out[0](mixed))

    def _with_operators(self, query, key, value, heads: int, rotary_emb) -> torch.Tensor:
        import torch

        operators = torch.onnx.ops
        if rotary_emb is not None:
            # The operator wants every value once, and one dtype: that of the tables, as the original computes.
            cos, sin = (
                table[:, :, 0, first::2].expand(query.shape[0], -1, -1)  # [B, S, D / 2]
                for first, table in enumerate(rotary_emb)
            )
            query, key = (
                operators.rotary_embedding(
                    tensor.to(cos.dtype), cos, sin, interleaved=True, num_heads=heads
                ).type_as(value)
                for tensor in (query, key)
            )
        return operators.attention(query, key, value, q_num_heads=heads, kv_num_heads=heads)[0]

    def _with_arithmetic(self, query, key, value, heads: int, rotary_emb) -> torch.Tensor:
        import torch.nn.functional as F

        query, key, value = (tensor.unflatten(2, (heads, -1)) for tensor in (query, key, value))
        if rotary_emb is not None:
            query, key = rotate_pairs(query, *rotary_emb), rotate_pairs(key, *rotary_emb)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [B, H, S, D]
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2, 3)


def plain_root_mean_square_norm(self, x: torch.Tensor) -> torch.Tensor:
    """`torch.nn.RMSNorm.forward` as the chain of operators that ONNX Runtime fuses into one kernel."""
    return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


@contextmanager
def exportable_attention(expert, *, fused: bool):
    """Give every `WanAttention` of `expert` the exportable processor while the context lasts.

    Args:
        fused: for opsets from 23 on, which have operators for attention, rotary embedding and norms; before,
            the norms of queries and keys are written as plain operators too.
    """
    import types

    from diffusers.models.transformers.transformer_wan import WanAttention

    attentions = [module for module in expert.modules() if isinstance(module, WanAttention)]
    norms = [] if fused else [norm for module in attentions for norm in (module.norm_q, module.norm_k)]
    before = [module.processor for module in attentions]
    for module in attentions:
        module.processor = ExportableAttention(fused=fused)
    for norm in norms:
        norm.forward = types.MethodType(plain_root_mean_square_norm, norm)
    try:
        yield expert
    finally:
        for module, processor in zip(attentions, before, strict=True):
            module.processor = processor
        for norm in norms:
            del norm.forward
