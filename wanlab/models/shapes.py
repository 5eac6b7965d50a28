"""Conversion of pixels and frames to latents and tokens, and the nearest legal video sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from wanlab.core.errors import WanlabError
from wanlab.models.families import family_of
from wanlab.models.spec import ModelSpec


@dataclass(frozen=True)
class LatentShape:
    """Shape of the latent video `[channels, frames, height, width]` and the tokens an expert sees."""

    channels: int
    frames: int
    height: int
    width: int
    tokens: int


def latent_shape(spec: ModelSpec, height: int, width: int, frames: int) -> LatentShape:
    """Latent shape and token count of a video.

    A causal VAE turns `temporal_factor * k + 1` frames into `k + 1` latent frames (the first is encoded alone)
    and `spatial_factor` pixels into one position; the expert joins `patch` positions into a token.

    Args:
        spec: the model.
        height, width: size in pixels.
        frames: number of frames, including the first.

    Raises:
        WanlabError: the size is not legal; the message names the nearest legal one.
    """
    wrong = [
        name
        for name, value in (("height", height), ("width", width), ("frames", frames))
        if not _whole(value)
    ]
    if wrong:
        raise WanlabError(f"{wrong[0]} must be a whole number of at least 1")
    step_h, step_w = spec.size_step
    heights, widths = _nearest(height, step_h, 0), _nearest(width, step_w, 0)
    counts = _nearest(frames, spec.frame_step, 1)
    faults = []
    if heights != [height] or widths != [width]:
        legal = " or ".join(f"{h}x{w}" for h in heights for w in widths)
        faults.append(
            f"size {height}x{width} is not legal, height must be a multiple of {step_h} and width of"
            f" {step_w}: the nearest is {legal}"
        )
    if counts != [frames]:
        faults.append(
            f"{frames} frames are not legal, they must be {spec.frame_step}k+1:"
            f" the nearest is {' or '.join(map(str, counts))}"
        )
    if not faults and (refusal := family_of(spec.pipeline_class).refuses(spec, height, width, frames)):
        faults.append(f"size {height}x{width} with {frames} frames cannot be made: {refusal}")
    if faults:
        raise WanlabError(f"{spec.name}: {'; '.join(faults)}")
    latent, grid = _grid(spec, height, width, frames)
    if spec.max_positions is not None and max(grid) > spec.max_positions:
        raise WanlabError(
            f"{spec.name}: {height}x{width}x{frames} needs {max(grid)} positions along one axis, its position"
            f" embedding has {spec.max_positions}; choose a smaller video"
        )
    return LatentShape(spec.latent_channels, *latent, tokens=math.prod(grid))


def token_count(spec: ModelSpec, height: int, width: int, frames: int) -> int:
    """Tokens of a video of a size on the grid, whether or not the model can make it."""
    return math.prod(_grid(spec, height, width, frames)[1])


def _grid(
    spec: ModelSpec, height: int, width: int, frames: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Latent frames, height and width, and tokens along each."""
    t, h, w = (
        (frames - 1) // spec.temporal_factor + 1,
        height // spec.spatial_factor,
        width // spec.spatial_factor,
    )
    return (t, h, w), (-(-t // spec.patch[0]), -(-h // spec.patch[1]), -(-w // spec.patch[2]))


def nearest_size(spec: ModelSpec, height: int, width: int, frames: int) -> tuple[int, int, int]:
    """The legal (height, width, frames) nearest to this size; the larger of two equally near.

    Raises:
        WanlabError: a value is not a whole number of at least 1.
    """
    for name, value in (("height", height), ("width", width), ("frames", frames)):
        if not _whole(value):
            raise WanlabError(f"{name} must be a whole number of at least 1")
    step_h, step_w = spec.size_step
    return (
        _nearest(height, step_h, 0)[-1],
        _nearest(width, step_w, 0)[-1],
        _nearest(frames, spec.frame_step, 1)[-1],
    )


def _whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and value >= 1


def _nearest(value: int, step: int, offset: int) -> list[int]:
    """Values `k * step + offset` nearest to `value`: one, or two when it lies exactly between them."""
    below = (value - offset) // step * step + offset
    low, high = max(below, offset or step), below + step
    if value <= low:
        return [low]
    if value - low == high - value:
        return [low, high]
    return [low if value - low < high - value else high]
