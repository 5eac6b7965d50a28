"""Text keys: keys and values of the text are computed once for each branch, not in every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from wanlab.core.lazy import LazyModule
from wanlab.core.words import listed
from wanlab.models.spec import EXPERTS, ModelSpec, component_title
from wanlab.techniques.technique import Bound, NoSettings, Proof, Shares, Technique

if TYPE_CHECKING:
    import torch

    from wanlab.models import blocks
    from wanlab.techniques import remembering
    from wanlab.techniques.place import Place
    from wanlab.techniques.remembering import Remembering
else:  # a configuration is read without them
    blocks = LazyModule("wanlab.models.blocks")
    remembering = LazyModule("wanlab.techniques.remembering")

_GRAPH = "its graph computes them from the text"


class TextKeys(Technique[NoSettings]):
    """The text is the same in every step, and so are its embedding in the denoiser and the keys and values of
    cross-attention. They are kept for both branches of guidance until another generation begins."""

    name = "text_keys"
    does = "keeps the keys and values of the text over the steps"
    tier = "exact"
    order = 0
    order_reason = "it changes the inside of the networks, before anything stands around their calls"
    not_on: ClassVar[Mapping[str, str]] = {
        "onnxruntime": _GRAPH,
        "tensorrt": _GRAPH,
        "tvm": _GRAPH,
        "compiled": "its memory would break the compiler's graphs of the blocks",
    }

    def __init__(self, settings: NoSettings | None = None) -> None:
        super().__init__(settings)
        self.memories: dict[str, list[Remembering]] = {}

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        for name in (name for name in spec.components if name in EXPERTS):
            part = spec.part(spec.part_of(name))
            if part.class_name != "WanTransformer3DModel":
                return f"a WanTransformer3DModel, whose text has keys of its own; {spec.name} has {part.class_name}"
            if part.config.get("image_dim") is not None:
                return f"a denoiser without a picture encoder; {spec.name} joins picture and text anew in every step"
        return ""

    def bound(self, shares: Shares) -> Bound:
        saved = shares.denoising * shares.text_keys * (1 - 1 / shares.steps)
        return Bound(saved, f"they are {100 * shares.text_keys:.2g} % of a forward by {shares.source}")

    def apply(self, place: Place) -> None:
        for component in (name for name in place.model.components if name in EXPERTS):
            network = place.network(component)
            owners = [(network.condition_embedder, "text_embedder")]
            owners += [
                (block.module.attn2, name)
                for block in blocks.blocks_of(network)
                for name in ("to_k", "to_v", "norm_k")
            ]
            self.memories[component] = [remembering.remember(owner, name) for owner, name in owners]
        place.denoising.at_begin.append(self.forget)

    def forget(self) -> None:
        """Drop what is kept, and the counts."""
        for memory in (memory for memories in self.memories.values() for memory in memories):
            memory.forget()

    def proof(self, place: Place) -> Proof:
        parts, kept, asked = [], 0, 0
        for component, memories in self.memories.items():
            calls, hits = (sum(getattr(memory, name) for memory in memories) for name in ("calls", "hits"))
            expert = component_title(component)
            if memories[0].calls > len(memories[0].seen) and hits == 0:
                return Proof(
                    False, f"{self.name} computed keys and values of the {expert} anew in every step."
                )
            parts.append(f"{hits} of {calls} of the {expert}")
            kept, asked = kept + hits, asked + calls
        if kept == 0:
            return Proof(False, f"{self.name} kept nothing: no expert computes a second step.")
        return Proof(
            True, f"{self.name} took {kept} of {asked} projections of the text from memory ({listed(parts)})."
        )
