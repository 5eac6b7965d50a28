"""Every component as a function of named tensors, which is traced, run by an engine, and compared; sizes of its inputs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.export import Dim

from wanlab import models
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.export.friendly import (
    decode_video,
    encode_moments,
    exportable_attention,
    exportable_joint_attention,
    exportable_operators,
    whole_clip_resampling,
)
from wanlab.models import calls
from wanlab.models.families import family_of
from wanlab.models.families.base import BATCHED, Tensor
from wanlab.models.pipeline import text_tokens
from wanlab.models.shapes import latent_shape, nearest_size
from wanlab.models.spec import ENCODERS, Part
from wanlab.models.weights import check_tensor

FUSED_OPSET = 23
"""From this opset on attention, rotary embedding and root-mean-square norms are operators of ONNX."""


AXES: dict[str, dict[int, str]] = {
    "input_ids": {0: "batch", 1: "text_tokens"},
    "attention_mask": {0: "batch", 1: "text_tokens"},
    "hidden_states": {0: "batch", 2: "latent_frames", 3: "latent_height", 4: "latent_width"},
    "timestep": {0: "batch", 1: "tokens"},
    "encoder_hidden_states": {0: "batch", 1: "text_tokens"},
    "latents": {0: "batch", 2: "latent_frames", 3: "latent_height", 4: "latent_width"},
    "video": {0: "batch", 2: "frames", 3: "height", 4: "width"},
}
"""Input -> {axis: name}. Axes are known by position, because the name of a free axis in a graph may be an expression of a
symbol (`4 * frames_units + 1`)."""


@dataclass(frozen=True)
class ClipShape:
    """Size of the inputs of a component: batch, height and width in pixels, frames, tokens of the text."""

    batch: int
    height: int
    width: int
    frames: int
    text_tokens: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.frames}x{self.height}x{self.width}, {self.text_tokens} text tokens"


def usual_batch(model, component: str) -> int:
    """Clips in one call of a component: two for an expert whose guidance is computed in one batch, else one."""
    guidance = family_of(model.spec.pipeline_class).guidance
    return 2 if component.startswith("expert") and guidance == BATCHED else 1


def default_shape(model, **changes: int | None) -> ClipShape:
    """The model's default clip at batch 2, with `changes` (None keeps the default).

    Raises:
        WanlabError: a size below 1, or inputs that do not fit into free memory.
    """
    defaults = model.spec.defaults
    shape = ClipShape(
        2, defaults.height, defaults.width, defaults.frames, text_tokens(model.pipeline, model.spec)
    )
    shape = replace(shape, **{key: value for key, value in changes.items() if value is not None})
    wrong = next((name for name, value in asdict(shape).items() if value < 1), None)
    if wrong:
        raise WanlabError(f"{wrong} must be a whole number of at least 1, not {getattr(shape, wrong)}")
    space, time = model.spec.spatial_factor, model.spec.temporal_factor
    latent = (-(-shape.frames // time), -(-shape.height // space), -(-shape.width // space))
    check_tensor("the latents of the example inputs", (shape.batch, model.spec.latent_channels, *latent), 4)
    check_tensor("the text of the example inputs", (shape.batch, shape.text_tokens), 4)
    return shape


def latent_size(model, shape: ClipShape) -> tuple[int, int, int]:
    """Latent frames, height and width of a clip.

    Raises:
        WanlabError: the size is not legal for this model; the message has the nearest legal one.
    """
    latent = latent_shape(model.spec, shape.height, shape.width, shape.frames)
    return latent.frames, latent.height, latent.width


def axis_sizes(spec, clip: ClipShape) -> dict[str, int]:
    """Axis name, as in `AXES`, -> its size for a clip.

    Raises:
        WanlabError: the size is not legal for this model; the message has the nearest legal one.
    """
    latent = latent_shape(spec, clip.height, clip.width, clip.frames)
    return asdict(clip) | {
        "tokens": latent.tokens,
        "latent_frames": latent.frames,
        "latent_height": latent.height,
        "latent_width": latent.width,
    }


TEXT_ENCODERS = ("UMT5EncoderModel", "T5EncoderModel")
"""Text encoders of which pipelines take the last states alone."""
UNCONVERTED = {
    "WanAnimateTransformer3DModel": "which decomposes matrices (QR), for which ONNX has no operator"
}
"""Networks that cannot be converted -> the reason."""
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
class ComponentSpec:
    """How one component is converted to a graph.

    Attributes:
        component: name of the component.
        network: module of the pipeline that computes it (the whole VAE for each half).
        inputs: input name -> {axis: axis name} for the axes that may vary.
        output: name of the only output.
        inputs_for: function that draws example inputs for a `ClipShape` from a `torch.Generator`, in order of `inputs`.
        reference: the computation of the pipeline.
        traced: the same computation in a form that exports well; call it inside `friendly(opset)`.
        friendly: context in which `traced` may be called; afterwards the network is unchanged.
        dimensions: axis name -> `torch.export.Dim` (or expression of one) for the axes that may vary.
        rewritten: whether `friendly` changes the network.
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
    rewritten: bool = True

    @property
    def sized(self) -> bool:
        """Whether sizes may vary in its graph, and not only the batch."""
        return any(label != "batch" for axes in self.inputs.values() for label in axes.values())


def components_of(model) -> tuple[str, ...]:
    """Names of the components of `model` that can be converted, in the order of a generation.

    Args:
        model: object with a diffusers pipeline as `.pipeline`.
    """
    return tuple(name for name, reason in _loaded(model).items() if not reason)


def unconverted(model) -> dict[str, str]:
    """Loaded networks that stay in PyTorch -> the reason, for a reader."""
    return {name: reason for name, reason in _loaded(model).items() if reason}


def _loaded(model) -> dict[str, str]:
    """Loaded networks, in the order of a generation -> why one cannot be converted; empty if it can."""
    pipeline = model.pipeline
    low = getattr(pipeline, "transformer_2", None) is not None
    # A model of two experts may be loaded with one of them only.
    two = low or pipeline.config.get("boundary_ratio") is not None
    experts = ("expert_high", "expert_low") if two else ("expert",)
    family = family_of(model.spec.pipeline_class)
    unknown = {name: "and it is not known what it is called with (CONTRIBUTING.md)" for name in experts}
    stays = family.stays if family.title else unknown
    loaded: dict[str, str] = {}
    for name in (*ENCODERS, "vae_encoder", *experts, "vae_decoder"):
        network = getattr(pipeline, PARTS.get(name, name), None)
        if network is None:
            continue
        kind = type(network).__name__
        # A network that an engine replaced is one that can be converted.
        encoder = name in ENCODERS and kind not in TEXT_ENCODERS and not hasattr(network, "engine")
        more = "of which the pipeline takes more than its last states" * encoder
        config = getattr(network, "config", None)
        if name == "vae_decoder" and getattr(config, "timestep_conditioning", False):
            more = "which takes a timestep besides the latents"
        reason = UNCONVERTED.get(kind) or (stays.get(name, more) if not hasattr(network, "engine") else "")
        loaded[name] = f"{name} is a {kind}, {reason}" * bool(reason)
    return loaded


def heaviest_components(model) -> tuple[str, ...]:
    """The components that take most of a generation, where they can be converted: the first expert, and the VAE's decoder.

    Raises:
        WanlabError: neither can be converted; the message has the reasons.
    """
    known = components_of(model)
    experts = [name for name in known if name.startswith("expert")]
    chosen = (*experts[:1], *(name for name in known if name == "vae_decoder"))
    if not chosen:
        raise WanlabError(
            f"no expert and no VAE decoder of {model.spec.name} can be converted: {'; '.join(unconverted(model).values())}"
        )
    return chosen


def check_components(model, names) -> None:
    """Raise a `WanlabError` for the first name that is no component of `model`."""
    known = components_of(model)
    stays = unconverted(model)
    for name in names:
        if name in stays:
            raise WanlabError(f"{stays[name]}: it stays in PyTorch; leave it out of the components")
        if name not in known:
            raise WanlabError(
                f"no component {name!r} to convert{did_you_mean(name, known)};"
                f" this model has {', '.join(known)}"
            )


def component_spec(model, component: str, *, network=None) -> ComponentSpec:
    """The `ComponentSpec` of one component.

    Args:
        model: model with the component.
        component: name of the component.
        network: network of the same architecture to use instead of the model's.

    Raises:
        WanlabError: the model has no such component, wanlab cannot convert its network, or an engine already replaces
            the component.
    """
    check_components(model, [component])
    network = getattr(model.pipeline, PARTS[component]) if network is None else network
    kind = type(network).__name__
    if not isinstance(network, torch.nn.Module) or hasattr(network, "engine") or hasattr(network, "eager"):
        raise WanlabError(
            f"{component} is a {kind}, which cannot be converted: use the model as it was loaded, before engines replaced"
            " its components"
        )
    if component in ENCODERS:
        return _text_encoder(model, component, network)
    if component.startswith("expert"):
        # Of a first and a last picture there are two for each element of the batch.
        alone = kind == "WanTransformer3DModel" and network.config.pos_embed_seq_len is None
        return (_expert if alone else _any_denoiser)(model, component, network)
    half = component == "vae_encoder"
    if kind == "AutoencoderKLWan":
        return (_vae_encoder if half else _vae_decoder)(model, component, network)
    return (_any_vae_encoder if half else _any_vae_decoder)(model, component, network)


def _text_encoder(model, component: str, network) -> ComponentSpec:
    def inputs_for(shape: ClipShape, generator):
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
    return ComponentSpec(
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


def _expert(model, component: str, network) -> ComponentSpec:
    config = network.config
    pictured = config.image_dim is not None
    per_token = bool(model.pipeline.config.get("expand_timesteps", False))
    _, patch_h, patch_w = config.patch_size

    def inputs_for(shape: ClipShape, generator):
        given = _shapes_of(model, component, network, shape)
        return tuple(calls.drawn(given, generator, network, batch=shape.batch).values())

    def denoise(hidden_states, timestep, encoder_hidden_states, *picture):
        return network(hidden_states, timestep, encoder_hidden_states, *picture, return_dict=False)[0]

    def dimensions():
        dims = _dims(batch=(1, 64), latent_frames=(2, 256))
        dims |= {} if pictured else _dims(text_tokens=(2, 4096))
        dims |= {
            "latent_height": patch_h * _dim("token_rows", 2, 1024),
            "latent_width": patch_w * _dim("token_columns", 2, 1024),
        }
        return dims

    latent_axes = {0: "batch", 2: "latent_frames", 3: "latent_height", 4: "latent_width"}
    return ComponentSpec(
        component,
        network,
        {
            "hidden_states": latent_axes,
            "timestep": {0: "batch", 1: "tokens"} if per_token else {0: "batch"},
            # diffusers tells text from picture by the number of text tokens, 512.
            "encoder_hidden_states": {0: "batch"} if pictured else {0: "batch", 1: "text_tokens"},
        }
        | ({"encoder_hidden_states_image": {0: "batch"}} if pictured else {}),
        "velocity",
        inputs_for,
        denoise,
        denoise,
        lambda opset: exportable_attention(network, fused=opset >= FUSED_OPSET),
        dimensions,
    )


def _shapes_of(model, component: str, network, shape: ClipShape) -> dict[str, Any]:
    """Inputs of a denoiser for one clip of batch 1, as its family says.

    Raises:
        WanlabError: the size is not legal for this model; the message has the nearest legal one.
    """
    # The configuration of a pipeline may have changed since it was loaded.
    per_token = bool(model.pipeline.config.get("expand_timesteps", model.spec.expand_timesteps))
    spec = replace(model.spec, expand_timesteps=per_token)
    part = Part(PARTS[component], "diffusers", type(network).__name__, network.config)
    latent = latent_shape(spec, shape.height, shape.width, shape.frames)
    size = (latent.channels, latent.frames, latent.height, latent.width)
    return family_of(model.spec.pipeline_class).denoiser_inputs(
        spec, part, size, latent.tokens, shape.text_tokens
    )


def _any_denoiser(model, component: str, network) -> ComponentSpec:
    """A denoiser of any family that says what it is called with; its graph has the sizes of one clip."""
    usual = model.spec.defaults
    size = nearest_size(model.spec, usual.height, usual.width, usual.frames)
    described = _shapes_of(model, component, network, ClipShape(1, *size, usual.text_tokens))
    if not described:
        raise WanlabError(
            f"{component} is a {type(network).__name__}, and it is not known what it is called with; it stays in PyTorch"
            " (CONTRIBUTING.md shows how a family is added)"
        )
    names = [name for name, value in calls.flat(described).items() if isinstance(value, Tensor)]
    shared = set(calls.flat({name: described[name] for name in calls.shared_by_batch(described)}))
    two_pictures = getattr(network.config, "pos_embed_seq_len", None) is not None
    masked = type(network).__name__ == "MochiTransformer3DModel"
    parameters = list(inspect.signature(network.forward).parameters)
    values: dict[str, Any] = {}

    def inputs_for(shape: ClipShape, generator):
        given = _shapes_of(model, component, network, shape)
        values.update(given)
        drawn = calls.flat(calls.drawn(given, generator, network, batch=shape.batch))
        return tuple(drawn[name] for name in names)

    def denoise(*tensors):
        given = calls.flat(values or described) | dict(zip(names, tensors, strict=True))
        return network(**calls.gathered(given, parameters), return_dict=False)[0]

    return ComponentSpec(
        component,
        network,
        {name: {} if two_pictures or name in shared else {0: "batch"} for name in names},
        "velocity",
        inputs_for,
        denoise,
        denoise,
        lambda opset: exportable_joint_attention(network) if masked else nullcontext(),
        dict,
        rewritten=masked,
    )


def _any_vae_encoder(model, component: str, network) -> ComponentSpec:
    """The encoder of any VAE; its graph has the sizes of one clip."""

    def inputs_for(shape: ClipShape, generator):
        latent_size(model, shape)  # refuses an illegal size
        frames = shape.frames if family_of(model.spec.pipeline_class).encodes_clip else 1
        video = torch.rand((shape.batch, 3, frames, shape.height, shape.width), generator=generator) * 2 - 1
        return (video.to(network.device, network.dtype),)

    def encode(video):
        return network.encode(video).latent_dist.parameters

    return ComponentSpec(
        component,
        network,
        {"video": {}},
        "moments",
        inputs_for,
        encode,
        encode,
        lambda _: nullcontext(),
        dict,
        rewritten=False,
    )


def _any_vae_decoder(model, component: str, network) -> ComponentSpec:
    """The decoder of any VAE; its graph has the sizes of one clip."""

    def inputs_for(shape: ClipShape, generator):
        size = (shape.batch, model.spec.latent_channels, *latent_size(model, shape))
        return (torch.randn(size, generator=generator).to(network.device, network.dtype),)

    def decode(latents):
        return network.decode(latents, return_dict=False)[0]

    return ComponentSpec(
        component,
        network,
        {"latents": {}},
        "video",
        inputs_for,
        decode,
        decode,
        lambda _: nullcontext(),
        dict,
        rewritten=False,
    )


def _vae_encoder(model, component: str, network) -> ComponentSpec:
    alone = model.spec.expand_timesteps  # the picture without the frames after it

    def inputs_for(shape: ClipShape, generator):
        latent_size(model, shape)  # refuses an illegal size
        size = (shape.batch, 3, 1 if alone else shape.frames, shape.height, shape.width)
        video = torch.rand(size, generator=generator) * 2 - 1
        return (video.to(network.device, network.dtype),)

    def dimensions():
        config = network.config
        later = config.scale_factor_temporal * _dim("later_latents", 1, 256) + 1
        dims = _dims(batch=(1, 64)) | ({} if alone else {"frames": later})
        dims |= {
            "height": config.scale_factor_spatial * _dim("rows", 2, 512),
            "width": config.scale_factor_spatial * _dim("columns", 2, 512),
        }
        return dims

    return ComponentSpec(
        component,
        network,
        {"video": {0: "batch", 3: "height", 4: "width"} | ({} if alone else {2: "frames"})},
        "moments",
        inputs_for,
        lambda video: network.encode(video).latent_dist.parameters,
        lambda video: encode_moments(network, video),
        lambda opset: _whole_clip(network),
        dimensions,
    )


def _vae_decoder(model, component: str, network) -> ComponentSpec:
    def inputs_for(shape: ClipShape, generator):
        config = network.config
        size = (shape.batch, config.z_dim, *latent_size(model, shape))
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )
        latents = torch.randn(size, generator=generator) * std + mean
        return (latents.to(network.device, network.dtype),)

    def dimensions():
        # From 3 latent frames on: with 2 a single frame follows the first, which tracing treats as a special case.
        return _dims(batch=(1, 64), latent_frames=(3, 256), latent_height=(2, 512), latent_width=(2, 512))

    return ComponentSpec(
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
    with ExitStack() as stack:
        stack.enter_context(whole_clip_resampling(network))
        stack.enter_context(exportable_operators(network))
        yield


def _dim(name: str, low: int, high: int):
    return Dim(name, min=low, max=high)


def _dims(**ranges: tuple[int, int]) -> dict[str, Any]:
    return {name: _dim(name, low, high) for name, (low, high) in ranges.items()}


DEFAULT_BATCH = 1


def random_feeds(
    engine, *, seed: int = 0, shapes: Mapping[str, Sequence[int]] | None = None, **changes: int | None
) -> dict[str, torch.Tensor]:
    """Random inputs for an engine.

    Args:
        engine: engine whose metadata names the model, the component and the clip of the export; of other graphs, as
            trtexec makes them, axes that are free and not in `shapes` have size 1.
        seed: seed of the inputs.
        shapes: input -> shape; then the clip of the export does not count.
        changes: batch (default 1), height, width (pixels), frames, text_tokens; None keeps the size of the export.

    Returns:
        Input name -> tensor on the CPU in the engine's dtype: normal latents and text, pixels in [-1, 1], timesteps from
        900 to 100, tokens without padding. Of other graphs normal numbers, and 0 or 1 for whole numbers, which are
        indices in most graphs.

    Raises:
        WanlabError: shapes or sizes that the graph does not accept, or sizes of a clip for a graph without one.
    """
    facts = engine.metadata
    changed = {name for name, value in changes.items() if value is not None}
    generator = torch.Generator().manual_seed(seed)
    if shapes or "model" not in facts or "shape" not in facts:
        if changed:
            raise WanlabError(
                f"{engine.label} takes shapes of its inputs ({_spelled(engine.inputs)}), not {min(changed)}; give"
                " --shape NAME=1x3x224x224"
            )
        return _of_shapes(engine, shapes or {}, generator)
    spec = models.get(facts["model"])
    traced = json.loads(facts["shape"]) | {"batch": DEFAULT_BATCH}
    clip = ClipShape(**traced | {name: value for name, value in changes.items() if value is not None})
    sizes = axis_sizes(spec, clip)
    feeds = {}
    if _of_one_size(spec, facts.get("component", "")):
        other = [name for name in ("height", "width", "frames") if getattr(clip, name) != traced[name]]
        if other:
            raise WanlabError(
                f"{engine.label} is fixed at {other[0]} {traced[other[0]]}, not {getattr(clip, other[0])}; leave the size"
                " out or export again with it"
            )
        changed = set()
    for name, (dtype, axes) in engine.inputs.items():
        shape = [_size(name, axis, size, sizes, changed) for axis, size in enumerate(axes)]
        feeds[name] = _draw(name, shape, getattr(torch, dtype), generator)
    return feeds


def _of_one_size(spec, component: str) -> bool:
    """Whether the graphs of a component have the sizes of one clip, see `ComponentSpec.sized`."""
    if component not in spec.components or component in ENCODERS:
        return False
    return spec.part(spec.part_of(component)).class_name not in ("WanTransformer3DModel", "AutoencoderKLWan")


def _of_shapes(engine, shapes: Mapping[str, Sequence[int]], generator) -> dict[str, torch.Tensor]:
    for name in shapes:
        if name not in engine.inputs:
            raise WanlabError(
                f"{engine.label} has no input {name!r}{did_you_mean(name, engine.inputs)}; it takes"
                f" {_spelled(engine.inputs)}"
            )
    feeds = {}
    for name, (dtype, axes) in engine.inputs.items():
        shape = list(shapes.get(name, [axis if isinstance(axis, int) else 1 for axis in axes]))
        fitting = len(shape) == len(axes) and all(
            size == axis or not isinstance(axis, int) for size, axis in zip(shape, axes, strict=True)
        )
        if not fitting:
            raise WanlabError(
                f"{engine.label} takes {_spelled({name: (dtype, axes)})}, not {'x'.join(map(str, shape))}"
            )
        what, kind = f"input {name!r} of {engine.label}", getattr(torch, dtype, None)
        unusable = f"{what} is {dtype}; only numbers of 8 bits or more and truth values can be made up"
        if not isinstance(kind, torch.dtype):
            raise WanlabError(unusable)
        if 0 in shape:
            raise WanlabError(
                f"{what} is {'x'.join(map(str, shape))}: without numbers there is nothing to compute"
            )
        check_tensor(what, shape, kind.itemsize)
        try:
            if kind.is_floating_point:
                feeds[name] = torch.randn(shape, generator=generator).to(kind)
            else:
                feeds[name] = torch.randint(0, 2, shape, generator=generator).to(kind)
        except NotImplementedError:  # 4-bit integers
            raise WanlabError(unusable) from None
    return feeds


def _spelled(inputs) -> str:
    return ", ".join(f"{name}={'x'.join(map(str, axes)) or 'scalar'}" for name, (_, axes) in inputs.items())


def _size(tensor: str, axis: int, size: int | str, sizes: dict[str, int], changed: set[str]) -> int:
    known: Any = AXES.get(tensor, {}).get(axis, size)
    if isinstance(size, int):  # the graph was exported for this size only
        if str(known).removeprefix("latent_") in changed and sizes[known] != size:
            raise WanlabError(
                f"axis {axis} of {tensor} ({known}) is fixed at {size}, not {sizes[known]};"
                " leave the size out or export again with it"
            )
        return size
    if known not in sizes:
        raise WanlabError(
            f"axis {axis} of {tensor} is {known}, which a clip does not determine; give the inputs yourself"
        )
    return sizes[known]


def _draw(name: str, shape: list[int], dtype, generator):
    if name == "input_ids":
        return torch.randint(0, 16, shape, generator=generator).to(dtype)
    if name == "attention_mask":
        return torch.ones(shape, dtype=dtype)
    if name == "timestep":
        return calls.times(shape).to(dtype)
    values = torch.randn(shape, generator=generator)
    return (values.clamp(-1, 1) if name == "video" else values).to(dtype)
