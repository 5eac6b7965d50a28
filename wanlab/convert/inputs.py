"""Inputs for an engine drawn from its own types: no model has to be loaded to time one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from wanlab.convert.clip import AXES, ClipShape
from wanlab.errors import WanlabError
from wanlab.models.shapes import latent_shape

if TYPE_CHECKING:
    import torch

DEFAULT_BATCH = 1


def random_feeds(engine, *, seed: int = 0, **changes: int | None) -> dict[str, torch.Tensor]:
    """Random inputs for an engine that was made by `wanlab.convert.export`.

    Args:
        engine: its metadata names the model, the component and the clip that it was traced with.
        changes: batch (1 by default), height, width, frames (pixels), text_tokens; None keeps the traced size.

    Returns:
        Input name -> tensor on the CPU in the engine's dtype: normal latents and text, pixels in [-1, 1], timesteps from
        900 to 100, tokens without padding.

    Raises:
        WanlabError: an engine that does not say what it was made from, or sizes that its graph does not take.
    """
    import torch

    from wanlab import models

    facts = engine.metadata
    if "model" not in facts or "shape" not in facts:
        raise WanlabError(
            "the engine does not say which model and clip it was made for; export it with wanlab"
        )
    spec = models.get(facts["model"])
    traced = json.loads(facts["shape"]) | {"batch": DEFAULT_BATCH}
    clip = ClipShape(**traced | {name: value for name, value in changes.items() if value is not None})
    latent = latent_shape(spec, clip.height, clip.width, clip.frames)
    sizes = {
        "batch": clip.batch,
        "text_tokens": clip.text_tokens,
        "tokens": latent.tokens,
        "frames": clip.frames,
        "height": clip.height,
        "width": clip.width,
        "latent_frames": latent.frames,
        "latent_height": latent.height,
        "latent_width": latent.width,
    }
    asked = {name for name, value in changes.items() if value is not None}
    generator = torch.Generator().manual_seed(seed)
    feeds = {}
    for name, (dtype, axes) in engine.inputs.items():
        shape = [_size(name, axis, size, sizes, asked) for axis, size in enumerate(axes)]
        feeds[name] = _draw(name, shape, getattr(torch, dtype), generator)
    return feeds


def _size(tensor: str, axis: int, size: int | str, sizes: dict[str, int], asked: set[str]) -> int:
    known = AXES.get(tensor, {}).get(axis, size)
    if isinstance(size, int):  # the graph was exported for this size only
        if str(known).removeprefix("latent_") in asked and sizes[known] != size:
            raise WanlabError(
                f"axis {axis} of {tensor} ({known}) is fixed at {size} and {sizes[known]} was asked for;"
                " leave the size out or export again with it"
            )
        return size
    if known not in sizes:
        raise WanlabError(f"axis {axis} of {tensor} is {known}, which no clip has; give the inputs yourself")
    return sizes[known]


def _draw(name: str, shape: list[int], dtype, generator):
    import torch

    if name == "input_ids":
        return torch.randint(0, 16, shape, generator=generator).to(dtype)
    if name == "attention_mask":
        return torch.ones(shape, dtype=dtype)
    if name == "timestep":
        steps = torch.linspace(900.0, 100.0, shape[0])
        return steps.view(-1, *[1] * (len(shape) - 1)).expand(shape).to(dtype).contiguous()
    values = torch.randn(shape, generator=generator)
    return (values.clamp(-1, 1) if name == "video" else values).to(dtype)
