"""Sizes and operation counts of every component, from its configuration alone: no weights, no device."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from wanlab.models.calls import described, dtype_of
from wanlab.models.families import family_of
from wanlab.models.families.base import Tensor
from wanlab.models.networks import parameter_names, skeleton
from wanlab.models.registry import get
from wanlab.models.shapes import LatentShape, latent_shape
from wanlab.models.spec import ModelSpec, Part

_KINDS = ("linear", "attention", "convolution", "other")
_DECODER_HALF = ("decoder.", "post_quant_conv.")
# From the third latent frame on, every frame costs the causal VAE the same, so two counts determine all.
_COUNTED_FRAMES = (3, 4)


def facts(
    spec: str | ModelSpec, *, height: int | None = None, width: int | None = None, frames: int | None = None
) -> pd.DataFrame:
    """Per component: class, parameters, bytes per dtype, and the operations of one forward at a video size.

    Columns: component, class_name, parameters, size_fp32_bytes, size_bf16_bytes (fp16 alike), size_fp8_bytes
    (int8 alike), linear_tflop, attention_tflop, convolution_tflop, other_tflop, total_tflop, input_shape.
    A forward is one call as the pipeline makes it, batch 1: the text encoder on one prompt, the encoder on
    the whole conditioning video (the first frame alone if `expand_timesteps`, and in families that
    encode only the picture), an expert on one step of one branch,
    the decoder on the whole video. Sizes are parameters times bytes; loading keeps some layers in
    float32 and needs a little more.

    Operations are those of matrix products and convolutions; a multiply-add counts as two, as in
    `torch.utils.flop_counter`. That counter runs on meta tensors; only for Wan experts without a picture encoder the
    formula of `wan_expert_flop` is used. Operations are NaN where wanlab does not know how a network is called.

    Args:
        spec: the model.
        height, width, frames: size of the video, in pixels and frames; default of the model if None.

    Raises:
        WanlabError: unknown model, or a video size that is not legal.
    """
    spec = spec if isinstance(spec, ModelSpec) else get(spec)
    defaults = spec.defaults
    height = defaults.height if height is None else height
    width = defaults.width if width is None else width
    frames = defaults.frames if frames is None else frames
    latent = latent_shape(spec, height, width, frames)
    modules: dict[str, torch.nn.Module] = {}
    rows = []
    for component in spec.components:
        part = spec.part(spec.part_of(component))
        if part.name not in modules:
            modules[part.name] = skeleton(part).to("meta")
        module = modules[part.name]
        parameters = _parameters(module, component)
        shape, work = _work(spec, component, part, module, latent, (height, width, frames))
        rows.append(
            {
                "component": component,
                "class_name": part.class_name,
                "parameters": parameters,
                "size_fp32_bytes": 4 * parameters,
                "size_bf16_bytes": 2 * parameters,
                "size_fp8_bytes": parameters,
                **{f"{kind}_tflop": work.get(kind, math.nan) / 1e12 for kind in _KINDS},
                "total_tflop": sum(work.get(kind, math.nan) for kind in _KINDS) / 1e12,
                "input_shape": shape,
            }
        )
    return pd.DataFrame(rows)


def wan_expert_flop(
    config: dict[str, Any], tokens: int, text_tokens: int, *, timestep_tokens: int = 1
) -> dict[str, float]:
    """Operations of one forward of a WanTransformer3DModel, batch 1, as linear, attention and other.

    With N tokens, S text tokens, width d, feed-forward width f, and two operations per multiply-add:
    linear per block = 2 N (4 d^2 + 2 d^2 + 2 d f) + 4 S d^2, that is q, k, v, o of self-attention, q and o
    of cross-attention, the feed-forward, and k and v of the text; attention per block = 4 N^2 d + 4 N S d,
    the two products of self- and cross-attention; other = patch embedding, text and timestep embedding,
    output projection. Counted as in Kaplan et al. 2020 (arXiv:2001.08361, table 1), applied to this network.

    Args:
        config: configuration of the transformer.
        tokens: tokens of the video, see `latent_shape`.
        text_tokens: tokens of the prompt, with padding.
        timestep_tokens: number of embedded timesteps: 1, or the number of tokens with `expand_timesteps`.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch = math.prod(config["patch_size"])
    per_token = 6 * width**2 + 2 * width * config["ffn_dim"]
    linear = config["num_layers"] * 2 * (tokens * per_token + 2 * text_tokens * width**2)
    attention = config["num_layers"] * 4 * width * tokens * (tokens + text_tokens)
    ends = tokens * patch * width * (config["in_channels"] + config["out_channels"])
    text = text_tokens * width * (config["text_dim"] + width)
    time = timestep_tokens * width * (config["freq_dim"] + width + 6 * width)
    return {"linear": linear, "attention": attention, "convolution": 0, "other": 2 * (ends + text + time)}


def _work(
    spec: ModelSpec,
    component: str,
    part: Part,
    module: torch.nn.Module,
    latent: LatentShape,
    size: tuple[int, int, int],
) -> tuple[str, dict[str, float]]:
    """Shape of the input as text, and operations by kind; no operations where the network's call is not known."""
    if component.startswith("expert"):
        return _denoiser_work(spec, part, module, latent)
    height, width, frames = size
    causal = part.class_name == "AutoencoderKLWan"
    if component == "vae_encoder":
        whole = family_of(spec.pipeline_class).encodes_clip and not spec.expand_timesteps
        count = frames if whole else 1
        colours = 3
        shape = (1, colours, count, height, width)

        def encode(latent_frames: int) -> object:
            video = (latent_frames - 1) * spec.temporal_factor + 1
            return module.encode(torch.empty(1, colours, video, height, width, device="meta"))

        return str(list(shape)), _over_time(encode, latent.frames if whole else 1, causal)
    if component == "vae_decoder":
        shape = (1, latent.channels, latent.frames, latent.height, latent.width)
        return str(list(shape)), _over_time(
            lambda count: module.decode(torch.empty(1, latent.channels, count, *shape[3:], device="meta")),
            latent.frames,
            causal,
        )
    if component.startswith("text_encoder"):
        tokens = min(spec.defaults.text_tokens, part.config.get("max_position_embeddings") or 512)
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        return str(list(ids.shape)), _count(lambda: module(ids))
    if component == "image_encoder":
        side = part.config.get("vision_config", part.config).get("image_size", 224)
        pixels = torch.empty(1, 3, side, side, device="meta")
        return str(list(pixels.shape)), _count(lambda: module(pixels))
    return "", {}


def _denoiser_work(
    spec: ModelSpec, part: Part, module: torch.nn.Module, latent: LatentShape
) -> tuple[str, dict[str, float]]:
    """Shape of the latents in one call of a denoiser, and its operations."""
    text_tokens, shape = (
        spec.defaults.text_tokens,
        (latent.channels, latent.frames, latent.height, latent.width),
    )
    inputs = family_of(spec.pipeline_class).denoiser_inputs(spec, part, shape, latent.tokens, text_tokens)
    if not inputs:
        return "", {}
    named = str(list(inputs["hidden_states"].shape))
    if part.class_name == "WanTransformer3DModel" and part.config.get("image_dim") is None:
        times = latent.tokens if spec.expand_timesteps else 1
        return named, wan_expert_flop(dict(part.config), latent.tokens, text_tokens, timestep_tokens=times)

    def empty(_: str, tensor: Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=dtype_of(tensor, torch.float32), device="meta")

    # Buffers that are computed and not stored, such as tables of positions, are on the CPU.
    return named, _count(lambda: module.to("meta")(**described(inputs, empty)))


def _over_time(call: Callable[[int], object], latent_frames: int, causal: bool) -> dict[str, float]:
    """Operations of a VAE over all frames; those of a causal one that goes frame by frame follow from a few."""
    few, more = _COUNTED_FRAMES
    if latent_frames <= more or not causal:
        return _count(lambda: call(latent_frames))
    first, second = _count(lambda: call(few)), _count(lambda: call(more))
    return {kind: value + (latent_frames - few) * (second[kind] - value) for kind, value in first.items()}


def _count(call: Callable[[], object]) -> dict[str, float]:
    """Operations by kind of a call on meta tensors."""
    try:
        # Networks that choose a number format for their own device know none for meta.
        plain = patch("torch.autocast", lambda *_, **__: nullcontext())
        with torch.no_grad(), plain, _WholeMasks(), FlopCounterMode(display=False) as counter:
            call()
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError):
        return {}  # a network of another family, with other arguments
    counts = dict.fromkeys(_KINDS, 0.0)
    for operator, operations in counter.get_flop_counts().get("Global", {}).items():
        counts[_kind(str(operator))] += operations
    return counts


class _WholeMasks(TorchDispatchMode):
    """Counts every position of a mask as set: a tensor without values cannot tell which are."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.nonzero.default and args[0].is_meta:
            return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.long, device="meta")
        return function(*args, **(kwargs or {}))


def _kind(operator: str) -> str:
    if "convolution" in operator:
        return "convolution"
    if "bmm" in operator or "attention" in operator:
        return "attention"
    return "linear" if "mm" in operator else "other"


def _parameters(module: torch.nn.Module, component: str) -> int:
    sizes = {
        name: tensor.numel()
        for name, tensor in parameter_names(module).items()
        if component not in ("vae_encoder", "vae_decoder")
        or name.startswith(_DECODER_HALF) == (component == "vae_decoder")
    }
    return sum(sizes.values())
