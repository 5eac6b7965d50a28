"""Mochi: a VAE that compresses 8 x 8 x 6, and joint attention of video and text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from wanlab.models.families.base import Family, Shape, Tensor
from wanlab.models.spec import Defaults, ModelSpec, Part

THRESHOLD = 0.025
"""Noise up to which Mochi goes in even steps (`threshold_noise` of its pipeline)."""


class Mochi(Family):
    """`MochiTransformer3DModel`: joint attention, an FFN per stream."""

    title = "Mochi"
    pipelines = (r"Mochi.*",)
    denoisers = (r"MochiTransformer3DModel",)
    defaults = Defaults(
        height=480, width=848, frames=19, fps=30, steps=64, guidance_scale=4.5, text_tokens=256
    )
    fewest_steps = 2  # its schedule has a first half and a second
    roles = (("joint attention", r"attn1"), *Family.roles)
    text_first = False

    def compression(self, vae: Mapping[str, Any]) -> tuple[int, int]:
        """Products of the VAE's expansions."""
        return (
            math.prod(vae.get("spatial_expansions", (2, 2, 2))),
            math.prod(vae.get("temporal_expansions", (1, 2, 3))),
        )

    def schedule(self, spec: ModelSpec, steps: int, tokens: int) -> dict[str, Any]:
        """Noise that grows evenly to THRESHOLD over half of the steps, then as a parabola with the same slope up to 1: the
        linear-quadratic schedule of Movie Gen (arXiv:2410.13720)."""
        half = steps // 2
        slope, rest = THRESHOLD / half, steps - half
        bend = 1 - THRESHOLD - slope * rest
        noise = [slope * i + (bend * ((i - half) / rest) ** 2 if i > half else 0.0) for i in range(steps)]
        return {"sigmas": [1.0 - value for value in noise]}

    def denoiser_inputs(
        self, spec: ModelSpec, denoiser: Part, latent: Shape, tokens: int, text_tokens: int
    ) -> dict[str, Any]:
        """Latents `[1, C, T, H, W]` and text with its mask."""
        config = denoiser.config
        return {
            "hidden_states": Tensor((1, config["in_channels"], *latent[1:])),
            "encoder_hidden_states": Tensor((1, text_tokens, config["text_embed_dim"])),
            "timestep": Tensor((1,)),
            "encoder_attention_mask": Tensor((1, text_tokens), "bool"),
        }
