"""A sparse pattern for each head of each block: what is measured once, kept in a file, and read by `sparse_attention`."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from wanlab.core.errors import WanlabError
from wanlab.core.files import write_json
from wanlab.core.lazy import LazyModule
from wanlab.core.text import read_json
from wanlab.models.spec import EXPERTS, ModelSpec, component_title

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
else:  # a configuration is read without them
    pd = LazyModule("pandas")

DENSE: Final = "dense"
SIZES = {"window": 2, "radial": 1, "same_place": 1, DENSE: 0}
"""Kind of a pattern -> how many sizes it has."""


class Pattern(msgspec.Struct, frozen=True):
    """Blocks of keys that a head computes, the same in every call.

    Attributes:
        kind: `"window"` (near frames and rows), `"radial"` (fewer of a frame the farther away it is), `"same_place"` (the
            same place in all frames) or `"dense"`.
        size: of a window latent frames and rows on each side; of a radial mask its decay; of the same place tokens on each
            side.
        picture: whether all see the first latent frame, which is the picture.
    """

    kind: Literal["window", "radial", "same_place", "dense"]
    size: tuple[float, ...] = ()
    picture: bool = True

    def __post_init__(self) -> None:
        if len(self.size) != SIZES[self.kind] or not all(0 <= value < math.inf for value in self.size):
            raise ValueError(
                f"a {self.kind} pattern has {SIZES[self.kind]} sizes of 0 or more, not {list(self.size)}"
            )

    def __str__(self) -> str:
        if self.kind == DENSE:
            return DENSE
        sizes = " x ".join(f"{value:g}" for value in self.size)
        return f"{self.kind.replace('_', ' ')} {sizes}{' + first frame' if self.picture else ''}"


class HeadPattern(msgspec.Struct, frozen=True):
    """The pattern of one head.

    Attributes:
        component, block, head: the expert, its block and the head, from 0.
        added: whether the means of the blocks that are left out take their place, see `attention.sparse`.
        density: part of the pairs of blocks that is computed.
        kept: part of the attention's mass that is on them, and error: distance of the output to the dense one, relative to
            it. Both are those of the call for which they were worst when they were measured.
    """

    component: str
    block: int
    head: int
    pattern: Pattern
    added: bool
    density: float
    kept: float
    error: float


class HeadPatterns(msgspec.Struct, frozen=True):
    """The patterns of all heads of a model at one size of video.

    Attributes:
        model: its name. grid: tokens of the video, (frames, height, width). block: tokens of a block.
        least_kept, most_error: what was asked of every head; None was not.
        heads: a row for each, by expert, block and head.
    """

    model: str
    grid: tuple[int, int, int]
    block: int
    least_kept: float | None
    most_error: float | None
    heads: tuple[HeadPattern, ...]

    @property
    def density(self) -> float:
        """Mean part of the pairs of blocks that is computed."""
        return sum(row.density for row in self.heads) / len(self.heads)

    @property
    def means(self) -> float:
        """Scores with the means of blocks, as a part of those of dense attention: one more key for each block, in heads that
        add them."""
        return sum(row.added for row in self.heads) / len(self.heads) / self.block

    def of(self, component: str, block: int) -> list[HeadPattern]:
        """The heads of a block of an expert, in order."""
        rows = [row for row in self.heads if (row.component, row.block) == (component, block)]
        return sorted(rows, key=lambda row: row.head)

    def frame(self) -> pd.DataFrame:
        """A row per head: component, block, head, pattern (in words), kind, means_added, density_percent, kept_percent,
        relative_error."""
        return pd.DataFrame(
            {
                "component": row.component,
                "block": row.block,
                "head": row.head,
                "pattern": str(row.pattern),
                "kind": row.pattern.kind,
                "means_added": row.added,
                "density_percent": 100 * row.density,
                "kept_percent": 100 * row.kept,
                "relative_error": row.error,
            }
            for row in self.heads
        )

    def check(self, spec: ModelSpec, path: str) -> None:
        """Whether they are of a model.

        Raises:
            WanlabError: they are of another one, or of other blocks and heads.
        """
        if self.model != spec.name:
            raise WanlabError(
                f"{path} holds patterns of {self.model}, and this is {spec.name}: {_mend('for this model')}"
            )
        for component in (name for name in spec.components if name in EXPERTS):
            config = spec.part(spec.part_of(component)).config
            blocks, heads = config.get("num_layers", 0), config.get("num_attention_heads", 0)
            known = sorted((row.block, row.head) for row in self.heads if row.component == component)
            if known != [(block, head) for block in range(blocks) for head in range(heads)]:
                raise WanlabError(
                    f"{path} holds {len(known)} patterns for the {component_title(component)}, which has {blocks} blocks"
                    f" of {heads} heads: {_mend('for this model')}"
                )

    def check_size(self, grid: tuple[int, int, int], path: str) -> None:
        """Whether they are of a size of video.

        Args:
            grid: tokens of the video, (frames, height, width).

        Raises:
            WanlabError: they are of another one.
        """
        if self.grid != grid:
            theirs, own = ("x".join(map(str, size)) for size in (self.grid, grid))
            raise WanlabError(
                f"{path} holds patterns for videos of {theirs} tokens (frames, height, width), and this one has {own}:"
                f" {_mend('at this size')}"
            )

    def save(self, path: str | os.PathLike) -> Path:
        """Write them to a JSON file, for the setting `patterns` of `sparse_attention`."""
        return write_json(path, msgspec.to_builtins(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> HeadPatterns:
        """Read a file of `save`.

        Raises:
            WanlabError: no such file, or not one of `save`.
        """
        try:
            patterns = msgspec.convert(read_json(path), cls)
        except msgspec.ValidationError as error:
            raise WanlabError(f"{os.fspath(path)} holds no patterns of heads ({error}); {_write()}") from None
        if not patterns.heads or patterns.block < 1:
            raise WanlabError(f"{os.fspath(path)} holds no patterns of heads; {_write()}")
        return patterns


def _write() -> str:
    return "write one with techniques.measure_patterns(model).choose().save(path)"


def _mend(where: str) -> str:
    return f"measure them {where} (techniques.measure_patterns), or leave the setting `patterns` of sparse_attention out"
