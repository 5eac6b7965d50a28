"""What a technique is: one switch that makes a model faster or smaller, with its price, its bound and its proof."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar

import msgspec

from wanlab.core.words import listed
from wanlab.models.spec import EXPERTS, ModelSpec, component_title

if TYPE_CHECKING:  # a configuration is read without PyTorch
    import pandas as pd
    import torch

    from wanlab.techniques.place import Place

Tier = Literal["exact", "numeric", "lossy"]
"""What a technique does to a video: exact gives every bit of it, numeric another rounding of the same mathematics, lossy
another video."""

TIERS: dict[str, str] = {
    "exact": "the same video, bit for bit",
    "numeric": "the same mathematics with other rounding",
    "lossy": "another video: measure its quality",
}


class NoSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a technique that has none."""


S = TypeVar("S", bound=msgspec.Struct)


@dataclass(frozen=True)
class Shares:
    """Where the time of a video goes, as parts of one; what a technique can save at most follows from them.

    Attributes:
        source: where they come from, for the reader: `"operations"` or the name of a measurement.
        denoising, decoding: parts of the whole video.
        self_attention: part of a forward of the denoiser that is the products of self-attention.
        text_keys: part of a forward that makes the keys and values of the text.
        branches: forwards of a step: 2 with guidance, else 1.
        steps: denoising steps.
        projections: part of a forward that makes queries, keys and values.
        timesteps: part of a forward that embeds a timestep for every token and reads its table of modulations.
    """

    source: str
    denoising: float
    decoding: float
    self_attention: float
    text_keys: float
    branches: int
    steps: int
    projections: float = 0.0
    timesteps: float = 0.0


@dataclass(frozen=True)
class Bound:
    """What a technique can buy at most.

    Attributes:
        saved: part of the time of a video, 0 to 1, that would vanish if all that it touches cost nothing.
        reason: where the part comes from.
    """

    saved: float
    reason: str

    @property
    def times_faster(self) -> float:
        """Amdahl's bound; infinite where nothing would be left."""
        return 1 / (1 - self.saved) if self.saved < 1 else float("inf")

    def __str__(self) -> str:
        return f"at most {self.times_faster:.2f}x: {self.reason}"


@dataclass(frozen=True)
class Proof:
    """Whether a technique did what it says in one generation, and what shows it."""

    passed: bool
    sentence: str


class Technique(ABC, Generic[S]):
    """One technique with its settings. A new one is one file with a subclass, which is in `registry.TECHNIQUES`.

    Attributes:
        name: name in configurations and tables.
        does: what it does, in a sentence without a full stop.
        tier: see `Tier`.
        order: place among the techniques that are applied together; `order_reason` says why it is there.
        touches: components that it changes.
        not_with: technique -> why the two cannot go together. not_on: engine of an expert -> why it does not work on it.
        Settings: its settings with their defaults; the docstring has a line for each.
    """

    name: ClassVar[str]
    does: ClassVar[str]
    tier: ClassVar[Tier]
    order: ClassVar[int]
    order_reason: ClassVar[str]
    touches: ClassVar[tuple[str, ...]] = EXPERTS
    not_with: ClassVar[Mapping[str, str]] = {}
    not_on: ClassVar[Mapping[str, str]] = {}
    Settings: ClassVar[type[msgspec.Struct]] = NoSettings

    def __init__(self, settings: S | None = None) -> None:
        self.settings: S = self.Settings() if settings is None else settings  # type: ignore[assignment]

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        """Why it cannot run on a model and a device, with what would bring it; empty if it can."""
        return ""

    def simulated(self, spec: ModelSpec, device: torch.device) -> str:
        """What it needs to save time, where it runs here in a simulation with the same quality; else empty."""
        return ""

    @abstractmethod
    def bound(self, shares: Shares) -> Bound:
        """What it can buy at most."""

    @abstractmethod
    def apply(self, place: Place) -> None:
        """Switch it on in a copy of the model; the original stays as it is, so that leaving the copy undoes it."""

    @abstractmethod
    def proof(self, place: Place) -> Proof:
        """What it did in the last generation of `place.model`: fails where nothing happened."""


def setting_text(value: object) -> str:
    """The value of a setting in tables, as it is written in a configuration."""
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, tuple | list):
        return "; ".join(map(str, value)) or "none"
    if value == "":
        return "none"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def answered(calls: pd.DataFrame, name: str) -> str:
    """`"3 of 8 calls of the high-noise expert and 5 of 12 of the low-noise expert"`: those that a rule answered."""
    parts: list[str] = []
    for component, rows in calls.groupby("component", sort=False):
        what = "of the" if parts else "calls of the"
        parts.append(
            f"{int((rows['by'] == name).sum())} of {len(rows)} {what} {component_title(str(component))}"
        )
    return listed(parts)


def proof_of_skips(calls: pd.DataFrame, name: str, why_none: str) -> Proof:
    """Whether a rule answered calls in place of a network, none of them the first of an expert.

    Args:
        calls: as `Denoising.frame`. name: name of the rule.
        why_none: what it would have taken to skip a call, for the sentence where none was skipped.
    """
    own = calls[calls["by"] == name]
    if own.empty:
        return Proof(False, f"{name} skipped none of {len(calls)} calls: {why_none}.")
    if early := sorted(set(own.loc[own["first"], "component"])):
        return Proof(
            False,
            f"{name} answered the first call of the {component_title(early[0])} with what another expert had predicted.",
        )
    return Proof(True, f"{name} answered {answered(calls, name)}.")
