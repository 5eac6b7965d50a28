"""The diffusers pipeline with networks that run in engines."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput, Transformer2DModelOutput
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutput

from wanlab.core.errors import WanlabError
from wanlab.engines.base import Engine
from wanlab.engines.registry import EAGER, engine_kind, open_component
from wanlab.export.components import PARTS, check_components
from wanlab.export.weights import other_weight
from wanlab.models.calls import flat
from wanlab.models.pipeline import Model


def use(model: Model, engines: Mapping[str, Engine]) -> Model:
    """A model whose pipeline calls engines for some or all of its components.

    Everything around the networks (tokenizer, scheduler arithmetic, guidance) stays the code of diffusers,
    so what differs between the two models is the engines. The given model is left as it is; components
    without an engine are shared with it.

    Args:
        model: from `wanlab.models.load`, or from here.
        engines: component -> engine with the inputs and outputs of `wanlab.export.export`. If an engine has a method
            `follow`, it is called with the new pipeline, so that the engine knows the scheduler's step.

    Returns:
        A new model; its `.engines` maps components to names of engines.

    Raises:
        WanlabError: an unknown component; an engine made for another component, from other weights than the model's, or
            with other inputs.
    """
    check_components(model, engines)
    for component, engine in engines.items():
        _check_engine(component, engine, getattr(model.pipeline, PARTS[component], None))
    pipeline = copy.copy(model.pipeline)
    # A scheduler keeps state between steps; two pipelines must not share it.
    pipeline.scheduler = copy.deepcopy(model.pipeline.scheduler)
    for part in dict.fromkeys(PARTS[component] for component in engines):
        of_part = {component: engine for component, engine in engines.items() if PARTS[component] == part}
        setattr(pipeline, part, _engine_part(getattr(model.pipeline, part), of_part))
    for engine in engines.values():
        if hasattr(engine, "follow"):  # the engine depends on the step, which the scheduler knows
            engine.follow(pipeline)
    changed = copy.copy(model)
    changed.pipeline = pipeline
    changed.engines = dict(model.engines) | {name: engine.name for name, engine in engines.items()}
    return changed


def use_engines(
    model: Model,
    chosen: Mapping[str, str],
    folder: str | os.PathLike,
    *,
    size: Mapping[str, int | None] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = True,
) -> Model:
    """A model whose components run on engines that are chosen by name; missing files are prepared first.

    Args:
        model: from `wanlab.models.load`, all components eager.
        chosen: component -> name of its engine; components that are not given, or are on `"eager"`, are not changed.
        folder, size: as `wanlab.engines.open_component` takes them.
        settings: engine -> its settings.
        progress: whether to show a bar.

    Raises:
        WanlabError: as `open_component` and `use`; unknown names are refused before any work is done.
    """
    chosen = {component: name for component, name in chosen.items() if name != EAGER}
    check_components(model, chosen)
    for component, name in chosen.items():
        engine_kind(name).check(component, (settings or {}).get(name))
    opened = {}
    bar = tqdm(chosen.items(), desc="engines", unit="component", leave=False, disable=not progress)
    for component, name in bar:
        bar.set_postfix_str(f"{component} on {name}")
        own = (settings or {}).get(name, {})
        opened[component] = open_component(name, model, component, folder, size=size, **own)
    return use(model, opened)


_INPUTS = {
    "text_encoder": {"input_ids", "attention_mask"},
    "vae_encoder": {"video"},
    "vae_decoder": {"latents"},
}


def _check_engine(component: str, engine: Engine, network: Any) -> None:
    made_for = engine.metadata.get("component", component)
    # The experts have the same shapes, so that only this check detects an exchange of the two.
    if made_for != component:
        raise WanlabError(f"{engine.label} was exported from {made_for}; it cannot run {component}")
    required = _INPUTS.get(component)
    if required is None:
        taken = inspect.signature(
            type(network).forward if isinstance(network, torch.nn.Module) else network
        ).parameters
        free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        fits = free or all(name in taken or name.rpartition("_")[0] in taken for name in engine.inputs)
        required = set(engine.inputs) if fits and "hidden_states" in engine.inputs else set(taken) - {"self"}
    if set(engine.inputs) != required:
        raise WanlabError(
            f"{engine.label} takes {', '.join(engine.inputs)}; {component} needs {', '.join(sorted(required))}"
        )
    graph = engine.path
    known = graph is not None and graph.suffix.lower() == ".onnx" and isinstance(network, torch.nn.Module)
    if known and (name := other_weight(graph, network)):
        raise WanlabError(
            f"{engine.label} says that it is {component}, and its weight {name} is not that of the model: it is of"
            " another network, or was changed; export it again with wanlab.export.export"
        )


def _engine_part(original: torch.nn.Module, engines: dict[str, Engine]) -> EnginePart:
    """The module that replaces a network of the pipeline."""
    if "text_encoder" in engines:
        return EngineTextEncoder(original, engines["text_encoder"])
    if "vae_encoder" in engines or "vae_decoder" in engines:
        return EngineVae(original, engines.get("vae_encoder"), engines.get("vae_decoder"))
    return EngineExpert(original, next(iter(engines.values())))


class EnginePart(torch.nn.Module):
    """Replacement of a network with the attributes that a diffusers pipeline reads: configuration, dtype and device."""

    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__()
        self.config = original.config
        self._dtype, self._device = original.dtype, original.device
        # Numbers of the network that pipelines read, such as compression ratios and statistics of latents.
        plain = {
            key: value for key, value in vars(original).items() if isinstance(value, bool | int | float | str)
        }
        plain |= {key: value for key, value in original.named_buffers(recurse=False) if "." not in key}
        self._facts = {key: value for key, value in plain.items() if not key.startswith("_")}

    def __getattr__(self, name: str):
        facts = self.__dict__.get("_facts", {})
        return facts[name] if name in facts else super().__getattr__(name)

    @property
    def one_size_of_batch(self) -> bool:
        """Whether the graph of an engine was made for one number of samples."""
        named = (self.__dict__.get(name) for name in ("engine", "encoder", "decoder"))
        engines = [each for each in named if isinstance(each, Engine)]
        return any(
            isinstance(shape[0], int) for each in engines for _, shape in each.inputs.values() if shape
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    def _back(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, self._dtype)


class EngineTextEncoder(EnginePart):
    """The text encoder in an engine."""

    def __init__(self, original: torch.nn.Module, engine: Engine) -> None:
        super().__init__(original)
        self.engine = engine

    def forward(self, input_ids, attention_mask=None):
        """`[B, L]` tokens and mask to `.last_hidden_state` `[B, L, D]`; without a mask every token counts."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        feeds = {"input_ids": input_ids, "attention_mask": mask}
        return BaseModelOutput(last_hidden_state=self._back(self.engine.run(feeds)["last_hidden_state"]))


class EngineExpert(EnginePart):
    """A denoising transformer in an engine."""

    def __init__(self, original: torch.nn.Module, engine: Engine) -> None:
        super().__init__(original)
        self.engine = engine
        names = getattr(original, "names", None)  # of an engine that is replaced
        self.names = names or list(inspect.signature(original.forward).parameters)

    def cache_context(self, *_: Any, **__: Any):
        """An engine caches nothing between steps."""
        return nullcontext()

    def forward(self, *args, return_dict: bool = True, **kwargs):
        """The arguments of the network; numbers among them are those that the graph was traced with.

        Raises:
            WanlabError: a tensor that the graph does not take.
        """
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if given.pop("attention_kwargs", None):
            raise WanlabError("an engine takes no attention_kwargs; run this expert eager")
        tensors = {name: value for name, value in flat(given).items() if isinstance(value, torch.Tensor)}
        if surplus := [name for name in tensors if name not in self.engine.inputs]:
            raise WanlabError(
                f"{self.engine.label} does not take {surplus[0]}, which the pipeline gives; run this expert eager"
            )
        sample = self._back(self.engine.run(tensors)["velocity"])
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class EngineVae(EnginePart):
    """The VAE with one or both halves in engines; the original is kept only where a half stays eager."""

    encoder: Engine | None
    decoder: Engine | None
    eager: torch.nn.Module | None

    def __init__(self, original: torch.nn.Module, encoder: Engine | None, decoder: Engine | None) -> None:
        super().__init__(original)
        if isinstance(original, EngineVae):
            encoder, decoder = encoder or original.encoder, decoder or original.decoder
            original = original.eager
        self.encoder, self.decoder = encoder, decoder
        self.eager = original if encoder is None or decoder is None else None

    def encode(self, video, return_dict: bool = True):
        """`[B, 3, T, H, W]` in [-1, 1] to a distribution over latents."""
        if self.encoder is None:
            return self.eager.encode(video, return_dict=return_dict)
        moments = self._back(self.encoder.run({"video": video})["moments"])
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, latents, *conditions, return_dict: bool = True):
        """`[B, C, T', H', W']` to `[B, 3, T, H, W]` in [-1, 1].

        Raises:
            WanlabError: a condition, such as the timestep of some decoders of LTX-Video, that the engine does not take.
        """
        if self.decoder is None:
            return self.eager.decode(latents, *conditions, return_dict=return_dict)
        if any(condition is not None for condition in conditions):
            raise WanlabError(f"{self.decoder.label} takes latents alone; run this decoder eager")
        video = self._back(self.decoder.run({"latents": latents})["video"])
        return DecoderOutput(sample=video) if return_dict else (video,)
