"""Facts of a model that are known before its weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from wanlab.core.errors import WanlabError, did_you_mean

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
"""Networks that read texts and pictures, named as in diffusers; most models have one."""
COMPONENTS = (*ENCODERS, "vae_encoder", "expert_high", "expert_low", "expert", "vae_decoder")
"""wanlab's names of networks, in the order in which a generation uses them; `expert` where a model has only one."""
EXPERTS = ("expert_high", "expert_low", "expert")
_ORDINALS = {"2": "second ", "3": "third "}


def component_title(component: str) -> str:
    """A network's name in a sentence: `"low-noise expert"`, `"VAE decoder"`, `"second text encoder"`."""
    if component in ("expert_high", "expert_low"):
        return f"{component.removeprefix('expert_')}-noise expert"
    words = component.replace("vae", "VAE").split("_")
    return f"{_ORDINALS.get(words[-1], '')}{' '.join(word for word in words if word not in _ORDINALS)}"


# The two halves of a VAE are two components: they run at different times and are exported separately.
_VAE_HALVES = ("vae_encoder", "vae_decoder")


Count = Annotated[int, Meta(ge=1)]
Finite = Annotated[float, Meta(gt=-1e6, lt=1e6)]


@dataclass(frozen=True)
class Defaults:
    """Default settings of a generation; sizes in pixels, `fps` in frames per second.

    `other_sizes` are further sizes that the model was trained for, as (height, width, frames).
    """

    height: Count = 480
    width: Count = 832
    frames: Count = 81
    fps: Count = 16
    steps: Count = 50
    guidance_scale: Finite = 5.0
    text_tokens: Count = 512
    flow_shift: Finite | None = None
    other_sizes: tuple[tuple[Count, Count, Count], ...] = ()


@dataclass(frozen=True)
class Part:
    """One network of a diffusers pipeline, named as its folder, e.g. `transformer_2`."""

    name: str
    library: str
    class_name: str
    config: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Lora:
    """A file of low-rank changes to the weights of one component, see `wanlab.models.lora`.

    Attributes:
        file: its absolute path.
        component: wanlab's name of the network that it changes; empty where a model's only expert is meant.
        strength: factor of all its changes.
        digest: first 12 hex digits of the SHA-256 of its content.
    """

    file: str
    component: str
    strength: float
    digest: str

    def __str__(self) -> str:
        return f"{self.file}{self._where}"

    @property
    def identity(self) -> str:
        """Content, component and strength, whatever the file is called: `3f2a9c1b04de@expert_high:0.8`."""
        return f"{self.digest}{self._where}"

    @property
    def _where(self) -> str:
        named = self.component and self.component != "expert"  # the only expert need not be named
        return f"{f'@{self.component}' if named else ''}:{self.strength:.15g}"


@dataclass(frozen=True)
class ModelSpec:
    """Facts of a model from its configuration files, and the LoRAs that are fused into it.

    Attributes:
        name: registry name, folder name or hub id.
        source: folder or hub id of the weights.
        pipeline_class: name of its diffusers class.
        components: wanlab's names, in the order in which a generation uses them.
        boundary_ratio: `expert_high` runs at this share of the training timesteps and above; None with one
            expert.
        spatial_factor, temporal_factor: pixels and frames per latent position.
        patch: latent positions per token along `[T, H, W]`.
        latent_channels: channels of the latents, which the VAE encodes and the experts denoise.
        expand_timesteps: the expert gets one timestep per token (TI2V-5B) instead of one per sample.
        max_positions: longest axis, in tokens, that the rotary embedding supports; None if unknown.
        size_step: legal heights and widths are multiples of these, in pixels.
        frame_step: legal numbers of frames are `frame_step * k + 1`.
        loras: LoRAs that are fused into the weights when they are loaded.
        sizes_stated: whether the default height, width and frames are those of this model, published or in its folder, and
            not only assumed.
    """

    name: str
    source: str
    pipeline_class: str
    components: tuple[str, ...]
    boundary_ratio: float | None
    defaults: Defaults
    spatial_factor: int
    temporal_factor: int
    patch: tuple[int, int, int]
    latent_channels: int
    expand_timesteps: bool = False
    max_positions: int | None = None
    size_step: tuple[int, int] = (16, 16)
    frame_step: int = 4
    parts: tuple[Part, ...] = field(default=(), repr=False)
    model_index: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    scheduler_config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    loras: tuple[Lora, ...] = ()
    sizes_stated: bool = True

    @property
    def is_local(self) -> bool:
        """Whether `source` is a folder on this machine."""
        return Path(self.source).is_dir()

    def part(self, name: str) -> Part:
        """The part with this diffusers name, e.g. `"transformer"`."""
        return next(part for part in self.parts if part.name == name)

    def part_of(self, component: str) -> str:
        """The diffusers name of a component: `expert_low` -> `transformer_2`.

        Raises:
            WanlabError: the model has no such component.
        """
        if component not in self.components:
            raise WanlabError(
                f"{self.name} has no component {component!r}{did_you_mean(component, self.components)};"
                f" it has {', '.join(self.components)}"
            )
        return component_parts([part.name for part in self.parts])[component]

    def lora_identity(self, component: str | None = None) -> str | None:
        """Content, component and strength of its LoRAs as text, or of those of one component; None without any."""
        used = [
            each.identity
            for each in self.loras
            if component is None or self.part_of(each.component) == self.part_of(component)
        ]
        return ", ".join(sorted(used)) or None


def component_parts(parts: list[str]) -> dict[str, str]:
    """Component name -> diffusers part name, in the order in which a generation uses them."""
    denoisers = [part for part in parts if part.startswith(("transformer", "unet"))]
    mapping = {part: part for part in parts if part not in denoisers and part != "vae"}
    if "vae" in parts:
        mapping["vae_encoder"] = "vae"
    if len(denoisers) == 1:
        mapping["expert"] = denoisers[0]
    elif denoisers:
        first, second, *rest = sorted(denoisers)
        mapping |= {"expert_high": first, "expert_low": second} | {part: part for part in rest}
    if "vae" in parts:
        mapping["vae_decoder"] = "vae"
    return mapping
