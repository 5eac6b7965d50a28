"""The Wan VAE one chunk at a time, as functions without state.

`AutoencoderKLWan` walks through a clip and keeps, in a list of its own, the last frames that every causal
convolution has seen. Here that list is an input and an output: a step takes a chunk and the frames before it, and
gives the result and the frames for the next step. Memory is that of one chunk, whatever the length of the clip.

Two functions suffice for each half. The first chunk (one frame) is special because the temporal resamplers let it
pass; all later ones are alike when every cache has two frames after the first step: where the original keeps one
frame, or none for a temporal upsampler (its `"Rep"` mark), it pads with frames of zeros afterwards, so zeros in the
cache are the same function.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Caches = Mapping[str, torch.Tensor]


def decode_chunk(vae, latents: torch.Tensor, past: Caches | None) -> tuple[torch.Tensor, dict]:
    """Frames of one latent frame.

    Args:
        vae: an `AutoencoderKLWan`.
        latents: `[B, C, 1, H', W']`, not normalised.
        past: module name -> frames before this chunk, as the chunk before gave them; None for the first.

    Returns:
        `[B, 3, 4, s H', s W']` with s the VAE's spatial factor (one frame for the first chunk), clamped to [-1, 1] as
        `AutoencoderKLWan.decode` does, and the caches for the next chunk, in the order of computation.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    with _caching(vae.decoder, "decoder", past) as present:
        video = vae.decoder(vae.post_quant_conv(latents), first_chunk=past is None)
    if vae.config.patch_size is not None:
        video = unpatchify(video, patch_size=vae.config.patch_size)
    return video.clamp(-1.0, 1.0), present


def encode_chunk(vae, video: torch.Tensor, past: Caches | None) -> tuple[torch.Tensor, dict]:
    """Moments of one latent frame.

    Args:
        vae: an `AutoencoderKLWan`.
        video: `[B, 3, 1, H, W]` for the first chunk, `[B, 3, 4, H, W]` after it, in [-1, 1].
        past: as in `decode_chunk`.

    Returns:
        `[B, 2 * C, 1, H', W']`, mean first, not normalised, and the caches for the next chunk.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    if vae.config.patch_size is not None:
        video = patchify(video, patch_size=vae.config.patch_size)
    with _caching(vae.encoder, "encoder", past) as present:
        moments = vae.encoder(video)
    return vae.quant_conv(moments), present


def decode_in_chunks(vae, latents: torch.Tensor) -> torch.Tensor:
    """`AutoencoderKLWan.decode` by `decode_chunk`: `[B, C, T', H', W']` to `[B, 3, 1 + 4 (T' - 1), ...]`."""
    return _in_chunks(lambda chunk, past: decode_chunk(vae, chunk, past), latents, 1)


def encode_in_chunks(vae, video: torch.Tensor) -> torch.Tensor:
    """`AutoencoderKLWan.encode` by `encode_chunk`: `[B, 3, 1 + 4 k, H, W]` to `[B, 2 * C, 1 + k, H', W']`."""
    return _in_chunks(lambda chunk, past: encode_chunk(vae, chunk, past), video, 4)


def _in_chunks(step: Callable, whole: torch.Tensor, later: int) -> torch.Tensor:
    import torch

    past, made = None, []
    for chunk in (whole[:, :, :1], *whole[:, :, 1:].split(later, dim=2)):
        if chunk.shape[2]:
            result, past = step(chunk, past)
            made.append(result)
    return torch.cat(made, dim=2)


@contextmanager
def exportable(vae):
    """Give parts of `vae` forms that trace with free sizes and run fast in an engine; the same functions.

    As `vae_sequence.exportable_operators`, for the chunks of this module.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import AvgDown3D

    from wanlab.convert.onnx.vae_sequence import exportable_operators

    with exportable_operators(vae):
        for module in vae.modules():
            if type(module) is AvgDown3D:
                module.forward = types.MethodType(_average_down, module)
        yield vae


def _after_zeros(x: torch.Tensor, frames: int) -> torch.Tensor:
    import torch.nn.functional as F

    return F.pad(x, (0, 0, 0, 0, frames, 0))


def _average_down(self, x: torch.Tensor) -> torch.Tensor:
    """`AvgDown3D.forward` for `[B, C, T, H, W]` and a T that is known: padded only where it has to be."""
    import torch.nn.functional as F

    t, s, group = self.factor_t, self.factor_s, self.group_size
    missing = -x.shape[2] % t
    padding = (0, 0, 0, 0, missing, 0)
    if group == s * s and t > 1:  # one frame of a channel becomes one output channel
        x = F.avg_pool3d(x, (1, s, s))
        # Padded after pooling: ONNX Runtime folds a padding into a pooling that it is too wide for.
        x = F.pad(x, padding) if missing else x
        return x.unflatten(2, (-1, t)).transpose(2, 3).flatten(1, 2)
    if missing:
        x = F.pad(x, padding)
    if group % self.factor == 0:  # whole windows of one or more channels
        x = F.avg_pool3d(x, (t, s, s)) if self.factor > 1 else x
        return x if group == self.factor else x.unflatten(1, (self.out_channels, -1)).mean(dim=2)
    return type(self).forward(self, x)


@contextmanager
def _caching(half, prefix: str, past: Caches | None):
    """Let the modules of `half` read `past` and write the dict that this gives, while the context lasts."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample

    present: dict[str, torch.Tensor] = {}
    changed = []

    def change(module, forward) -> None:
        module.forward = types.MethodType(forward, module)
        changed.append(module)

    for name, module in half.named_modules(prefix=prefix):
        if isinstance(module, WanResample):
            change(module, _resample(name, past, present))
        elif isinstance(module, WanCausalConv3d) and module._padding[4] > 0:
            change(module, _convolve(name, past, present))
    try:
        yield present
    finally:
        for module in changed:
            del module.forward


def _convolve(name: str, past: Caches | None, present: dict) -> Callable:
    """`WanCausalConv3d.forward` after the frames of its cache; `[B, C, T, H, W]`."""
    import torch
    import torch.nn.functional as F

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *sides, frames, _ = self._padding
        x = _after_zeros(x, frames) if past is None else torch.cat([past[name], x], dim=2)
        present[name] = x[:, :, -frames:].clone()  # not a view: it would keep the whole chunk
        return torch.nn.Conv3d.forward(self, F.pad(x, (*sides, 0, 0)))

    return forward


def _resample(name: str, past: Caches | None, present: dict) -> Callable:
    """`WanResample.forward` for `[B, C, T, H, W]`; the first frame passes the temporal convolution by."""
    import torch

    cache = f"{name}.time_conv"

    def forward(self, x: torch.Tensor, feat_cache=None, feat_idx=None) -> torch.Tensor:
        if self.mode == "upsample3d":
            if past is None:
                present[cache] = _after_zeros(x, 2)[:, :, :2].clone()
            else:
                pairs = self.time_conv(x).unflatten(1, (2, x.shape[1]))  # [B, 2, C, T, H, W]
                # Frame t of the input becomes frames 2t and 2t + 1 of the output.
                x = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        frames = x.shape[2]
        x = self.resample(x.transpose(1, 2).flatten(0, 1))
        x = x.unflatten(0, (-1, frames)).transpose(1, 2)
        if self.mode == "downsample3d":
            present[cache] = x[:, :, -1:].clone()
            if past is not None:
                x = self.time_conv(torch.cat([past[cache], x], dim=2))
        return x

    return forward
