"""Wan 2.1 and 2.2 with VACE and Animate, and SkyReels-V2, which has the same transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from wanlab.models.families.base import CLIP, PICTURE, SEQUENTIAL, Family, Shape, Tensor, multiples
from wanlab.models.spec import Defaults, ModelSpec, Part

CLIP_TOKENS = 257
"""Tokens of one picture from CLIP ViT-H/14 at 224 pixels: 16 x 16 patches and the class token."""


class Wan(Family):
    """`WanTransformer3DModel` and its relatives: self-attention, cross-attention to the text (and the picture), FFN."""

    title = "Wan"
    pipelines: tuple[str, ...] = (r"Wan(?!Animate).*", r"SkyReelsV2.*")
    denoisers: tuple[str, ...] = (r"Wan(?!Animate).*Transformer3DModel", r"SkyReelsV2Transformer3DModel")
    defaults = Defaults(text_tokens=512)
    guidance = SEQUENTIAL
    encodes_clip = True
    roles = (
        *Family.roles,
        ("control", r"proj_in|proj_out"),  # of VACE, which carry the control video into and out of its blocks
    )

    def size_step(self, step: tuple[int, int]) -> tuple[int, int]:
        """The pipelines ask for multiples of 16."""
        return multiples(step, 16)

    def fixed_text_tokens(self, denoiser: Mapping[str, Any]) -> int | None:
        """Where the tokens of a picture stand before those of the text, diffusers takes the last 512 for the text."""
        return self.defaults.text_tokens if denoiser.get("image_dim") is not None else None

    def conditions(self, spec: ModelSpec) -> dict[str, str]:
        """The first picture; the last too where the transformer has position embeddings of two pictures."""
        needed = super().conditions(spec)
        # A `pos_embed_seq_len` holds the tokens of two pictures, which the transformer joins.
        two = needed and _config(spec).get("pos_embed_seq_len") is not None
        return needed | ({"last_image": PICTURE} if two else {})

    def denoiser_inputs(
        self, spec: ModelSpec, denoiser: Part, latent: Shape, tokens: int, text_tokens: int
    ) -> dict[str, Any]:
        """Latents `[1, C, T, H, W]`, timestep (one per token with `expand_timesteps`), text, and what the class adds."""
        config = denoiser.config
        size = latent[1:]
        times = (1, tokens) if spec.expand_timesteps else (1,)
        if "DiffusionForcing" in spec.pipeline_class:
            times = (1, latent[1])
        inputs: dict[str, Any] = {
            "hidden_states": Tensor((1, config["in_channels"], *size)),
            "timestep": Tensor(times),
            "encoder_hidden_states": Tensor((1, text_tokens, config["text_dim"])),
        }
        if config.get("image_dim") is not None and "Animate" not in denoiser.class_name:
            pictures = 2 if config.get("pos_embed_seq_len") is not None else 1
            shape = (pictures, _picture_tokens(spec), config["image_dim"])
            inputs["encoder_hidden_states_image"] = Tensor(shape)
        if "VACE" in denoiser.class_name:
            inputs["control_hidden_states"] = Tensor((1, config["vace_in_channels"], *size))
            inputs["control_hidden_states_scale"] = Tensor((len(config["vace_layers"]),))
        return inputs


class WanAnimate(Wan):
    """A person in a picture moves as a pose video and looks as a face video do."""

    title = "Wan Animate"
    pipelines = (r"WanAnimate.*",)
    stays: ClassVar[Mapping[str, str]] = {
        "vae_encoder": "which encodes a picture and clips of several lengths"
    }
    denoisers = (r"WanAnimateTransformer3DModel",)
    defaults = Defaults(height=720, width=1280, frames=77, fps=30, steps=20, guidance_scale=1.0)

    def conditions(self, spec: ModelSpec) -> dict[str, str]:
        """The picture and both videos."""
        return {"image": PICTURE, "pose_video": CLIP, "face_video": CLIP}

    def arguments(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The video is made in segments; here in one, as long as the whole."""
        return {"segment_frame_length": settings["frames"]}

    def denoiser_inputs(
        self, spec: ModelSpec, denoiser: Part, latent: Shape, tokens: int, text_tokens: int
    ) -> dict[str, Any]:
        """As for Wan, with one more latent frame for the reference picture; the pose has its own latents, the face its
        pixels."""
        config = denoiser.config
        frames, height, width = latent[1:]
        side = config["motion_encoder_size"]
        pixels = (frames - 1) * spec.temporal_factor + 1
        return {
            "hidden_states": Tensor((1, config["in_channels"], frames + 1, height, width)),
            "timestep": Tensor((1,)),
            "encoder_hidden_states": Tensor((1, text_tokens, config["text_dim"])),
            "encoder_hidden_states_image": Tensor((1, _picture_tokens(spec), config["image_dim"])),
            "pose_hidden_states": Tensor((1, latent[0], frames, height, width)),
            "face_pixel_values": Tensor((1, 3, pixels, side, side)),
        }

    def unpacked(self, latents: Any, latent: Shape) -> Any:
        """Without the latent frame of the reference picture."""
        return latents[:, -latent[1] :]


def _config(spec: ModelSpec) -> Mapping[str, Any]:
    return next((part.config for part in spec.parts if part.name == "transformer"), {})


def _picture_tokens(spec: ModelSpec) -> int:
    """Tokens of one picture from the model's own image encoder."""
    encoder = next((part.config for part in spec.parts if part.name == "image_encoder"), {})
    vision = encoder.get("vision_config", encoder)
    if "image_size" in vision and "patch_size" in vision:
        return (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    return CLIP_TOKENS
