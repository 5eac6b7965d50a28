"""Channels-last VAE: convolutions of the VAE with channels in the last place of memory, the decoder compiled if asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import msgspec

from wanlab.core.lazy import LazyModule
from wanlab.core.words import size_text
from wanlab.models.spec import ModelSpec
from wanlab.techniques.technique import Bound, Proof, Shares, Technique
from wanlab.techniques.wan import in_graphs

if TYPE_CHECKING:
    import torch

    from wanlab.models import variants
    from wanlab.techniques import layouts
    from wanlab.techniques.layouts import Watched
    from wanlab.techniques.place import Place
else:  # a configuration is read without them
    torch = LazyModule("torch")
    variants = LazyModule("wanlab.models.variants")
    layouts = LazyModule("wanlab.techniques.layouts")

HALVES = ("encoder", "decoder")


class VaeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What else is done to the decoder.

    Attributes:
        compiled: whether it is compiled too, which takes about a minute at its first call and once for every size.
    """

    compiled: bool = False


class VaeChannelsLast(Technique[VaeSettings]):
    """Convolutions of tensor cores read the channels of a point together. With the weights in that layout cuDNN gives its
    outputs in it too, so nothing is turned around between convolutions. The weights of the VAE are copied for it, once."""

    name = "vae_channels_last"
    does = "keeps the channels of the VAE's convolutions last in memory, and compiles its decoder if asked"
    tier = "numeric"
    order = 6
    order_reason = "it changes the VAE alone, so it may come at any time before the calls are stood around"
    touches = ("vae_encoder", "vae_decoder")
    not_on: ClassVar[Mapping[str, str]] = {
        **in_graphs("its graph holds the weights in its own layout"),
        "streamed_vae": "its graph holds the weights in its own layout",
        "compiled": "the layout is part of its graph; the setting `compiled` compiles the decoder here",
    }
    Settings = VaeSettings

    def __init__(self, settings: VaeSettings | None = None) -> None:
        super().__init__(settings)
        self.halves: dict[str, Watched] = {}
        self.copied_bytes = 0

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        if "vae_decoder" not in spec.components:
            return f"a VAE that decodes videos; {spec.name} has none"
        part = spec.part(spec.part_of("vae_decoder"))
        return "" if "KL" in part.class_name else f"a VAE of convolutions; {spec.name} has {part.class_name}"

    def bound(self, shares: Shares) -> Bound:
        rest, decoding = 1 - shares.denoising, 100 * shares.decoding
        return Bound(
            rest,
            f"all but denoising is {100 * rest:.2g} % of a video by {shares.source}, decoding alone {decoding:.2g} %",
        )

    def apply(self, place: Place) -> None:
        vae = place.network("vae_decoder")
        self.copied_bytes = layouts.to_channels_last(vae)
        for half in HALVES:
            inner, compiled = getattr(vae, half), self.settings.compiled and half == "decoder"
            if compiled:
                torch._dynamo.config.recompile_limit = max(
                    torch._dynamo.config.recompile_limit, variants.RECOMPILE_LIMIT
                )
            self.halves[half] = layouts.Watched(inner, compiled)
            setattr(vae, half, self.halves[half])
            place.denoising.at_begin.append(self.halves[half].forget)

    def proof(self, place: Place) -> Proof:
        decoder = self.halves["decoder"]
        if decoder.calls == 0:
            return Proof(
                False,
                f"{self.name} decoded nothing: the last generation gave latents, or another VAE decoded.",
            )
        for half, watched in self.halves.items():
            first = sum(layouts.layout(module.weight) == "first" for module in layouts.convolutions(watched))
            if first:
                return Proof(
                    False, f"{self.name}: {first} weights of the {half} have their channels first again."
                )
            if watched.seen["first"]:
                every = sum(watched.seen.values())
                return Proof(
                    False,
                    f"{self.name}: {watched.seen['first']} of {every} convolutions of the {half} ran with weights whose"
                    " channels come first: they are copied back in every call.",
                )
        if decoder.compiled:
            if decoder.eager:
                calls = f"{decoder.eager} of {decoder.calls} calls"
                return Proof(False, f"{self.name} ran {calls} of the decoder without the compiler.")
            how = (
                f"{decoder.calls} calls of the decoder ran compiled, and its weights have their channels last"
            )
        elif decoder.seen["last"] == 0:
            return Proof(
                False,
                f"{self.name} has no effect: no convolution of the decoder tells the two layouts apart.",
            )
        else:
            every = decoder.seen["last"] + decoder.seen["both"]
            how = (
                f"{decoder.seen['last']} of {every} convolutions in the watched calls of the decoder ran with channels last,"
                " the others have kernels of one point"
            )
        return Proof(True, f"{self.name}: {how}; its own weights take {size_text(self.copied_bytes)}.")
