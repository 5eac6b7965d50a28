"""The size of a clip, in pixels and in latents."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wanlab.models.shapes import latent_shape

AXES: dict[str, dict[int, str]] = {
    "input_ids": {0: "batch", 1: "text_tokens"},
    "attention_mask": {0: "batch", 1: "text_tokens"},
    "hidden_states": {0: "batch", 2: "latent_frames", 3: "latent_height", 4: "latent_width"},
    "timestep": {0: "batch", 1: "tokens"},
    "encoder_hidden_states": {0: "batch", 1: "text_tokens"},
    "latents": {0: "batch", 2: "latent_frames", 3: "latent_height", 4: "latent_width"},
    "video": {0: "batch", 2: "frames", 3: "height", 4: "width"},
}
"""Input -> {axis: what it is}, as `wanlab.export.components` names them: by place, as a free axis may be named by an
expression of a symbol (`4 * frames_units + 1`)."""


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


def latent_size(model, shape: ClipShape) -> tuple[int, int, int]:
    """Latent frames, height and width of a clip.

    Raises:
        WanlabError: the size is not legal for this model; names the nearest one that is.
    """
    latent = latent_shape(model.spec, shape.height, shape.width, shape.frames)
    return latent.frames, latent.height, latent.width
