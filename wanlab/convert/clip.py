"""The size of a clip, in pixels and in latents."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wanlab.errors import WanlabError


@dataclass(frozen=True)
class ClipShape:
    """What a component is called with: pixels and frames of the clip, tokens of the text."""

    batch: int
    height: int
    width: int
    frames: int
    text_tokens: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.frames}x{self.height}x{self.width}, {self.text_tokens} text tokens"


def default_shape(model, **changes: int | None) -> ClipShape:
    """The model's own default clip at batch 2, with `changes` (None keeps the default)."""
    defaults = model.spec.defaults
    shape = ClipShape(2, defaults.height, defaults.width, defaults.frames, defaults.text_tokens)
    return replace(shape, **{key: value for key, value in changes.items() if value is not None})


def latent_size(pipeline, shape: ClipShape) -> tuple[int, int, int]:
    """Latent frames, height and width of a clip.

    Raises:
        WanlabError: the frames are not 1 + a multiple of the temporal factor, or height or width is
            no multiple of what one token covers.
    """
    config = pipeline.vae.config
    temporal, spatial = config.scale_factor_temporal, config.scale_factor_spatial
    expert = getattr(pipeline, "transformer", None) or getattr(pipeline, "transformer_2", None)
    _, patch_h, patch_w = expert.config.patch_size if expert is not None else (1, 1, 1)
    if (shape.frames - 1) % temporal:
        near = round((shape.frames - 1) / temporal) * temporal + 1
        raise WanlabError(f"frames is {shape.frames}; this model takes {temporal}k + 1 frames, e.g. {near}")
    for name, value, step in (
        ("height", shape.height, spatial * patch_h),
        ("width", shape.width, spatial * patch_w),
    ):
        if value < step or value % step:
            near = max(round(value / step), 1) * step
            raise WanlabError(f"{name} is {value}; this model takes multiples of {step} pixels, e.g. {near}")
    return (shape.frames - 1) // temporal + 1, shape.height // spatial, shape.width // spatial
