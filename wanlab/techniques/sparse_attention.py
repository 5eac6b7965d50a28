"""Sparse attention: self-attention over a window in space and time, or over a radial mask, in blocks of tokens."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec

from wanlab.core.errors import WanlabError
from wanlab.core.words import listed
from wanlab.models.spec import ModelSpec, component_title
from wanlab.techniques.technique import Bound, Proof, Shares, Technique
from wanlab.techniques.wan import head_size, in_graphs, only_wan

if TYPE_CHECKING:
    import torch

    from wanlab.techniques.attention.blocks import BlockTable
    from wanlab.techniques.attention.sites import Site
    from wanlab.techniques.place import Place


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
    """

    pattern: Literal["window", "radial"] = "radial"
    density: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.3
    window: tuple[int, int] | None = None
    dense_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 25.0
    dense_blocks: Annotated[int, msgspec.Meta(ge=0)] = 1
    block: Literal[4, 8, 16, 32, 64, 128] = 128
    kernel: Literal["auto", "flash-attention-4", "flex", "masked"] = "auto"

    def __post_init__(self) -> None:
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
    does = (
        "computes self-attention over a window in space and time, or over a radial mask, and the first frame"
    )
    tier = "lossy"
    order = 4
    order_reason = "it takes attention from the kernels below it, except in its dense steps and blocks"
    not_on = in_graphs("its graph has an attention of its own")
    Settings = SparseSettings

    def __init__(self, settings: SparseSettings | None = None) -> None:
        super().__init__(settings)
        self.layer: SparseLayer | None = None
        self.sites: dict[str, list[Site]] = {}

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        if (reason := only_wan(spec)) or self.settings.kernel == "auto":
            return reason
        from wanlab.techniques.attention.sparse import lacks_kernel  # loads PyTorch

        return lacks_kernel(self.settings.kernel, device, self.settings.block, head_size=head_size(spec))

    def simulated(self, spec: ModelSpec, device: torch.device) -> str:
        from wanlab.techniques.attention.sparse import kernel_here, lacks_kernel  # loads PyTorch

        block, size, kernel = self.settings.block, head_size(spec), self.settings.kernel
        if kernel == "masked":
            return "the setting kernel: auto"
        if only_wan(spec) or kernel != "auto" or kernel_here(device, block, head_size=size) != "masked":
            return ""
        return lacks_kernel("flex", device, block, head_size=size)

    def bound(self, shares: Shares) -> Bound:
        settings = self.settings
        dense = min(shares.steps, math.ceil(settings.dense_percent / 100 * shares.steps))
        kept = settings.density if settings.window is None else 0.0
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
        from wanlab.techniques.attention.sites import add_layer  # loads PyTorch
        from wanlab.techniques.attention.sparse import kernel_here, lacks_kernel

        model, settings = place.model, self.settings
        about = (model.device, settings.block, model.dtype, head_size(model.spec))
        kernel = kernel_here(*about) if settings.kernel == "auto" else settings.kernel
        if reason := lacks_kernel(kernel, *about):
            raise WanlabError(f"{self.name} cannot run here: it needs {reason}")
        self.layer = SparseLayer(settings, kernel)
        self.sites = add_layer(place, self.layer)
        place.denoising.at_begin.append(self.layer.forget)

    def proof(self, place: Place) -> Proof:
        from wanlab.techniques.attention.errors import LIMITS  # loads PyTorch
        from wanlab.techniques.attention.sites import answers, left_out, went_elsewhere

        layer = self.layer
        assert layer is not None
        if elsewhere := went_elsewhere(place, self.sites):
            return Proof(False, f"{self.name} is not everywhere: {elsewhere}.")
        parts, total = [], 0
        for component, (own, every) in answers(self.sites, self.name).items():
            title = component_title(component)
            if missed := left_out(place, self.sites[component], self.name, self._wanted):
                return Proof(
                    False, f"{self.name} left {missed} attentions of the {title} dense that should be sparse."
                )
            if own == 0:
                parts.append(f"none of the {title}, whose steps are dense")
                continue
            kept, blocks = layer.kept[component], layer.blocks[component]
            if kept >= blocks:
                return Proof(
                    False,
                    f"{self.name} computed all {blocks:,} blocks of the {title}: its mask is dense. Lower the density, or"
                    f" take smaller blocks than {self.settings.block} tokens.",
                )
            check = layer.checks[component]
            limit = max(LIMITS[check.dtype], check.apart / 4)
            if not check.error <= limit:
                return Proof(
                    False,
                    f"{self.name} did not follow its mask in the {title}: its error against float64 over the same blocks is"
                    f" {check.error:.2g}, more than {limit:g}.",
                )
            parts.append(
                f"{kept:,} of {blocks:,} blocks ({100 * kept / blocks:.3g} %) in {own} of {every} of the {title}, which are"
                f" {100 * check.apart:.2g} % from dense ones"
            )
            total += own
        if total == 0:
            return Proof(
                False, f"{self.name} computed no attention: every step or block that ran is a dense one."
            )
        how = layer.kernel if layer.kernel != "masked" else "a mask over all scores, which saves nothing"
        sizes = listed(sorted({table.size for table in layer.tables.values()}))
        return Proof(True, f"{self.name} computed attentions by {how} ({sizes}): {listed(parts)}.")

    def _wanted(self, site: Site, step: int) -> bool:
        return self.layer is not None and self.layer.wants(site, step)


class Check(NamedTuple):
    """The first sparse attention of an expert, on sampled queries against float64.

    Attributes:
        error: distance to float64 over the same blocks. apart: distance of that to all blocks. dtype: of the model.
    """

    error: float
    apart: float
    dtype: str


class SparseLayer:
    """Sparse attention of one model.

    Attributes:
        kernel: see `attention.sparse.SPARSE`.
        tables: tokens of the video, (frames, height, width) -> its blocks.
        kept, blocks: expert -> blocks that its sparse attentions computed in the last generation, of how many.
        checks: expert -> what its first sparse attention was like.
    """

    name = SparseAttention.name

    def __init__(self, settings: SparseSettings, kernel: str) -> None:
        self.settings, self.kernel = settings, kernel
        self.tables: dict[tuple[int, int, int], BlockTable] = {}
        self.checks: dict[str, Check] = {}
        self.kept: Counter[str] = Counter()
        self.blocks: Counter[str] = Counter()

    def forget(self) -> None:
        """Begin to count anew."""
        self.kept.clear()
        self.blocks.clear()

    def wants(self, site: Site, step: int) -> bool:
        """Whether a site is sparse at a step."""
        dense = math.ceil(self.settings.dense_percent / 100 * site.denoising.steps)
        return step >= dense and site.block >= self.settings.dense_blocks

    def table(self, grid: tuple[int, int, int]) -> BlockTable:
        """The blocks of a size of video."""
        from wanlab.techniques.attention import blocks

        settings = self.settings
        if grid not in self.tables:
            self.tables[grid] = (
                blocks.table_of_density(settings.pattern, grid, settings.block, settings.density)
                if settings.window is None
                else blocks.window_table(grid, settings.block, *settings.window)
            )
        return self.tables[grid]

    def __call__(
        self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor | None:
        if not self.wants(site, site.denoising.step):
            return None
        from wanlab.techniques.attention.sparse import SPARSE

        table = self.table(site.grid)
        output = SPARSE[self.kernel](query, key, value, table)
        self.kept[site.component] += table.pairs
        self.blocks[site.component] += table.kept.numel()
        if site.component not in self.checks:
            self.checks[site.component] = _checked(output, query, key, value, table)
        return output


def _checked(
    output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: BlockTable
) -> Check:
    from wanlab.techniques.attention.errors import exact_attention, sampled_queries

    picked = sampled_queries(query.shape[1])
    dense = exact_attention(query, key, value, picked)
    exact = exact_attention(query, key, value, picked, table.of_tokens(picked))
    got = output[:, picked.to(output.device)].double()
    return Check(
        float((got - exact).norm() / exact.norm()),
        float((exact - dense).norm() / dense.norm()),
        str(query.dtype).removeprefix("torch."),
    )
