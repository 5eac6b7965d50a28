"""CogVideoX: text and video tokens in one sequence of joint attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wanlab.models.families.base import Family, Grid, Shape, Tensor
from wanlab.models.spec import Defaults, ModelSpec, Part


class CogVideoX(Family):
    """`CogVideoXTransformer3DModel`: joint attention of text and video, FFN over both."""

    title = "CogVideoX"
    pipelines = (r"CogVideoX.*", r"ConsisID.*")
    denoisers = (r"CogVideoXTransformer3DModel", r"ConsisIDTransformer3DModel")
    defaults = Defaults(
        height=480, width=720, frames=49, fps=8, steps=50, guidance_scale=6.0, text_tokens=226
    )
    roles = (("joint attention", r"attn1"), *Family.roles)
    text_first = True

    def grid(self, vae: Part, denoiser: Part) -> Grid:
        """CogVideoX 1.5 joins two latent frames to a token and pads an odd number of them, so that every 4k+1 is legal."""
        grid = super().grid(vae, denoiser)
        return Grid(
            grid.spatial_factor,
            grid.temporal_factor,
            grid.patch,
            grid.latent_channels,
            grid.size_step,
            grid.temporal_factor,
        )

    def refuses(self, spec: ModelSpec, height: int, width: int, frames: int) -> str:
        """Learned position embeddings are those of one size, and the tables of CogVideoX 1.5 end at one."""
        config = spec.part(spec.part_of("expert")).config
        if config.get("patch_size_t"):
            most = config["sample_height"] * spec.spatial_factor, config["sample_width"] * spec.spatial_factor
            if height <= most[0] and width <= most[1]:
                return ""
            return f"its position embeddings end at {most[0]}x{most[1]}: take at most that size"
        if not config.get("use_learned_positional_embeddings"):
            return ""
        own = (
            config["sample_height"] * spec.spatial_factor,
            config["sample_width"] * spec.spatial_factor,
            config["sample_frames"],
        )
        if (height, width) == own[:2] and frames <= own[2]:
            return ""
        return f"its position embeddings are learned for {own[0]}x{own[1]} and up to {own[2]} frames: take that size"

    def text_tokens(self, denoiser: Mapping[str, Any]) -> int:
        """The length that the position embeddings are made for."""
        return denoiser.get("max_text_seq_length") or self.defaults.text_tokens

    def denoiser_inputs(
        self, spec: ModelSpec, denoiser: Part, latent: Shape, tokens: int, text_tokens: int
    ) -> dict[str, Any]:
        """Latents `[1, T, C, H, W]`, and rotary tables `[tokens, head size]` where the model uses them."""
        config = denoiser.config
        patch = spec.patch[0]
        frames = -(-latent[1] // patch) * patch
        inputs: dict[str, Any] = {
            "hidden_states": Tensor((1, frames, config["in_channels"], *latent[2:])),
            "encoder_hidden_states": Tensor((1, text_tokens, config["text_embed_dim"])),
            "timestep": Tensor((1,)),
        }
        if config.get("ofs_embed_dim"):
            inputs["ofs"] = Tensor((1,))
        if config.get("use_rotary_positional_embeddings"):
            table = Tensor((tokens, config["attention_head_dim"]))
            inputs["image_rotary_emb"] = (table, table)
        return inputs

    def unpacked(self, latents: Any, latent: Shape) -> Any:
        """`[T, C, H, W]` to `[C, T, H, W]`, without the frames that pad the last token in front."""
        return latents.swapaxes(0, 1)[:, -latent[1] :] if latents.shape[1] == latent[0] else latents
