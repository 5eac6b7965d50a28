"""The Wan VAE over a whole clip at once, exact.

`AutoencoderKLWan` walks through a clip in chunks (one latent frame each) and carries the last frames of
every causal convolution along, so that memory stays bounded at 720p. For a short clip the same function can
be computed in one pass: a causal convolution with a cache is the causal convolution over the whole clip, and
only the two temporal resamplers treat the first frame on its own. One pass means a fifth of the kernel
launches on 17 frames, and a graph without the unrolled chunks when it is exported.

Memory grows with the number of frames, so this form is for clips that fit; the chunked form stays the
default.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def whole_clip_resampling(vae):
    """Let the temporal resamplers of `vae` work on whole clips while the context lasts.

    Everything else in `AutoencoderKLWan` already computes the whole clip when it gets no feature cache.
    """
    import types

    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample

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
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

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
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    video = vae.decoder(vae.post_quant_conv(latents), first_chunk=True)
    if vae.config.patch_size is not None:
        video = unpatchify(video, patch_size=vae.config.patch_size)
    return video


def _resample_whole_clip(self, x: torch.Tensor, feat_cache=None, feat_idx=None) -> torch.Tensor:
    """`WanResample.forward` over `[B, C, T, H, W]`: the first frame passes the temporal convolution by."""
    import torch

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
        # No padding: the first output looks at frames 0 to 2, and frame 0 itself goes through unchanged.
        x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
    return x


@contextmanager
def exportable_operators(vae):
    """Give parts of `vae` forms that trace with free sizes and run fast in an engine; the same function.

    For whole clips of 4k + 1 frames, so together with `whole_clip_resampling`. Four things change: the
    norms sum squares over channels by a convolution (a reduction over an axis in the middle is slow in
    ONNX Runtime), a downsampling shortcut becomes average pooling with a constant padding, an upsampling
    shortcut copies pixels instead of permuting eight axes, and nearest-exact upsampling by 2 becomes
    nearest, which is equal.
    """
    import types

    from diffusers.models.autoencoders.autoencoder_kl_wan import (
        AvgDown3D,
        DupUp3D,
        WanRMS_norm,
        WanUpsample,
    )

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
    import torch
    import torch.nn.functional as F

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
    import torch.nn.functional as F

    t, s, group = self.factor_t, self.factor_s, self.group_size
    padding = (0, 0, 0, 0, t - 1, 0)
    if group == s * s and t > 1:  # one frame of a channel becomes one output channel
        # Padded after pooling: ONNX Runtime folds a padding into a pooling that it is too wide for.
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
    import torch.nn.functional as F

    return F.interpolate(x, scale_factor=(float(factor), float(factor)), mode="nearest")
