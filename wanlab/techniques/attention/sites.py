"""Where Wan's denoisers compute self-attention: places that techniques answer, outside of what a compiler sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import _get_qkv_projections

from wanlab.export.friendly import rotate_pairs
from wanlab.models.blocks import blocks_of
from wanlab.models.spec import EXPERTS, component_title
from wanlab.techniques.denoising import Denoising
from wanlab.techniques.place import Place

DEFAULT = "default"
"""Who answered a call that no layer took: PyTorch's own choice."""

_SITES: WeakValueDictionary[int, Site] = WeakValueDictionary()


class Layer(Protocol):
    """A technique of attention. The last one that was added to a site is asked first."""

    name: str

    def __call__(
        self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor | None:
        """The attention of a site, `[B, L, H, D]` from three of the same shape; None leaves it to the next layer."""


class Site:
    """The self-attention of one block of one expert.

    Attributes:
        component: the expert. block: number of the block, from 0, of `blocks`.
        grid: tokens of the video, (frames, height, width), in the last forward; (0, 0, 0) before it.
        denoising: tells the step.
        layers: techniques of attention, in the order in which they were added.
        answered: name of a layer, or `DEFAULT` -> calls of the last generation that it answered.
    """

    def __init__(self, component: str, block: int, blocks: int, grid: Grid, denoising: Denoising) -> None:
        self.component, self.block, self.blocks = component, block, blocks
        self.denoising, self._grid = denoising, grid
        self.layers: list[Layer] = []
        self.answered: Counter[str] = Counter()

    def __deepcopy__(self, memo) -> Site:
        """Copies of a network, such as a compiled one, are the same site."""
        return self

    @property
    def grid(self) -> tuple[int, int, int]:
        return self._grid.tokens

    def forget(self) -> None:
        """Begin to count anew."""
        self.answered.clear()

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention by the first layer that takes the call, `[B, L, H, D]`."""
        for layer in reversed(self.layers):
            output = layer(self, query, key, value)
            if output is not None:
                self.answered[layer.name] += 1
                return output
        self.answered[DEFAULT] += 1
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


class Grid:
    """The tokens of the video in the last forward of a network, which a hook of the network writes.

    Attributes:
        tokens: (frames, height, width).
    """

    def __init__(self, patch: Sequence[int]) -> None:
        self.patch, self.tokens = tuple(patch), (0, 0, 0)

    def __deepcopy__(self, memo) -> Grid:
        return self

    def __call__(self, network: torch.nn.Module, positional: tuple, named: dict) -> None:
        latents = positional[0] if positional else named["hidden_states"]
        frames, height, width = (
            size // part for size, part in zip(latents.shape[2:], self.patch, strict=True)
        )
        self.tokens = (frames, height, width)


# One operator for the compiler: what is inside runs as Python in compiled networks too, so it may count, choose by step and
# call kernels that no compiler can trace. The site is a tensor, as a number would be compiled in and each block anew.
@torch.library.custom_op("wanlab::attend", mutates_args=())
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, site: torch.Tensor) -> torch.Tensor:
    """Attention at a site, `[B, L, H, D]`, dense in memory."""
    return _SITES[int(site)].attend(query, key, value).to(query.dtype).contiguous()


@attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, site: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape)


class SiteProcessor:
    """Attention processor for the self-attention of `WanAttention`: projections, norms and rotary embedding as those of
    diffusers, attention by a site."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.number = torch.tensor(id(site))
        _SITES[id(site)] = site

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ) -> torch.Tensor:
        """`[B, L, C]` to `[B, L, C]`."""
        query, key, value = _get_qkv_projections(attn, hidden_states, None)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        if rotary_emb is not None:
            query, key = rotate_pairs(query, *rotary_emb), rotate_pairs(key, *rotary_emb)
        mixed = torch.ops.wanlab.attend(query, key, value, self.number)
        return attn.to_out[1](attn.to_out[0](mixed.flatten(2, 3)))


def sites_of(place: Place) -> dict[str, list[Site]]:
    """Expert -> the sites of its blocks, made where they are not there yet."""
    sites: dict[str, list[Site]] = {}
    for component in (name for name in place.model.components if name in EXPERTS):
        network = place.network(component)
        blocks = blocks_of(network)
        if not isinstance(blocks[0].module.attn1.processor, SiteProcessor):
            grid = Grid(network.config.patch_size)
            network.register_forward_pre_hook(grid, with_kwargs=True)
            for block in blocks:
                site = Site(component, block.number, len(blocks), grid, place.denoising)
                block.module.attn1.processor = SiteProcessor(site)
                place.denoising.at_begin.append(site.forget)
        sites[component] = [block.module.attn1.processor.site for block in blocks]
    return sites


def add_layer(place: Place, layer: Layer) -> dict[str, list[Site]]:
    """Put a layer on every site of a model; the sites, as `sites_of`."""
    sites = sites_of(place)
    for site in (site for own in sites.values() for site in own):
        site.layers.append(layer)
    return sites


def went_elsewhere(place: Place, sites: Mapping[str, Sequence[Site]]) -> str:
    """The first expert whose attention was computed outside of its sites in the last generation, in a sentence; or `""`."""
    calls = place.calls[place.calls["ran"]]
    for component, own in sites.items():
        left_out = calls.loc[calls["component"] == component, "left_out"]
        expected = sum(site.block not in blocks for site in own for blocks in left_out)
        counted = sum(site.answered.total() for site in own)
        if counted < expected:
            title = component_title(component)
            return f"{expected - counted} of {expected} attentions of the {title} were computed elsewhere"
    return ""


def left_out(place: Place, sites: Sequence[Site], name: str, wanted: Callable[[Site, int], bool]) -> int:
    """Attentions of the last generation that a layer should have answered and that neither it nor one above it did.

    Args:
        sites: of one expert. name: name of the layer. wanted: whether it wants a site at a step.
    """
    calls = place.calls
    ran = calls[calls["ran"] & (calls["component"] == sites[0].component)]
    count = sum(
        wanted(site, step)
        for site in sites
        for step, blocks in zip(ran["step"], ran["left_out"], strict=True)
        if site.block not in blocks
    )
    for site in sites:
        names = [layer.name for layer in site.layers]
        from_it = names[names.index(name) :] if name in names else []
        count -= sum(site.answered[each] for each in from_it)
    return max(0, count)


def answers(sites: Mapping[str, Sequence[Site]], name: str) -> dict[str, tuple[int, int]]:
    """Expert -> calls that a layer of this name answered in the last generation, and all calls; experts that ran."""
    counts = {
        component: (sum(site.answered[name] for site in own), sum(site.answered.total() for site in own))
        for component, own in sites.items()
    }
    return {component: count for component, count in counts.items() if count[1]}
