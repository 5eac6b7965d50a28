"""HunyuanVideo: blocks of two streams, then blocks of one, over video and text together."""

from __future__ import annotations

from typing import Any

from wanlab.models.families.base import EMBEDDED, Family, Shape, Tensor, evenly, multiples
from wanlab.models.spec import Defaults, ModelSpec, Part

PICTURE_TOKENS = 576
"""Tokens of a picture in the template of image-to-video, of which every fourth or second is kept."""
ANSWER_TOKENS = 4
"""Tokens at the end of that template, in which the model would answer; they are left out."""


class HunyuanVideo(Family):
    """`HunyuanVideoTransformer3DModel`: joint attention; FFN per stream, or beside the attention in single blocks."""

    title = "HunyuanVideo"
    pipelines = (r"HunyuanVideo(?!15).*", r"HunyuanSkyreels.*")
    denoisers = (r"HunyuanVideoTransformer3DModel",)
    defaults = Defaults(
        height=720, width=1280, frames=129, fps=24, steps=50, guidance_scale=6.0, text_tokens=256
    )
    guidance = EMBEDDED
    roles = (
        ("joint attention", r"attn"),
        ("FFN", r"proj_mlp|proj_out"),  # of the single blocks, whose last layer joins attention and FFN
        *Family.roles,
    )
    text_first = False

    def size_step(self, step: tuple[int, int]) -> tuple[int, int]:
        """The pipelines ask for multiples of 16."""
        return multiples(step, 16)

    def schedule(self, spec: ModelSpec, steps: int, tokens: int) -> dict[str, Any]:
        """Even sigmas from 1 on, which the scheduler shifts."""
        return {"sigmas": evenly(1.0, 0.0, steps + 1)[:-1]}

    def denoiser_inputs(
        self, spec: ModelSpec, denoiser: Part, latent: Shape, tokens: int, text_tokens: int
    ) -> dict[str, Any]:
        """Latents `[1, C, T, H, W]`, text of Llama with its mask, pooled text of CLIP, and guidance times 1000."""
        config = denoiser.config
        if self.conditions(spec):  # the encoder sees the picture among the text
            kept = 4 if config.get("image_condition_type") == "token_replace" else 2
            text_tokens += PICTURE_TOKENS // kept - ANSWER_TOKENS
        inputs: dict[str, Any] = {
            "hidden_states": Tensor((1, config["in_channels"], *latent[1:])),
            "timestep": Tensor((1,)),
            "encoder_hidden_states": Tensor((1, text_tokens, config["text_embed_dim"])),
            "encoder_attention_mask": Tensor((1, text_tokens), "bool"),
            "pooled_projections": Tensor((1, config["pooled_projection_dim"])),
        }
        if config.get("guidance_embeds"):
            inputs["guidance"] = Tensor((1,))
        return inputs
