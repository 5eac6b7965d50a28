"""Which blocks of tokens attend to which: windows in space and time, radial masks, and the same place in all frames."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from wanlab.techniques.head_patterns import HeadPatterns, Pattern

PATTERNS = ("window", "radial")
STEPS = 64
"""Sizes of a pattern among which the one for a density is looked for."""


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Blocks of keys that blocks of queries attend to.

    Attributes:
        kept: `[query blocks, key blocks]`, whether the pair is computed, with all of its tokens.
        block: tokens of a block. tokens: of the video, in order of frames, rows and columns.
        size: what made it, for readers.
    """

    kept: torch.Tensor
    block: int
    tokens: int
    size: str

    @cached_property
    def pairs(self) -> int:
        """Pairs of blocks that are computed."""
        return int(self.kept.sum())

    @property
    def density(self) -> float:
        """Part of the pairs that is computed."""
        return self.pairs / self.kept.numel()

    @property
    def count(self) -> int:
        """Pairs of blocks, computed or not."""
        return self.kept.numel()

    def of_tokens(self, queries: torch.Tensor | None = None) -> torch.Tensor:
        """Whether a query sees a key: `[queries, tokens]`, of some queries or of all."""
        numbers = torch.arange(self.tokens) if queries is None else queries.cpu()
        keys = torch.arange(self.tokens) // self.block
        return self.kept[numbers // self.block][:, keys]


@dataclass(frozen=True, eq=False)
class HeadTable:
    """Blocks of the heads of one attention, each with a table of its own.

    Attributes:
        tables: of each head; heads of one pattern share theirs.
        added: of each head, whether the means of the blocks that it leaves out take their place, see `sparse`.
    """

    tables: tuple[BlockTable, ...]
    added: tuple[bool, ...]

    @property
    def block(self) -> int:
        return self.tables[0].block

    @property
    def tokens(self) -> int:
        return self.tables[0].tokens

    @property
    def size(self) -> str:
        """What made it, for readers."""
        return f"{len(set(self.tables))} patterns of {len(self.tables)} heads"

    @property
    def pairs(self) -> int:
        """Pairs of blocks that are computed, of all heads."""
        return sum(table.pairs for table in self.tables)

    @property
    def count(self) -> int:
        """Pairs of blocks of all heads, computed or not."""
        return sum(table.count for table in self.tables)

    @property
    def density(self) -> float:
        """Part of the pairs that is computed."""
        return self.pairs / self.count

    def of_tokens(self, queries: torch.Tensor | None = None) -> torch.Tensor:
        """Whether a query sees a key: `[heads, queries, tokens]`, of some queries or of all."""
        return torch.stack([table.of_tokens(queries) for table in self.tables])

    def bias(self, head: int, queries: torch.Tensor | None = None) -> torch.Tensor:
        """What a head adds to the scores of all keys and, behind them, of the mean of each block: `[queries, tokens +
        blocks]`, float64. The mean of a block that is left out counts as often as the block has tokens."""
        numbers = torch.arange(self.tokens) if queries is None else queries.cpu()
        table, outside = self.tables[head], float("-inf")
        seen = torch.zeros(len(numbers), self.tokens, dtype=torch.float64)
        seen.masked_fill_(~table.of_tokens(numbers), outside)
        means = block_sizes(self.tokens, self.block).double().log().repeat(len(numbers), 1)
        means.masked_fill_(table.kept[numbers // self.block] | (not self.added[head]), outside)
        return torch.cat([seen, means], 1)


def block_sizes(tokens: int, block: int) -> torch.Tensor:
    """Tokens of each block; the last may have fewer."""
    first = torch.arange(0, tokens, block)
    return (tokens - first).clamp_max(block)


def block_means(tensor: torch.Tensor, block: int) -> torch.Tensor:
    """Mean over the tokens of each block, `[B, blocks, H, D]` of `[B, L, H, D]`; summed in float32 at least."""
    sizes = block_sizes(tensor.shape[1], block).to(tensor.device)
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    short = len(sizes) * block - tensor.shape[1]
    parts = torch.nn.functional.pad(wide, (0, 0, 0, 0, 0, short)).unflatten(1, (len(sizes), block))
    return parts.sum(2) / sizes[:, None, None]


@dataclass(frozen=True, eq=False)
class _Spans:
    """Frames and places in the frame that each block covers, first and last, `[blocks]` each."""

    frames: tuple[torch.Tensor, torch.Tensor]
    places: tuple[torch.Tensor, torch.Tensor]

    @staticmethod
    def distance(ends: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Smallest distance between any member of two blocks, `[blocks, blocks]`."""
        low, high = ends
        return torch.maximum(low[None] - high[:, None], low[:, None] - high[None]).clamp_min(0)


def _spans(grid: tuple[int, int, int], block: int) -> _Spans:
    frames, height, width = grid
    plane = height * width
    first = torch.arange(0, frames * plane, block)
    last = (first + block - 1).clamp_max(frames * plane - 1)
    low, high = first // plane, last // plane
    inside = low == high  # a block over two frames covers places of both ends
    places = torch.where(inside, first % plane, 0), torch.where(inside, last % plane, plane - 1)
    return _Spans((low, high), places)


def _always(spans: _Spans, picture: bool) -> torch.Tensor:
    """Each block itself, and keys of the first latent frame, which is the picture."""
    itself = torch.eye(len(spans.frames[0]), dtype=torch.bool)
    return (spans.frames[0] == 0)[None] | itself if picture else itself


def window_table(
    grid: tuple[int, int, int], block: int, frames: int, rows: int, picture: bool = True
) -> BlockTable:
    """Keys within some latent frames and some rows of a query, on each side, and the first latent frame.

    Args:
        grid: tokens of the video, (frames, height, width). block: tokens of a block.
        picture: whether all see the first latent frame.
    """
    spans = _spans(grid, block)
    by_row = (spans.places[0] // grid[2], spans.places[1] // grid[2])
    near = (spans.distance(spans.frames) <= frames) & (spans.distance(by_row) <= rows)
    return BlockTable(
        near | _always(spans, picture),
        block,
        math.prod(grid),
        f"{frames} frames and {rows} rows on each side",
    )


def radial_table(grid: tuple[int, int, int], block: int, decay: float, picture: bool = True) -> BlockTable:
    """A window in the frame whose size halves each time the distance of frames doubles; neighbours and the first frame are
    seen whole. Where the window is smaller than a block, some distances are left out instead. After Li et al. 2025, "Radial
    attention" (arXiv:2506.19852), on whole blocks.

    Args:
        grid, block, picture: as `window_table`. decay: factor of all windows.
    """
    spans, plane = _spans(grid, block), grid[1] * grid[2]
    apart = spans.distance(spans.frames)
    halvings = torch.floor(torch.log2(apart.clamp_min(1).float())) + 1
    size = plane * decay / 2**halvings  # tokens on each side
    near = spans.distance(spans.places) <= size
    every = torch.ceil(block / (2 * size)).clamp_min(1)
    kept = (apart <= 1) | (near & (apart % every == 0))
    return BlockTable(kept | _always(spans, picture), block, math.prod(grid), f"decay {decay:.3g}")


def same_place_table(grid: tuple[int, int, int], block: int, reach: int, picture: bool = True) -> BlockTable:
    """Keys at the place of a query in all frames, and some tokens before and behind it, in the order of rows: what the
    temporal heads of Xi et al. 2025, "Sparse VideoGen" (arXiv:2502.01776), look at, on whole blocks.

    Args:
        grid, block, picture: as `window_table`. reach: tokens on each side.
    """
    spans = _spans(grid, block)
    near = spans.distance(spans.places) <= reach
    return BlockTable(
        near | _always(spans, picture), block, math.prod(grid), f"{reach} tokens on each side in all frames"
    )


def pattern_table(pattern: Pattern, grid: tuple[int, int, int], block: int) -> BlockTable:
    """The table of a pattern of a head; grid and block as `window_table`."""
    size, picture = pattern.size, pattern.picture
    if pattern.kind == "window":
        return window_table(grid, block, int(size[0]), int(size[1]), picture)
    if pattern.kind == "radial":
        return radial_table(grid, block, size[0], picture)
    if pattern.kind == "same_place":
        return same_place_table(grid, block, int(size[0]), picture)
    count = -(-math.prod(grid) // block)
    return BlockTable(torch.ones(count, count, dtype=torch.bool), block, math.prod(grid), "all blocks")


def head_tables(patterns: HeadPatterns) -> dict[tuple[str, int], HeadTable]:
    """(expert, block) -> the tables of its heads; those of one pattern are the same object."""
    known = {row.pattern for row in patterns.heads}
    tables = {pattern: pattern_table(pattern, patterns.grid, patterns.block) for pattern in known}
    found = {}
    for place in dict.fromkeys((row.component, row.block) for row in patterns.heads):
        rows = patterns.of(*place)
        found[place] = HeadTable(tuple(tables[row.pattern] for row in rows), tuple(row.added for row in rows))
    return found


def table_of_density(pattern: str, grid: tuple[int, int, int], block: int, density: float) -> BlockTable:
    """The largest pattern of at most a density; the smallest one where even that is denser.

    Args:
        pattern: one of `PATTERNS`. grid, block: as `window_table`.
    """
    tables = _tables(pattern, grid, block)
    table = next(tables)
    while table.density > density and (smaller := next(tables, None)) is not None:
        table = smaller
    return table


def _tables(pattern: str, grid: tuple[int, int, int], block: int) -> Iterator[BlockTable]:
    """Tables of a pattern, from the densest to the sparsest."""
    frames, height, _ = grid
    before = None
    for step in range(STEPS, -1, -1):
        if pattern == "radial":
            yield radial_table(
                grid, block, 2 * frames * 2 ** (-(STEPS - step) / 5)
            )  # the first one keeps all
            continue
        size = round(step / STEPS * (frames - 1)), round(step / STEPS * (height - 1))
        if size != before:
            yield window_table(grid, block, *size)
        before = size
