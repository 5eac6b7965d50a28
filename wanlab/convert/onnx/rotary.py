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
    """

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ) -> torch.Tensor:
        """`[B, S, C]` to `[B, S, C]`, as `WanAttnProcessor.__call__`."""
        import torch.nn.functional as F
        from diffusers.models.transformers.transformer_wan import _get_qkv_projections

        query, key, value = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query = attn.norm_q(query).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(key).unflatten(2, (attn.heads, -1))
        value = value.unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query, key = rotate_pairs(query, *rotary_emb), rotate_pairs(key, *rotary_emb)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [B, H, S, D]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        mixed = mixed.transpose(1, 2).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](mixed))


def plain_root_mean_square_norm(self, x: torch.Tensor) -> torch.Tensor:
    """`torch.nn.RMSNorm.forward` as the chain of operators that ONNX Runtime fuses into one kernel."""
    return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


@contextmanager
def exportable_attention(expert, *, plain_norms: bool = True):
    """Give every `WanAttention` of `expert` the exportable processor while the context lasts.

    Args:
        plain_norms: also write the norms of queries and keys as plain operators, for opsets before 23;
            from 23 on the exporter has an operator for them.
    """
    import types

    from diffusers.models.transformers.transformer_wan import WanAttention

    attentions = [module for module in expert.modules() if isinstance(module, WanAttention)]
    norms = [norm for module in attentions for norm in (module.norm_q, module.norm_k)] if plain_norms else []
    before = [module.processor for module in attentions]
    for module in attentions:
        module.processor = ExportableAttention()
    for norm in norms:
        norm.forward = types.MethodType(plain_root_mean_square_norm, norm)
    try:
        yield expert
    finally:
        for module, processor in zip(attentions, before, strict=True):
            module.processor = processor
        for norm in norms:
            del norm.forward
