"""Sparse attention: self-attention over a window in space and time, over a radial mask, or over a pattern of each head, in
blocks of tokens."""

from __future__ import annotations

import math
import os
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec

from wanlab.core.errors import WanlabError
from wanlab.core.lazy import LazyModule
from wanlab.core.words import listed
from wanlab.models.spec import ModelSpec, component_title
from wanlab.techniques.head_patterns import HeadPatterns
from wanlab.techniques.technique import Bound, Proof, Shares, Technique
from wanlab.techniques.wan import head_size, in_graphs, only_wan

if TYPE_CHECKING:
    import torch

    from wanlab.techniques.attention import blocks, sites, sparse
    from wanlab.techniques.attention import errors as errors_module
    from wanlab.techniques.attention.blocks import BlockTable, HeadTable
    from wanlab.techniques.attention.sites import Site
    from wanlab.techniques.place import Place
else:  # a configuration is read without them
    blocks = LazyModule("wanlab.techniques.attention.blocks")
    errors_module = LazyModule("wanlab.techniques.attention.errors")
    sites = LazyModule("wanlab.techniques.attention.sites")
    sparse = LazyModule("wanlab.techniques.attention.sparse")


class SparseSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which blocks, and when.

    Attributes:
        pattern: `"window"` keeps near frames and near rows, `"radial"` fewer of a frame the farther away it is. The first
            latent frame, the picture, is always seen.
        density: part of the blocks that is computed at most; the pattern is as large as that allows.
        window: latent frames and rows of tokens on each side, for the pattern `window`; then density does not count.
        dense_percent: percent of the steps, from the first, that compute all blocks.
        dense_blocks: blocks of the denoiser, from the first, that compute all blocks of tokens.
        block: tokens of a block; kernels on GPUs have 128, smaller ones are for small models.
        kernel: `"auto"` is FlashAttention-4 on Hopper, flex_attention on other GPUs, and else a mask, which saves nothing.
        patterns: file of `HeadPatterns.save`, with a pattern for each head; then pattern, density, window and block do not
            count.
    """

    pattern: Literal["window", "radial"] = "radial"
    density: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.3
    window: tuple[int, int] | None = None
    dense_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 25.0
    dense_blocks: Annotated[int, msgspec.Meta(ge=0)] = 1
    block: Literal[4, 8, 16, 32, 64, 128] = 128
    kernel: Literal["auto", "flash-attention-4", "flex", "masked"] = "auto"
    patterns: str = ""

    def __post_init__(self) -> None:
        if self.patterns and self.window is not None:
            raise ValueError(
                "window and patterns are given, and each head has a pattern of its own; leave one out"
            )
        if self.window is not None and self.pattern != "window":
            raise ValueError(
                "window is given and the pattern is radial; give pattern: window, or leave window out"
            )
        if self.window is not None and min(self.window) < 0:
            raise ValueError(f"window is {list(self.window)}; give frames and rows on each side, 0 or more")


class SparseAttention(Technique[SparseSettings]):
    """Scores outside of a static pattern are not computed; what is kept is exact. Early steps and the first blocks, which
    lay out the whole picture, stay dense."""

    name = "sparse_attention"
    does = "computes self-attention over a window in space and time, over a radial mask, or over a pattern of each head"
    tier = "lossy"
    order = 4
    order_reason = "it takes attention from the kernels below it, except in its dense steps and blocks"
    not_on = in_graphs("its graph has an attention of its own")
    Settings = SparseSettings

    def __init__(self, settings: SparseSettings | None = None) -> None:
        super().__init__(settings)
        self.layer: SparseLayer | None = None
        self.sites: dict[str, list[Site]] = {}
        self._patterns: HeadPatterns | None = None

    @property
    def patterns(self) -> HeadPatterns | None:
        """The patterns of the heads, read once; None where all heads have the same.

        Raises:
            WanlabError: as `HeadPatterns.load`.
        """
        if self._patterns is None and self.settings.patterns:
            self._patterns = HeadPatterns.load(self.settings.patterns)
        return self._patterns

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.patterns.block if self.patterns else self.settings.block

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        if (reason := only_wan(spec)) or self.settings.kernel == "auto":
            return reason
        return sparse.lacks_kernel(self.settings.kernel, device, self.block, head_size=head_size(spec))

    def simulated(self, spec: ModelSpec, device: torch.device) -> str:
        block, size, kernel = self.block, head_size(spec), self.settings.kernel
        if kernel == "masked":
            return "the setting kernel: auto"
        if (
            only_wan(spec)
            or kernel != "auto"
            or sparse.kernel_here(device, block, head_size=size) != "masked"
        ):
            return ""
        return sparse.lacks_kernel("flex", device, block, head_size=size)

    def bound(self, shares: Shares) -> Bound:
        settings = self.settings
        dense = min(shares.steps, math.ceil(settings.dense_percent / 100 * shares.steps))
        kept = settings.density if settings.window is None else 0.0
        kept = min(1.0, self.patterns.density + self.patterns.means) if self.patterns else kept
        left = (
            f"{100 * (1 - kept):.3g} % of its blocks are left out"
            if kept
            else "a window of no size would leave it out"
        )
        return Bound(
            shares.denoising * shares.self_attention * (1 - kept) * (1 - dense / shares.steps),
            f"self-attention is {100 * shares.self_attention:.2g} % of a forward by {shares.source}, and {left} in"
            f" {shares.steps - dense} of {shares.steps} steps",
        )

    def apply(self, place: Place) -> None:
        model, settings = place.model, self.settings
        if self.patterns:
            self.patterns.check(model.spec, settings.patterns)
        about = (model.device, self.block, model.dtype, head_size(model.spec))
        kernel = sparse.kernel_here(*about) if settings.kernel == "auto" else settings.kernel
        if reason := sparse.lacks_kernel(kernel, *about):
            raise WanlabError(f"{self.name} cannot run here: it needs {reason}")
        self.layer = SparseLayer(settings, kernel, self.patterns)
        self.sites = sites.add_layer(place, self.layer)
        place.denoising.at_begin.append(self.layer.forget)

    def proof(self, place: Place) -> Proof:
        layer = self.layer
        assert layer is not None
        if elsewhere := sites.went_elsewhere(place, self.sites):
            return Proof(False, f"{self.name} is not everywhere: {elsewhere}.")
        parts, total = [], 0
        for component, (own, every) in sites.answers(self.sites, self.name).items():
            title = component_title(component)
            if missed := sites.left_out(place, self.sites[component], self.name, self._wanted):
                return Proof(
                    False, f"{self.name} left {missed} attentions of the {title} dense that should be sparse."
                )
            if own == 0:
                parts.append(f"none of the {title}, whose steps are dense")
                continue
            kept, blocks = layer.kept[component], layer.blocks[component]
            if kept >= blocks:
                remedy = (
                    f"Choose patterns that keep less than those of {self.settings.patterns}."
                    if self.patterns
                    else f"Lower the density, or take smaller blocks than {self.block} tokens."
                )
                return Proof(
                    False,
                    f"{self.name} computed all {blocks:,} blocks of the {title}: its mask is dense. {remedy}",
                )
            if denser := layer.denser(component):
                return Proof(
                    False, f"{self.name} computed more than its patterns say in the {title}: {denser}."
                )
            checks = [check for (name, _), check in layer.checks.items() if name == component]
            worst = max(checks, key=lambda check: check.error / check.limit)
            if not worst.error <= worst.limit:
                return Proof(
                    False,
                    f"{self.name} did not follow its mask in the {title}: its error against float64 over the same blocks is"
                    f" {worst.error:.2g}, more than {worst.limit:g}.",
                )
            apart = max(check.apart for check in checks)
            parts.append(
                f"{kept:,} of {blocks:,} blocks ({100 * kept / blocks:.3g} %{layer.spread(component)}) in {own} of {every}"
                f" of the {title}, which are {'up to ' * (len(checks) > 1)}{100 * apart:.3g} % from dense ones"
            )
            total += own
        if total == 0:
            return Proof(
                False, f"{self.name} computed no attention: every step or block that ran is a dense one."
            )
        how = layer.kernel if layer.kernel != "masked" else "a mask over all scores, which saves nothing"
        sizes = (
            f"a pattern for each head, by {os.path.basename(self.settings.patterns)}{self._means()}"
            if self.patterns
            else listed(sorted({table.size for table in layer.tables.values()}))
        )
        return Proof(True, f"{self.name} computed attentions by {how} ({sizes}): {listed(parts)}.")

    def _means(self) -> str:
        patterns = self.patterns
        count = sum(row.added for row in patterns.heads) if patterns else 0
        if patterns is None or not count:
            return ""
        return f"; {count} of {len(patterns.heads)} heads add means, {100 * patterns.means:.2g} % more scores"

    def computed(self) -> float:
        """Part of the scores of all self-attention in the last generation that was computed, with the dense steps and
        blocks: the blocks that the masks kept which the kernel was given, and the scores of the means."""
        layer = self.layer
        if layer is None:
            return 1.0
        counts = sites.answers(self.sites, self.name)
        means = self.patterns.means if self.patterns else 0.0
        calls = sum(every for _, every in counts.values())
        skipped = sum(
            own * (1 - layer.kept[component] / layer.blocks[component] - means)
            for component, (own, _) in counts.items()
            if layer.blocks[component]
        )
        return 1 - skipped / calls if calls else 1.0

    def _wanted(self, site: Site, step: int) -> bool:
        return self.layer is not None and self.layer.wants(site, step)


class Check(NamedTuple):
    """A sparse attention on sampled queries against float64: the worst of its heads.

    Attributes:
        error: distance to float64 over the same blocks. limit: the largest that one that follows its mask has.
        apart: distance of float64 over the same blocks to all blocks, of all heads.
    """

    error: float
    limit: float
    apart: float


class SparseLayer:
    """Sparse attention of one model.

    Attributes:
        kernel: see `attention.sparse.SPARSE`. patterns: of the heads; None where all have the same.
        tables: tokens of the video, (frames, height, width) -> its blocks, where all heads have the same.
        kept, blocks: expert -> blocks that its sparse attentions computed in the last generation, of how many: of all heads
            where each has its own pattern.
        heads: (expert, block) -> pairs of blocks that each head computed in the last generation, and of how many.
        checks: (expert, block) -> what its first sparse attention was like; of the first block alone where all heads have
            the same pattern.
    """

    name = SparseAttention.name

    def __init__(self, settings: SparseSettings, kernel: str, patterns: HeadPatterns | None = None) -> None:
        self.settings, self.kernel, self.patterns = settings, kernel, patterns
        self.tables: dict[tuple[int, int, int], BlockTable] = {}
        self._of_heads: dict[tuple[str, int], HeadTable] = {}
        self.checks: dict[tuple[str, int], Check] = {}
        self.kept: Counter[str] = Counter()
        self.blocks: Counter[str] = Counter()
        self.heads: dict[tuple[str, int], list[tuple[int, int]]] = {}

    def forget(self) -> None:
        """Begin to count anew."""
        self.kept.clear()
        self.blocks.clear()
        self.heads.clear()

    def wants(self, site: Site, step: int) -> bool:
        """Whether a site is sparse at a step."""
        dense = math.ceil(self.settings.dense_percent / 100 * site.denoising.steps)
        return step >= dense and site.block >= self.settings.dense_blocks

    def table(self, grid: tuple[int, int, int]) -> BlockTable:
        """The blocks of a size of video, where all heads have the same."""
        settings = self.settings
        if grid not in self.tables:
            self.tables[grid] = (
                blocks.table_of_density(settings.pattern, grid, settings.block, settings.density)
                if settings.window is None
                else blocks.window_table(grid, settings.block, *settings.window)
            )
        return self.tables[grid]

    def head_table(self, site: Site) -> HeadTable:
        """The blocks of the heads of a site.

        Raises:
            WanlabError: the patterns are for another size of video.
        """
        assert self.patterns is not None
        self.patterns.check_size(site.grid, self.settings.patterns)
        if not self._of_heads:
            self._of_heads = blocks.head_tables(self.patterns)
        return self._of_heads[site.component, site.block]

    def denser(self, component: str) -> str:
        """The first head whose masks had more blocks than its pattern, in words; or `""`."""
        for (name, block), counts in self.heads.items():
            rows = self.patterns.of(name, block) if self.patterns and name == component else []
            for row, (kept, every) in zip(rows, counts, strict=False):
                if kept / every > row.density + 1e-6:
                    return (
                        f"head {row.head} of block {block} had {100 * kept / every:.3g} % of its blocks, and its pattern"
                        f" ({row.pattern}) has {100 * row.density:.3g} %"
                    )
        return ""

    def spread(self, component: str) -> str:
        """Densities of the sparsest and the densest head of an expert; `""` where all are the same."""
        counts = [each for (name, _), heads in self.heads.items() if name == component for each in heads]
        shares = [100 * kept / every for kept, every in counts]
        return f", heads from {min(shares):.3g} to {max(shares):.3g} %" if shares else ""

    def __call__(
        self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor | None:
        if not self.wants(site, site.denoising.step):
            return None
        table: BlockTable | HeadTable
        if self.patterns:
            table = self.head_table(site)
            before = self.heads.get((site.component, site.block), [(0, 0)] * len(table.tables))
            own = [
                (kept + one.pairs, every + one.count)
                for (kept, every), one in zip(before, table.tables, strict=True)
            ]
            self.heads[site.component, site.block] = own
        else:
            table = self.table(site.grid)
        output = sparse.SPARSE[self.kernel](query, key, value, table)
        self.kept[site.component] += table.pairs
        self.blocks[site.component] += table.count
        checked = any(name == site.component for name, _ in self.checks)
        if (site.component, site.block) not in self.checks and (self.patterns or not checked):
            self.checks[site.component, site.block] = _checked(output, query, key, value, table)
        return output


def _checked(
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: BlockTable | HeadTable,
) -> Check:
    picked = errors_module.sampled_queries(query.shape[1])
    dense, exact = (
        sparse.exact_sparse(query, key, value, picked),
        sparse.exact_sparse(query, key, value, picked, table),
    )
    got = output[:, picked.to(output.device)].double()
    errors, apart = (
        ((one - other).square().sum((0, 1, 3)) / other.square().sum((0, 1, 3))).sqrt()  # of each head
        for one, other in ((got, exact), (exact, dense))
    )
    limits = (apart / 4).clamp_min(errors_module.LIMITS[str(query.dtype).removeprefix("torch.")])
    worst = int((errors / limits).nan_to_num(float("inf")).argmax())
    whole = float((exact - dense).norm() / dense.norm())
    return Check(float(errors[worst]), float(limits[worst]), whole)
