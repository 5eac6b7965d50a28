"""What differs between families of video models; this class is the one of a family that wanlab does not know."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from wanlab.core.text import convert
from wanlab.models.spec import Defaults, ModelSpec, Part

Shape = tuple[int, ...]
PICTURE, CLIP = "picture", "clip"
SEQUENTIAL, BATCHED, EMBEDDED = "sequential", "batched", "embedded"
_PICTURED = re.compile(r"ImageToVideo|Image2Video|I2V")
_FLAT_VAES = ("AutoencoderKL", "AutoencoderKLTemporalDecoder")
"""VAEs that encode every frame on its own."""
_BLOCK = re.compile(r"^\w*blocks\.\d+(?:\.|$)")
_BLOCK_LISTS = ("blocks", "transformer_blocks", "single_transformer_blocks")
OUTSIDE, OTHER = "outside the blocks", "other"


@dataclass(frozen=True)
class Grid:
    """How pixels and frames become latents, and latents tokens.

    Attributes:
        spatial_factor, temporal_factor: pixels and frames per latent position.
        patch: latent positions per token along `[T, H, W]`.
        latent_channels: channels of the latents.
        size_step: legal heights and widths are multiples of these, in pixels.
        frame_step: legal numbers of frames are `frame_step * k + 1`.
    """

    spatial_factor: int
    temporal_factor: int
    patch: tuple[int, int, int]
    latent_channels: int
    size_step: tuple[int, int]
    frame_step: int


class Family:
    """Facts of a family of models that its configuration files do not state. A new family is one file with a subclass.

    Attributes:
        title: name for a reader; empty if the family is not known.
        pipelines: patterns of the names of diffusers' pipeline classes, matched whole.
        denoisers: patterns of the names of diffusers' classes of their denoisers, matched whole.
        defaults: settings of a generation where a model states none.
        guidance: how guidance is computed: SEQUENTIAL (two calls of the denoiser a step), BATCHED (one call of twice the
            batch) or EMBEDDED (an input of the denoiser, one call).
        fewest_steps: smallest number of denoising steps that the pipeline can make.
        stays: components that cannot be converted to graphs -> the reason.
        encodes_clip: whether an image-to-video pipeline encodes the picture with blank frames up to the length of the
            video, and not the picture alone.
        roles: (role, pattern of the path of a layer inside its block); the first that matches counts.
        text_first: in joint attention, whether the tokens of the text stand before those of the video, or after them; None
            where the family has none, or is not known.
    """

    title = ""
    pipelines: tuple[str, ...] = ()
    denoisers: tuple[str, ...] = ()
    defaults = Defaults()
    guidance = BATCHED
    fewest_steps = 1
    stays: ClassVar[Mapping[str, str]] = {}
    encodes_clip = False
    roles: tuple[tuple[str, str], ...] = (
        ("cross-attention", r"attn2|cross_attn|crossattn"),
        ("self-attention", r"attn1|self_attn|attn|attention"),
        ("FFN", r"ffn?|ff_context|mlp|feed_forward|proj_mlp"),
        ("modulation", r"norm\w*|adaln\w*|modulation|scale_shift_table"),
    )
    text_first: bool | None = None

    def grid(self, vae: Part, denoiser: Part) -> Grid:
        """Compression factors, patch and legal sizes, from the configurations of the VAE and the denoiser.

        Raises:
            WanlabError: a configuration holds a factor that is not a number.
        """
        spatial, temporal = self.compression(vae.config)
        patch = self.patch(denoiser.config)
        channels = first(vae.config, ("z_dim", "latent_channels"), 16)
        step = (spatial * patch[1], spatial * patch[2])
        return Grid(spatial, temporal, patch, channels, self.size_step(step), temporal * patch[0])

    def compression(self, vae: Mapping[str, Any]) -> tuple[int, int]:
        """Pixels per latent position in space, and frames in time."""
        levels = len(vae.get("block_out_channels", range(4))) - 1
        frames = 1 if vae.get("_class_name") in _FLAT_VAES else 4
        names = ("scale_factor_temporal", "temporal_compression_ratio", "temporal_compression")
        return (
            first(vae, ("scale_factor_spatial", "spatial_compression_ratio"), 2**levels),
            first(vae, names, frames),
        )

    def patch(self, denoiser: Mapping[str, Any]) -> tuple[int, int, int]:
        """Latent positions per token along `[T, H, W]`."""
        where = "config.json of the model, patch_size"
        patch = convert(denoiser.get("patch_size") or 1, int | tuple[int, int, int], where)
        if isinstance(patch, tuple):
            return patch
        return convert(denoiser.get("patch_size_t") or 1, int, f"{where}_t"), patch, patch

    def size_step(self, step: tuple[int, int]) -> tuple[int, int]:
        """Step of legal heights and widths in pixels, where the pipeline asks for more than whole tokens."""
        return step

    def refuses(self, spec: ModelSpec, height: int, width: int, frames: int) -> str:
        """Why a size on the grid cannot be generated all the same; empty if it can."""
        return ""

    def text_tokens(self, denoiser: Mapping[str, Any]) -> int:
        """Tokens that a prompt is padded to where a model states none."""
        return self.defaults.text_tokens

    def fixed_text_tokens(self, denoiser: Mapping[str, Any]) -> int | None:
        """Tokens that every prompt has, whatever the tokenizer's limit, where the denoiser takes no other number."""
        return None

    def conditions(self, spec: ModelSpec) -> dict[str, str]:
        """Inputs that a generation needs besides the prompt: name of the pipeline's argument -> PICTURE or CLIP."""
        if "VideoToVideo" in spec.pipeline_class:
            return {"video": CLIP}
        return {"image": PICTURE} if _PICTURED.search(spec.pipeline_class) else {}

    def arguments(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Further arguments of the pipeline's call for a generation with these settings."""
        return {}

    def schedule(self, spec: ModelSpec, steps: int, tokens: int) -> dict[str, Any]:
        """Arguments with which the pipeline sets the timesteps of its scheduler, for `steps` denoising steps of a video of
        `tokens` tokens; empty if that is not known."""
        return {"num_inference_steps": steps}

    def denoiser_inputs(
        self, spec: ModelSpec, denoiser: Part, latent: Shape, tokens: int, text_tokens: int
    ) -> dict[str, Any]:
        """Inputs of one call of the denoiser, batch 1: shapes of tensors (tuples of whole numbers), or values.

        Args:
            spec: the model.
            denoiser: its denoiser.
            latent: `[C, T, H, W]` of the latent video.
            tokens, text_tokens: tokens of the video, and of the prompt with padding.

        Returns:
            Argument of the denoiser -> `Tensor` for a tensor, a tuple of them, or a value; empty if it is not known.
        """
        return {}

    def role(self, layer: str) -> str:
        """Role of a layer by its path in the denoiser: `blocks.3.attn1.to_q` -> "self-attention"; OUTSIDE for embeddings
        and the like, also where these have blocks of their own; OTHER where the path does not tell."""
        inside = _BLOCK.split(layer)
        if len(inside) == 1:
            return OUTSIDE
        for role, pattern in self.roles:
            if re.match(rf"(?:{pattern})(?:\.|$)", inside[-1]):
                return role
        return OTHER

    def unpacked(self, latents: Any, latent: Shape) -> Any:
        """Latents as the pipeline returns them, an array, as `[C, T, H, W]`."""
        return latents

    def __repr__(self) -> str:
        return self.title or "a family that wanlab does not know"


@dataclass(frozen=True)
class Tensor:
    """A tensor of the denoiser's call: its shape, and whether it holds whole numbers or booleans in place of floats."""

    shape: Shape
    dtype: str = "float"


def block_order(name: str) -> int:
    """Place of a list of blocks among the lists of a denoiser, by its name, in the order in which layers are numbered."""
    return _BLOCK_LISTS.index(name) if name in _BLOCK_LISTS else len(_BLOCK_LISTS)


def first(config: Mapping[str, Any], keys: tuple[str, ...], otherwise: int) -> int:
    """The first stated whole number among some keys of a configuration.

    Raises:
        WanlabError: it is not a whole number.
    """
    key = next((key for key in keys if config.get(key) is not None), None)
    return otherwise if key is None else convert(config[key], int, f"config.json of the model, {key}")


def evenly(start: float, end: float, count: int) -> list[float]:
    """`count` numbers from start to end in equal steps, both included."""
    return [start + (end - start) * i / (count - 1) if count > 1 else start for i in range(count)]


def multiples(step: tuple[int, int], of: int) -> tuple[int, int]:
    """The smallest common multiples of two steps and a number."""
    return math.lcm(step[0], of), math.lcm(step[1], of)
