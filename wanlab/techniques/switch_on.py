"""Techniques switched on together on a model, and the proof that each did what it says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from wanlab.core.errors import WanlabError
from wanlab.models import facts
from wanlab.models.pipeline import Model
from wanlab.models.shapes import latent_shape
from wanlab.models.spec import EXPERTS, ModelSpec, component_title
from wanlab.techniques.place import Place
from wanlab.techniques.registry import TECHNIQUES, barred, conflicts, made, technique_of
from wanlab.techniques.technique import Proof, Shares, Technique

Chosen = Mapping[str, Mapping[str, Any] | None]
"""Technique -> its settings; None or an empty mapping takes the defaults."""

OPERATIONS_PER_BYTE = 160
"""Operations in bfloat16 in the time of a byte of memory, on an H200: 700 TFLOP/s and 4.3 TB/s."""
TABLE_BYTES = 21
"""Bytes that a block moves for each modulation of a token without a compiler: read in 2 bytes, written and read as float32,
written and read with the block's own table added, and a third of them written and read once more with one added."""


@dataclass(eq=False)
class Switched:
    """A model with techniques, between loading and the first generation.

    Attributes:
        techniques: in the order in which they were applied.
        place: where they are; `place.model` is the model that generates with them.
    """

    techniques: list[Technique]
    place: Place = field(repr=False)

    @property
    def model(self) -> Model:
        return self.place.model

    @property
    def calls(self) -> pd.DataFrame:
        """The calls of the last generation, as `Denoising.frame`."""
        return self.place.calls

    def proofs(self) -> dict[str, Proof]:
        """Technique -> what it did in the last generation.

        Raises:
            WanlabError: there was none.
        """
        if self.calls.empty:
            raise WanlabError("a technique is proven by what it did in a generation; generate a video first")
        return {technique.name: technique.proof(self.place) for technique in self.techniques}


def switch_on(model: Model, chosen: Chosen | Iterable[str]) -> Switched:
    """Switch techniques on, in a copy of a model that shares its weights; the given model stays as it is.

    Args:
        model: from `wanlab.models.load`, or with engines.
        chosen: names, or names with settings.

    Raises:
        WanlabError: as `begin`.
    """
    switched = begin(model, chosen, model.engines)
    switched.place.finish(switched.model)
    return switched


def begin(model: Model, chosen: Chosen | Iterable[str], engines: Mapping[str, str]) -> Switched:
    """Apply techniques to the networks of a model that is not compiled yet; `Switched.place.finish` does the rest.

    Args:
        engines: component -> the engine that will run it.

    Raises:
        WanlabError: unknown techniques or settings, two that cannot go together, or one that this model, its engines or the
            device cannot have.
    """
    techniques = made(dict(chosen) if isinstance(chosen, Mapping) else dict.fromkeys(chosen))
    for technique in techniques:
        if reason := lacks(technique, model.spec, model.device, engines):
            raise WanlabError(f"{technique.name} cannot run here: it needs {reason}")
    place = Place(model)
    for technique in techniques:
        technique.apply(place)
    return Switched(techniques, place)


def lacks(
    technique: Technique, spec: ModelSpec, device: torch.device, engines: Mapping[str, str] | None = None
) -> str:
    """What a technique needs and a model, a device or engines do not have; empty if it can run."""
    if found := barred(technique, engines or {}):
        component, engine, reason = found
        return f"another engine for the {component_title(component)}: on {engine} {reason}"
    return technique.lacks(spec, device)


def shares_by_operations(spec: ModelSpec, steps: int | None = None, **size: int | None) -> Shares:
    """Where a video's time would go if every operation took the same time; known before anything is measured.

    Args:
        steps: denoising steps. size: height, width, frames; the model's defaults where not given.

    Raises:
        WanlabError: as `wanlab.models.facts`.
    """
    steps = spec.defaults.steps if steps is None else steps
    table = facts(spec, **size).set_index("component")
    experts = [name for name in table.index if name in EXPERTS]
    branches = 2 if spec.defaults.guidance_scale > 1 else 1
    forward = table.loc[experts[0]]
    denoising = branches * steps * float(table.loc[experts, "total_tflop"].mean())
    decoding = float(table["total_tflop"].get("vae_decoder", 0.0))
    whole = denoising + float(table.drop(index=experts)["total_tflop"].sum())
    config = spec.part(spec.part_of(experts[0])).config
    width = config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)
    layers, total = config.get("num_layers", 0), float(forward["total_tflop"]) * 1e12
    text = layers * 4 * spec.defaults.text_tokens * width**2
    chosen = {name: size.get(name) or getattr(spec.defaults, name) for name in ("height", "width", "frames")}
    tokens = latent_shape(spec, **chosen).tokens
    own = layers * 6 * tokens * width**2  # queries, keys and values of the video
    table = 0.0
    if spec.expand_timesteps:
        table = 2 * tokens * width * (config.get("freq_dim", 0) + 7 * width)
        table += OPERATIONS_PER_BYTE * TABLE_BYTES * layers * 6 * tokens * width
    return Shares(
        "operations",
        denoising / whole,
        decoding / whole,
        float(forward["attention_tflop"] / forward["total_tflop"]),
        text / total,
        branches,
        steps,
        projections=(own + text) / total,
        timesteps=table / (total + table),
    )


def catalogue(spec: ModelSpec, device: torch.device, **size: int | None) -> pd.DataFrame:
    """Every technique on a model and a device, in the order in which they are applied.

    Returns:
        DataFrame: technique, does, tier, touches, at_most_times_faster (with its default settings), bound (its reason),
        lacks (what it would take to run it here, or `""`),
        simulated (what it would take to save time here), not_with, settings (with their defaults).
    """
    shares, rows = shares_by_operations(spec, **size), []
    for technique in sorted((technique_of(name)() for name in TECHNIQUES), key=lambda each: each.order):
        bound = technique.bound(shares)
        settings = {name: getattr(technique.settings, name) for name in technique.settings.__struct_fields__}
        rows.append(
            {
                "technique": technique.name,
                "does": technique.does,
                "tier": technique.tier,
                "touches": [name for name in spec.components if name in technique.touches],
                "at_most_times_faster": bound.times_faster,
                "bound": bound.reason,
                "lacks": lacks(technique, spec, device),
                "simulated": technique.simulated(spec, device),
                "not_with": sorted(name for name in TECHNIQUES if conflicts((technique.name, name))),
                "settings": settings,
            }
        )
    return pd.DataFrame(rows)
