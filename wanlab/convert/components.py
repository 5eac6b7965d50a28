"""Every component as a function of named tensors: what is traced, fed to an engine, and compared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wanlab.convert.clip import ClipShape, latent_size
from wanlab.errors import WanlabError, did_you_mean

if TYPE_CHECKING:
    import torch

FUSED_OPSET = 23
"""From this opset on attention, rotary embedding and root-mean-square norms are operators of ONNX."""

# Component -> attribute of the diffusers pipeline that holds its network.
PARTS = {
    "text_encoder": "text_encoder",
    "vae_encoder": "vae",
    "expert_high": "transformer",
    "expert_low": "transformer_2",
    "expert": "transformer",
    "vae_decoder": "vae",
}


@dataclass(frozen=True)
class Recipe:
    """How one component is turned into a graph.

    Attributes:
        component: wanlab's name of it.
        network: the module of the pipeline that computes it (the whole VAE for either half).
        inputs: input name -> {axis: axis name} for the axes that may vary.
        output: name of the only output.
        inputs_for: example inputs at a `ClipShape`, drawn from a `torch.Generator`, in order of `inputs`.
        reference: the computation as the pipeline does it.
        traced: the same computation in the form that exports well; call inside `friendly(opset)`.
        friendly: context in which `traced` may be called; leaves the network as it was.
        dimensions: axis name -> `torch.export.Dim` (or expression of one) for the axes that may vary.
    """

    component: str
    network: torch.nn.Module
    inputs: dict[str, dict[int, str]]
    output: str
    inputs_for: Callable[[ClipShape, Any], tuple]
    reference: Callable
    traced: Callable
    friendly: Callable
    dimensions: Callable[[], dict[str, Any]]


def components_of(model) -> tuple[str, ...]:
    """Names of the components of `model` that can be converted, in the order a generation uses them.

    Args:
        model: has a diffusers pipeline as `.pipeline`.
    """
    pipeline = model.pipeline
    low = getattr(pipeline, "transformer_2", None) is not None
    # A model of two experts may be loaded with one of them only.
    two = low or pipeline.config.get("boundary_ratio") is not None
    experts = ("expert_high", "expert_low") if two else ("expert",)
    names = ("text_encoder", "vae_encoder", *experts, "vae_decoder")
    return tuple(name for name in names if getattr(pipeline, PARTS[name], None) is not None)


def check_components(model, names) -> None:
    """Raise a `WanlabError` for the first name that `model` has no component of."""
    known = components_of(model)
    for name in names:
        if name not in known:
            raise WanlabError(
                f"no component {name!r} to convert{did_you_mean(name, known)};"
                f" this model has {', '.join(known)}"
            )


def recipe(model, component: str, *, network=None) -> Recipe:
    """The recipe of one component.

    Args:
        network: computes with this one of the same architecture instead of the model's own.

    Raises:
        WanlabError: the model has no such component, its network is none that wanlab can convert, or
            the component was already swapped for an engine.
    """
    check_components(model, [component])
    network = getattr(model.pipeline, PARTS[component]) if network is None else network
    makers = {
        "UMT5EncoderModel": _text_encoder,
        "T5EncoderModel": _text_encoder,
        "WanTransformer3DModel": _expert,
        "AutoencoderKLWan": _vae_encoder if component == "vae_encoder" else _vae_decoder,
    }
    kind = type(network).__name__
    if kind not in makers:
        raise WanlabError(
            f"{component} is a {kind}, which cannot be converted; convertible are {', '.join(sorted(makers))}"
            " (use the model as it was loaded, before its components were swapped for engines)"
        )
    return makers[kind](model, component, network)


def _text_encoder(model, component: str, network) -> Recipe:
    def inputs_for(shape: ClipShape, generator):
        import torch

        size = (shape.batch, shape.text_tokens)
        ids = torch.randint(0, network.config.vocab_size, size, generator=generator)
        lengths = torch.linspace(shape.text_tokens, max(shape.text_tokens // 2, 1), shape.batch).long()
        mask = (torch.arange(shape.text_tokens) < lengths[:, None]).long()
        return ids.to(network.device), mask.to(network.device)

    def encode(input_ids, attention_mask):
        return network(input_ids, attention_mask).last_hidden_state

    @contextmanager
    def friendly(opset):
        # The fused attention returns strides that the decompositions of torch.export refuse.
        before = network.config._attn_implementation
        network.set_attn_implementation("eager")
        try:
            yield
        finally:
            network.set_attn_implementation(before)

    axes = {0: "batch", 1: "text_tokens"}
    return Recipe(
        component,
        network,
        {"input_ids": axes, "attention_mask": axes},
        "last_hidden_state",
        inputs_for,
        encode,
        encode,
        friendly,
        lambda: _dims(batch=(1, 64), text_tokens=(2, 4096)),
    )


def _expert(model, component: str, network) -> Recipe:
    from wanlab.convert.onnx.rotary import exportable_attention

    config = network.config
    if config.image_dim is not None:
        raise WanlabError(
            f"{component} takes CLIP image embeddings (image_dim={config.image_dim}), as Wan2.1 does; "
            "only experts without them can be converted"
        )
    per_token = bool(model.pipeline.config.get("expand_timesteps", False))
    patch_t, patch_h, patch_w = config.patch_size

    def inputs_for(shape: ClipShape, generator):
        import torch

        frames, height, width = latent_size(model, shape)
        draw = {"generator": generator}
        latents = torch.randn(shape.batch, config.in_channels, frames, height, width, **draw)
        tokens = (frames // patch_t) * (height // patch_h) * (width // patch_w)
        timestep = torch.linspace(900.0, 100.0, shape.batch)
        if per_token:
            timestep = timestep[:, None].repeat(1, tokens)
        text = torch.randn(shape.batch, shape.text_tokens, config.text_dim, **draw)
        to = {"device": network.device, "dtype": network.dtype}
        return latents.to(**to), timestep.to(network.device), text.to(**to)

    def denoise(hidden_states, timestep, encoder_hidden_states):
        return network(hidden_states, timestep, encoder_hidden_states, return_dict=False)[0]

    def dimensions():
        dims = _dims(batch=(1, 64), latent_frames=(2, 256), text_tokens=(2, 4096))
        dims |= {
            "latent_height": patch_h * _dim("token_rows", 2, 1024),
            "latent_width": patch_w * _dim("token_columns", 2, 1024),
        }
        return dims

    latent_axes = {0: "batch", 2: "latent_frames", 3: "latent_height", 4: "latent_width"}
    return Recipe(
        component,
        network,
        {
            "hidden_states": latent_axes,
            "timestep": {0: "batch", 1: "tokens"} if per_token else {0: "batch"},
            "encoder_hidden_states": {0: "batch", 1: "text_tokens"},
        },
        "velocity",
        inputs_for,
        denoise,
        denoise,
        lambda opset: exportable_attention(network, fused=opset >= FUSED_OPSET),
        dimensions,
    )


def _vae_encoder(model, component: str, network) -> Recipe:
    from wanlab.convert.onnx.vae_sequence import encode_moments

    def inputs_for(shape: ClipShape, generator):
        import torch

        latent_size(model, shape)  # refuses an illegal size
        size = (shape.batch, 3, shape.frames, shape.height, shape.width)
        video = torch.rand(size, generator=generator) * 2 - 1
        return (video.to(network.device, network.dtype),)

    def dimensions():
        config = network.config
        dims = _dims(batch=(1, 64))
        dims |= {
            "frames": config.scale_factor_temporal * _dim("later_latents", 1, 256) + 1,
            "height": config.scale_factor_spatial * _dim("rows", 2, 512),
            "width": config.scale_factor_spatial * _dim("columns", 2, 512),
        }
        return dims

    return Recipe(
        component,
        network,
        {"video": {0: "batch", 2: "frames", 3: "height", 4: "width"}},
        "moments",
        inputs_for,
        lambda video: network.encode(video).latent_dist.parameters,
        lambda video: encode_moments(network, video),
        lambda opset: _whole_clip(network),
        dimensions,
    )


def _vae_decoder(model, component: str, network) -> Recipe:
    from wanlab.convert.onnx.vae_sequence import decode_video

    def inputs_for(shape: ClipShape, generator):
        import torch

        config = network.config
        size = (shape.batch, config.z_dim, *latent_size(model, shape))
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )
        latents = torch.randn(size, generator=generator) * std + mean
        return (latents.to(network.device, network.dtype),)

    def dimensions():
        # From 3 latent frames on: with 2 a single frame follows the first, which tracing tells apart.
        return _dims(batch=(1, 64), latent_frames=(3, 256), latent_height=(2, 512), latent_width=(2, 512))

    return Recipe(
        component,
        network,
        {"latents": {0: "batch", 2: "latent_frames", 3: "latent_height", 4: "latent_width"}},
        "video",
        inputs_for,
        lambda latents: network.decode(latents, return_dict=False)[0],
        lambda latents: decode_video(network, latents).clamp(-1.0, 1.0),
        lambda opset: _whole_clip(network),
        dimensions,
    )


@contextmanager
def _whole_clip(network):
    from wanlab.convert.onnx.vae_sequence import exportable_operators, whole_clip_resampling

    with ExitStack() as stack:
        stack.enter_context(whole_clip_resampling(network))
        stack.enter_context(exportable_operators(network))
        yield


def _dim(name: str, low: int, high: int):
    from torch.export import Dim

    return Dim(name, min=low, max=high)


def _dims(**ranges: tuple[int, int]) -> dict[str, Any]:
    return {name: _dim(name, low, high) for name, (low, high) in ranges.items()}
