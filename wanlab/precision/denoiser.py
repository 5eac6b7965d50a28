"""Calls of a model's denoisers: what one is called with, as it is recorded and as it is drawn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from wanlab import heldout
from wanlab.core.errors import WanlabError
from wanlab.engines.pipeline import EnginePart
from wanlab.models.calls import drawn, flat, gathered
from wanlab.models.shapes import LatentShape, latent_shape, nearest_size
from wanlab.models.taps import component_calls, intercept_calls

UNRECORDED = ("return_dict", "attention_kwargs", "joint_attention_kwargs")
"""Arguments that do not change what a denoiser computes here."""


def eager_network(model, component: str) -> torch.nn.Module:
    """The network of a component as PyTorch runs it.

    Raises:
        WanlabError: it is not loaded, or an engine runs in its place.
    """
    network = model.component(component)
    if isinstance(network, EnginePart) or not isinstance(network, torch.nn.Module):
        raise WanlabError(
            f"{component} runs on {model.engines.get(component, type(network).__name__)}: use the model as it was"
            " loaded, before engines replaced its components"
        )
    return network


def named_arguments(network: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names, in the order of the network's `forward`, without those that are None or change
    nothing (`UNRECORDED`)."""
    bound = inspect.signature(network.forward).bind(*args, **kwargs).arguments
    return {name: value for name, value in bound.items() if value is not None and name not in UNRECORDED}


def taken_apart(arguments: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of arguments by name (`image_rotary_emb_0` for the first of several), and plain values by name."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in flat(arguments).items():
        several = list(value) if isinstance(value, tuple | list) else []
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, int | float | str) or all(isinstance(each, int | float) for each in several):
            values[name] = several or value
        else:
            raise WanlabError(
                f"{name} of a denoiser's call is {type(value).__name__}, which cannot be recorded; only tensors, numbers and"
                " texts can"
            )
    return tensors, values


def put_together(
    network: torch.nn.Module, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a call from what `taken_apart` made, in the order of the network's `forward`, on its device."""
    device = next(network.parameters()).device
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    given |= {name: tensor.to(device) for name, tensor in tensors.items()}
    return gathered(given, inspect.signature(network.forward).parameters)


def output_of(network: torch.nn.Module, arguments: Mapping[str, Any]) -> torch.Tensor:
    """What a denoiser answers to a call."""
    return network(**arguments, return_dict=False)[0]


def small_shape(model) -> LatentShape:
    """Latents of a clip of 8 x 8 tokens and two latent frames; of the model's usual size where it makes no other."""
    spec = model.spec
    side = 8 * spec.spatial_factor * spec.patch[1]
    wide = 8 * spec.spatial_factor * spec.patch[2]
    frames = 1 + (2 * spec.patch[0] - 1) * spec.temporal_factor
    usual = spec.defaults
    try:
        return latent_shape(spec, *nearest_size(spec, side, wide, frames))
    except WanlabError:
        return latent_shape(spec, *nearest_size(spec, usual.height, usual.width, usual.frames))


def drawn_arguments(
    model, component: str, latent: LatentShape | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Random arguments of a call of a denoiser, batch 1; empty where wanlab does not know how its class is called.

    Args:
        latent: latents of the clip; those of `small_shape` if not given.
        seed: seed of the values, which are drawn as `models.calls.drawn` says.
    """
    spec, network = model.spec, eager_network(model, component)
    latent = small_shape(model) if latent is None else latent
    shape = (latent.channels, latent.frames, latent.height, latent.width)
    part = spec.part(spec.part_of(component))
    inputs = model.family.denoiser_inputs(spec, part, shape, latent.tokens, model.text_tokens)
    return drawn(inputs, torch.Generator().manual_seed(seed), network)


class _Seen(Exception):
    """Ends a generation once its first call of a denoiser was seen."""


def first_call(model, component: str) -> dict[str, Any]:
    """Arguments of the first call of a denoiser in a generation at the model's usual size, of which nothing more
    is computed; empty where none can be made.

    For a family that wanlab does not know: what its denoiser takes is seen, not stated.
    """
    found: dict[str, Any] = {}
    network = eager_network(model, component)
    given = heldout.inputs(model.conditions, model.spec.defaults.frames)

    def wrap(call):
        def see(*args, **kwargs):
            found.update(named_arguments(network, args, kwargs))
            raise _Seen

        return see

    points = {
        attribute: {method: wrap for method, name in methods.items() if name == component}
        for attribute, methods in component_calls(model.pipeline).items()
    }
    try:
        with intercept_calls(model.pipeline, {key: methods for key, methods in points.items() if methods}):
            # Of one step some schedules cannot be made.
            model.generate(**given, prompt=heldout.example_case().caption, steps=2, output="latent")
    except (_Seen, WanlabError):
        return found
    return found


def small_forward(model, component: str) -> Callable[[], object] | None:
    """A call of an expert on random inputs of a clip of 8 x 8 tokens and two latent frames; of a family that wanlab does not
    know on the inputs of a generation's first step. None where neither can be had."""
    arguments = drawn_arguments(model, component) or first_call(model, component)
    network = eager_network(model, component)
    return (lambda: output_of(network, arguments)) if arguments else None
