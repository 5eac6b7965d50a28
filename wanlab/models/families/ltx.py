"""LTX-Video: latents packed to tokens before the transformer, and a VAE that compresses 32 x 32 x 8."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from wanlab.models.families.base import Family, Shape, Tensor, evenly, first, multiples
from wanlab.models.spec import Defaults, ModelSpec, Part


class Ltx(Family):
    """`LTXVideoTransformer3DModel`: self-attention, cross-attention, FFN."""

    title = "LTX-Video"
    pipelines = (r"LTX(?!2).*",)
    denoisers = (r"LTXVideoTransformer3DModel",)
    defaults = Defaults(
        height=512, width=704, frames=161, fps=25, steps=50, guidance_scale=3.0, text_tokens=128
    )
    fewest_steps = 2  # its scheduler stretches the noise between the first step and the last

    def compression(self, vae: Mapping[str, Any]) -> tuple[int, int]:
        """Patch of the VAE times 2 for every level that halves space and time, unless the configuration states them."""
        if not isinstance(levels := vae.get("spatio_temporal_scaling"), list):
            return super().compression(vae)
        halvings = 2 ** sum(map(bool, levels))
        return (
            first(vae, ("spatial_compression_ratio",), first(vae, ("patch_size",), 4) * halvings),
            first(vae, ("temporal_compression_ratio",), first(vae, ("patch_size_t",), 1) * halvings),
        )

    def size_step(self, step: tuple[int, int]) -> tuple[int, int]:
        """The pipelines ask for multiples of 32."""
        return multiples(step, 32)

    def schedule(self, spec: ModelSpec, steps: int, tokens: int) -> dict[str, Any]:
        """Even sigmas, shifted by `mu`, which grows linearly with the tokens (`calculate_shift` of diffusers, from Flux)."""
        if "Condition" in spec.pipeline_class:  # which makes its timesteps itself
            return {}
        config = spec.scheduler_config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = base + (tokens - low) * (most - base) / (high - low)
        return {"sigmas": evenly(1.0, 1 / steps, steps), "mu": mu}

    def denoiser_inputs(
        self, spec: ModelSpec, denoiser: Part, latent: Shape, tokens: int, text_tokens: int
    ) -> dict[str, Any]:
        """Packed latents `[1, tokens, C]`; in image-to-video a timestep per token, as the first frame is not noisy."""
        config = denoiser.config
        frames, height, width = latent[1:]
        pictured = bool(self.conditions(spec))
        return {
            "hidden_states": Tensor((1, tokens, config["in_channels"])),
            "encoder_hidden_states": Tensor((1, text_tokens, config["caption_channels"])),
            "timestep": Tensor((1, tokens) if pictured else (1,)),
            "encoder_attention_mask": Tensor((1, text_tokens)),
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (
                spec.temporal_factor / spec.defaults.fps,
                spec.spatial_factor,
                spec.spatial_factor,
            ),
        }

    def unpacked(self, latents: Any, latent: Shape) -> Any:
        """`[tokens, C]` with patch 1 to `[C, T, H, W]`."""
        if latents.ndim != 2 or latents.size != math.prod(latent):
            return latents
        return latents.T.reshape(latent)
