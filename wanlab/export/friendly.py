"""Networks in forms that export well: rotary and masked attention in plain operators, the VAE over a whole clip."""

from __future__ import annotations

import types
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import MochiAttention
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AvgDown3D,
    DupUp3D,
    WanResample,
    WanRMS_norm,
    WanUpsample,
    patchify,
    unpatchify,
)
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    _get_added_kv_projections,
    _get_qkv_projections,
)

TEXT_TOKENS = 512
"""Tokens of the text beside those of a picture, which diffusers takes as given."""


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of neighbouring channels, bitwise equal to that of diffusers.

    The original writes the even and the odd channels into an empty tensor, which exports to ScatterND
    (slow, and no engine fuses it). Stacking both and flattening gives the same tensor.

    Args:
        x: `[B, S, H, D]`.
        cos, sin: `[1, S, 1, D]`, every value twice.

    Returns:
        `[B, S, H, D]`, dtype of `x`.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class ExportableAttention:
    """Attention processor for `WanAttention` without in-place writes or backend dispatch.

    With `attention_mask=None`. Where an expert also attends to a picture (Wan2.1), its tokens come before the text.

    Attributes:
        fused: whether rotary embedding and attention are operators of ONNX opset 23, whose last axis contains the heads,
            so that no transpose is needed.
    """

    def __init__(self, *, fused: bool) -> None:
        self.fused = fused

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ) -> torch.Tensor:
        """`[B, S, C]` to `[B, S, C]`, like `WanAttnProcessor.__call__`."""
        picture = None
        if attn.add_k_proj is not None:
            picture, encoder_hidden_states = encoder_hidden_states.split(
                [encoder_hidden_states.shape[1] - TEXT_TOKENS, TEXT_TOKENS], dim=1
            )
        query, key, value = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        mix = self._with_operators if self.fused else self._with_arithmetic
        mixed = mix(query, key, value, attn.heads, rotary_emb).type_as(query)
        if picture is not None:
            key, value = _get_added_kv_projections(attn, picture)
            mixed = mixed + mix(query, attn.norm_added_k(key), value, attn.heads, None).type_as(query)
        return attn.to_out[1](attn.to_out[0](mixed))

    def _with_operators(self, query, key, value, heads: int, rotary_emb) -> torch.Tensor:
        operators = torch.onnx.ops
        if rotary_emb is not None:
            # The operator needs every value once, and one dtype: that of the tables, as in the original.
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
        query, key, value = (tensor.unflatten(2, (heads, -1)) for tensor in (query, key, value))
        if rotary_emb is not None:
            query, key = rotate_pairs(query, *rotary_emb), rotate_pairs(key, *rotary_emb)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [B, H, S, D]
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2, 3)


def plain_root_mean_square_norm(self, x: torch.Tensor) -> torch.Tensor:
    """`torch.nn.RMSNorm.forward` as a chain of operators that ONNX Runtime fuses into one kernel."""
    return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


@contextmanager
def exportable_attention(expert, *, fused: bool):
    """Give every `WanAttention` of `expert` the exportable processor inside the block.

    Args:
        expert: a `WanTransformer3DModel`.
        fused: whether the opset is 23 or later, with operators for attention, rotary embedding and norms; otherwise the
            norms of queries and keys are chains of operators too.
    """
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


class ExportableJointAttention:
    """Attention processor for `MochiAttention` whose shapes do not depend on the mask.

    diffusers picks the tokens of the text that count by their indices, which exports to NonZero: a graph whose sizes are
    known only once it runs, and which TensorRT does not read. Here all of them stay, and the mask leaves the others out.
    """

    def __call__(
        self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, S, C]` and `[B, L, C']` with a mask `[B, L]` to the same shapes, like `MochiAttnProcessor2_0.__call__`."""
        streams = [
            tuple(project(states).unflatten(2, (attn.heads, -1)) for project in projections)
            for states, projections in (
                (hidden_states, (attn.to_q, attn.to_k, attn.to_v)),
                (encoder_hidden_states, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)),
            )
        ]
        norms = ((attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k))
        streams = [
            tuple(x if norm is None else norm(x) for norm, x in zip((*pair, None), stream, strict=True))
            for pair, stream in zip(norms, streams, strict=True)
        ]
        if image_rotary_emb is not None:
            query, key, value = streams[0]
            streams[0] = (_turned(query, *image_rotary_emb), _turned(key, *image_rotary_emb), value)
        joint = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(*streams, strict=True))
        counts = attention_mask.bool()
        seen = F.pad(counts, (hidden_states.shape[1], 0), value=True)[:, None, None]  # the video counts whole
        mixed = F.scaled_dot_product_attention(*joint, attn_mask=seen).transpose(1, 2).flatten(2, 3)
        video, text = mixed.split_with_sizes((hidden_states.shape[1], counts.shape[1]), dim=1)
        text = _closed_up(text, counts)
        if hasattr(attn, "to_add_out"):
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](video)), text


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of neighbouring channels with tables `[S, H, D / 2]`, computed in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = (even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)
    return torch.stack(turned, dim=-1).flatten(-2)


def _closed_up(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The tokens that count, in front and without gaps, and zeros behind them, as diffusers pads them.

    A product with ones and zeros moves them: exact, and of one shape for every mask.

    Args:
        x: `[B, L, C]`.
        counts: `[B, L]`, booleans.
    """
    places = counts.long().cumsum(dim=1) - 1
    rows = torch.arange(counts.shape[1], device=counts.device)
    return ((places[:, None] == rows[:, None]) & counts[:, None]).to(x.dtype) @ x


@contextmanager
def exportable_joint_attention(network):
    """Give every `MochiAttention` of `network` the exportable processor inside the block."""
    attentions = [module for module in network.modules() if isinstance(module, MochiAttention)]
    before = [module.processor for module in attentions]
    for module in attentions:
        module.processor = ExportableJointAttention()
    try:
        yield network
    finally:
        for module, processor in zip(attentions, before, strict=True):
            module.processor = processor


@contextmanager
def whole_clip_resampling(vae):
    """Make the temporal resamplers of `vae` process whole clips inside the block.

    The other modules of `AutoencoderKLWan` process the whole clip if they get no feature cache.
    """
    resamplers = [module for module in vae.modules() if isinstance(module, WanResample)]
    for module in resamplers:
        module.forward = types.MethodType(_resample_whole_clip, module)
    try:
        yield vae
    finally:
        for module in resamplers:
            del module.forward


def encode_moments(vae, video: torch.Tensor) -> torch.Tensor:
    """Mean and log-variance of the latents; call inside `whole_clip_resampling`.

    Args:
        vae: an `AutoencoderKLWan`.
        video: `[B, 3, T, H, W]` in [-1, 1], T = 4k + 1.

    Returns:
        `[B, 2 * C, 1 + (T - 1) / 4, H / 8, W / 8]`, mean first, not normalised.
    """
    if vae.config.patch_size is not None:
        video = patchify(video, patch_size=vae.config.patch_size)
    return vae.quant_conv(vae.encoder(video))


def decode_video(vae, latents: torch.Tensor) -> torch.Tensor:
    """Video from latents; call inside `whole_clip_resampling`.

    Args:
        vae: an `AutoencoderKLWan`.
        latents: `[B, C, T', H', W']`, not normalised.

    Returns:
        `[B, 3, 1 + 4 (T' - 1), 8 H', 8 W']`, not clamped.
    """
    video = vae.decoder(vae.post_quant_conv(latents), first_chunk=True)
    if vae.config.patch_size is not None:
        video = unpatchify(video, patch_size=vae.config.patch_size)
    return video


def _resample_whole_clip(self, x: torch.Tensor, feat_cache=None, feat_idx=None) -> torch.Tensor:
    """`WanResample.forward` over `[B, C, T, H, W]`: the first frame skips the temporal convolution."""
    if self.mode == "upsample3d" and x.shape[2] > 1:
        first, rest = x[:, :, :1], x[:, :, 1:]
        pairs = self.time_conv(rest).unflatten(1, (2, x.shape[1]))  # [B, 2, C, T - 1, H, W]
        # Frame t of the input becomes frames 2t and 2t + 1 of the output.
        rest = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x = torch.cat([first, rest], dim=2)
    frames = x.shape[2]
    x = self.resample(x.transpose(1, 2).flatten(0, 1))
    x = x.unflatten(0, (-1, frames)).transpose(1, 2)
    if self.mode == "downsample3d" and frames > 1:
        # No padding: the first output depends on frames 0 to 2, and frame 0 itself is not changed.
        x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
    return x


@contextmanager
def exportable_operators(vae):
    """Give parts of `vae` forms that trace with free sizes and run fast in an engine, with the same results.

    For whole clips of 4k + 1 frames, together with `whole_clip_resampling`. Four parts change: the
    norms sum squares over channels by a convolution (a reduction over an axis in the middle is slow in
    ONNX Runtime), a downsampling shortcut becomes average pooling with a constant padding, an upsampling
    shortcut copies pixels instead of permuting eight axes, and nearest-exact upsampling by 2 becomes
    nearest, which is equal.
    """
    forms = {
        AvgDown3D: _average_down,
        DupUp3D: _duplicate_up,
        WanRMS_norm: _root_mean_square_norm,
        WanUpsample: _upsample,
    }
    changed = [(module, forms[type(module)]) for module in vae.modules() if type(module) in forms]
    for module, form in changed:
        module.forward = types.MethodType(form, module)
    try:
        yield vae
    finally:
        for module, _ in changed:
            del module.forward


def _root_mean_square_norm(self, x: torch.Tensor) -> torch.Tensor:
    """`WanRMS_norm.forward` for `[B, C, T, H, W]` or `[B, C, H, W]`."""
    if not self.channel_first:
        return type(self).forward(self, x)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    channels = x.shape[1]
    ones = torch.ones((1, channels) + (1,) * (x.ndim - 2), dtype=wide.dtype, device=x.device)
    squares = (F.conv3d if x.ndim == 5 else F.conv2d)(wide.square(), ones)
    normal = wide * squares.clamp_min(1e-24).rsqrt()  # the original keeps the norm above 1e-12
    return normal.to(x.dtype) * (self.gamma * self.scale) + self.bias


def _average_down(self, x: torch.Tensor) -> torch.Tensor:
    """`AvgDown3D.forward` for `[B, C, T, H, W]` with T = 1 more than a multiple of the temporal factor.

    The original folds every factor into channels and averages groups of those. Where a group covers whole
    windows, that is average pooling, which also traces several times faster than splitting free axes.
    """
    t, s, group = self.factor_t, self.factor_s, self.group_size
    padding = (0, 0, 0, 0, t - 1, 0)
    if group == s * s and t > 1:  # one frame of a channel becomes one output channel
        # Padding after pooling, because ONNX Runtime fuses a padding into a pooling that does not allow its size.
        x = F.pad(F.avg_pool3d(x, (1, s, s)), padding).unflatten(2, (-1, t))  # [B, C, T, t, H, W]
        return x.transpose(2, 3).flatten(1, 2)
    if t > 1:
        x = F.pad(x, padding)
    if group % self.factor == 0:  # whole windows of one or more channels
        x = F.avg_pool3d(x, (t, s, s)) if self.factor > 1 else x
        return x if group == self.factor else x.unflatten(1, (self.out_channels, -1)).mean(dim=2)
    x = x.unflatten(4, (-1, s)).unflatten(3, (-1, s)).unflatten(2, (-1, t))  # [B, C, T, t, H, s, W, s]
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)  # [B, C * factor, T, H, W]
    return x.unflatten(1, (self.out_channels, group)).mean(dim=2)


def _duplicate_up(self, x: torch.Tensor, first_chunk: bool = False) -> torch.Tensor:
    """`DupUp3D.forward` for `[B, C, T, H, W]`."""
    t, s = self.factor_t, self.factor_s
    copies = self.repeats // (s * s)  # copies of a frame in time
    if copies * s * s != self.repeats or t % copies:
        # Neighbouring pixels come from different channels: the general form.
        return type(self).forward(self, x, first_chunk)
    x = x.unflatten(1, (self.out_channels, t // copies)).transpose(2, 3)  # [B, C', T, t / copies, H, W]
    if copies > 1:
        x = x.unsqueeze(4).expand(-1, -1, -1, -1, copies, -1, -1).flatten(3, 4)
    x = x.flatten(2, 3)  # [B, C', T * t, H, W]
    if first_chunk:
        x = x[:, :, t - 1 :]
    return _nearest(x.flatten(1, 2), s).unflatten(1, (self.out_channels, -1))


def _upsample(self, x: torch.Tensor) -> torch.Tensor:
    """`WanUpsample.forward` for `[B, C, H, W]` and whole factors."""
    return _nearest(x, int(self.scale_factor[0]))


def _nearest(x: torch.Tensor, factor: int) -> torch.Tensor:
    return F.interpolate(x, scale_factor=(float(factor), float(factor)), mode="nearest")
