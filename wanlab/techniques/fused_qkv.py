"""Fused projections: queries, keys and values of self-attention from one product, keys and values of the text from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from wanlab.core.errors import WanlabError
from wanlab.core.lazy import LazyModule
from wanlab.core.words import listed
from wanlab.models.spec import EXPERTS, ModelSpec, component_title
from wanlab.techniques.technique import Bound, NoSettings, Proof, Shares, Technique
from wanlab.techniques.wan import in_graphs, only_wan

if TYPE_CHECKING:
    import torch

    from wanlab.models import blocks as blocks_module
    from wanlab.techniques import joining
    from wanlab.techniques.place import Place
else:  # a configuration is read without them
    torch = LazyModule("torch")
    blocks_module = LazyModule("wanlab.models.blocks")
    joining = LazyModule("wanlab.techniques.joining")

PRODUCTS = {"attn1": 1, "attn2": 2}
"""Attention of a block -> products that make its queries, keys and values once they are fused; 3 before."""


class FusedQkv(Technique[NoSettings]):
    """diffusers' `fuse_projections` does the same with a second copy of the weights, 10 GiB for an expert of A14B in
    bfloat16. Here the weights of the separate layers become views of the fused ones, so that no memory is needed beyond one
    layer's while it is joined. The loaded model takes part in that: its values stay, their place changes.

    Layers that a precision plan or a LoRA replaced stay as they are, and so do keys and values that `text_keys` keeps.
    """

    name = "fused_qkv"
    does = "makes queries, keys and values of self-attention in one product, and keys and values of the text in one"
    tier = "numeric"
    order = 1
    order_reason = "it joins the layers that are left after the keys of the text are kept"
    not_on: ClassVar[Mapping[str, str]] = in_graphs("its graph has the separate layers")

    def __init__(self, settings: NoSettings | None = None) -> None:
        super().__init__(settings)
        self.fused: dict[str, dict[str, int]] = {}  # expert -> attention -> blocks whose layers were joined

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        return only_wan(spec)

    def bound(self, shares: Shares) -> Bound:
        share = 100 * shares.projections
        return Bound(
            shares.denoising * shares.projections,
            f"these layers are {share:.2g} % of a forward by {shares.source}, and only launches and reading their input"
            " again can vanish, not the operations",
        )

    def apply(self, place: Place) -> None:
        for component in (name for name in place.model.components if name in EXPERTS):
            blocks = [block.module for block in blocks_module.blocks_of(place.network(component))]
            self.fused[component] = {
                name: sum(_fuse(getattr(block, name)) for block in blocks) for name in PRODUCTS
            }
            if not self.fused[component]["attn1"]:
                kind = type(blocks[0].attn1.to_q).__name__
                raise WanlabError(
                    f"{self.name} joins linear layers of PyTorch, and those of the {component_title(component)} are"
                    f" {kind}; leave {self.name} or what replaced them (a plan, a LoRA) out"
                )

    def proof(self, place: Place) -> Proof:
        ran, parts = place.calls[place.calls["ran"]].groupby("component").size(), []
        for component, fused in self.fused.items():
            network, title = place.model.component(component), component_title(component)
            if not ran.get(component, 0):
                continue
            for name, expected in fused.items():
                blocks = [getattr(block.module, name) for block in blocks_module.blocks_of(network)]
                products = [_products(attention, name) for attention in blocks if _is_fused(attention)]
                if len(products) < expected or any(count > PRODUCTS[name] for count in products):
                    what = "self-attention" if name == "attn1" else "cross-attention"
                    apart = len(blocks) - sum(count <= PRODUCTS[name] for count in products)
                    return Proof(
                        False,
                        f"{self.name} left {what} of {apart} of {len(blocks)} blocks of the {title} in separate products.",
                    )
            count, text = fused["attn1"], fused["attn2"]
            parts.append(f"{count} of self-attention and {text} of the text in the {title}")
        if not parts:
            return Proof(False, f"{self.name} took part in nothing: no denoiser ran.")
        return Proof(
            True, f"{self.name} joined the layers of blocks: {listed(parts)}, counted by their products."
        )


def _is_fused(attention: Any) -> bool:
    return bool(getattr(attention, "fused_projections", False))


def _fuse(attention: Any) -> bool:
    """Join the projections of an attention whose layers are linear layers of PyTorch; whether it was done."""
    names = ["to_k", "to_v"] if attention.is_cross_attention else ["to_q", "to_k", "to_v"]
    pictures = ["add_k_proj", "add_v_proj"] if attention.add_k_proj is not None else []
    layers = {name: getattr(attention, name, None) for name in (*names, *pictures)}
    if _is_fused(attention) or any(type(layer) is not torch.nn.Linear for layer in layers.values()):
        return False
    joined = joining.joined_linear([layers[name] for name in names])
    setattr(attention, "to_kv" if attention.is_cross_attention else "to_qkv", joined)
    if pictures:
        attention.to_added_kv = joining.joined_linear([layers[name] for name in pictures])
    for name in names:  # diffusers asks for those of the picture by name
        delattr(attention, name)
    attention.fused_projections = True
    return True


def _products(attention: Any, name: str) -> int:
    """Products that PyTorch computes for queries, keys and values of an attention."""
    from diffusers.models.transformers.transformer_wan import _get_qkv_projections

    weight = (attention.to_kv if attention.is_cross_attention else attention.to_qkv).weight
    tokens = torch.zeros(1, 4, weight.shape[1], dtype=weight.dtype, device=weight.device)
    with joining.counted_products() as products:
        _get_qkv_projections(attention, tokens, tokens if name == "attn2" else None)
    return products.count
