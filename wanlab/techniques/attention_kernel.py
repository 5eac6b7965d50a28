"""Attention kernel: self-attention by a chosen kernel, or by the fastest that is exact here."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, ClassVar, Literal

import msgspec

from wanlab.core.errors import WanlabError
from wanlab.core.lazy import LazyModule
from wanlab.core.words import listed
from wanlab.models.spec import ModelSpec, component_title
from wanlab.techniques.technique import Bound, Proof, Shares, Technique, Tier
from wanlab.techniques.wan import head_size, in_graphs, only_wan

if TYPE_CHECKING:
    import torch

    from wanlab.diagnose.attention import backends
    from wanlab.techniques.attention import choice as choice_module
    from wanlab.techniques.attention import kernels, sites
    from wanlab.techniques.attention.choice import Choice
    from wanlab.techniques.attention.sites import Site
    from wanlab.techniques.place import Place
else:  # a configuration is read without them
    torch = LazyModule("torch")
    backends = LazyModule("wanlab.diagnose.attention.backends")
    choice_module = LazyModule("wanlab.techniques.attention.choice")
    kernels = LazyModule("wanlab.techniques.attention.kernels")
    sites = LazyModule("wanlab.techniques.attention.sites")

KernelName = Literal[
    "auto",
    "sdpa-math",
    "sdpa-flash",
    "sdpa-efficient",
    "sdpa-cudnn",
    "flash-attention-3",
    "flash-attention-4",
    "flex",
    "sage",
]

PROFILED_TOKENS = 4096
"""Tokens of the call in which a proof looks for the name of the kernel."""


class KernelSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which kernel.

    Attributes:
        kernel: `"auto"` times those that run here on the model's own queries, keys and values, and takes the fastest whose
            error against float64 is within the limit of the dtype. `"sage"` rounds to 8 bits, which makes it lossy.
    """

    kernel: KernelName = "auto"


class AttentionKernel(Technique[KernelSettings]):
    """Queries, keys and values go to the kernel as `[B, L, H, D]`, as the projections make them."""

    name = "attention_kernel"
    does = "computes self-attention by a chosen kernel, or by the fastest that is exact here"
    tier: ClassVar[Tier] = "numeric"
    order = 2
    order_reason = (
        "it changes the inside of the networks; what rounds or leaves out attention stands above it"
    )
    not_on = in_graphs("its graph has an attention of its own")
    Settings = KernelSettings

    def __init__(self, settings: KernelSettings | None = None) -> None:
        super().__init__(settings)
        self.layer: KernelLayer | None = None
        self.sites: dict[str, list[Site]] = {}
        if self.settings.kernel == "sage":
            self.tier = "lossy"  # type: ignore[misc]

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        if reason := only_wan(spec):
            return reason
        if self.settings.kernel == "auto":
            return ""

        reason = kernels.KERNELS[self.settings.kernel].lacks(device, head_size=head_size(spec))
        on_cpu = [name for name, kernel in kernels.KERNELS.items() if kernel.cpu]
        return f"{reason}; {listed(on_cpu)} run on a CPU" if reason and device.type == "cpu" else reason

    def bound(self, shares: Shares) -> Bound:
        share = 100 * shares.self_attention
        return Bound(
            shares.denoising * shares.self_attention,
            f"self-attention is {share:.2g} % of a forward by {shares.source}",
        )

    def apply(self, place: Place) -> None:
        kernel = self.settings.kernel
        if kernel != "auto" and (
            reason := kernels.KERNELS[kernel].lacks(
                place.model.device, place.model.dtype, head_size(place.model.spec)
            )
        ):
            raise WanlabError(f"{self.name} cannot run here: it needs {reason}")
        self.layer = KernelLayer(kernel)
        self.sites = sites.add_layer(place, self.layer)
        place.denoising.at_begin.append(self.layer.used.clear)

    def proof(self, place: Place) -> Proof:
        assert self.layer is not None
        if elsewhere := sites.went_elsewhere(place, self.sites):
            return Proof(False, f"{self.name} is not everywhere: {elsewhere}.")
        parts = []
        for component, (own, every) in sites.answers(self.sites, self.name).items():
            title = component_title(component)
            if own == 0:
                others = {
                    name for site in self.sites[component] for name in site.answered if name != self.name
                }
                taken = f"; {listed(sorted(others))} computed all {every}"
                return Proof(False, f"{self.name} computed no attention of the {title}{taken}.")
            by = [
                f"{kernel} {count}"
                for (name, kernel), count in sorted(self.layer.used.items())
                if name == component
            ]
            parts.append(f"{own} of {every} of the {title} ({', '.join(by)})")
        ran = {kernel: self.layer.kernel_name(kernel) for kernel in {name for _, name in self.layer.used}}
        for kernel, names in ran.items():
            if wrong := _another(kernel, names):
                return Proof(False, f"{self.name} asked for {kernel}, and {wrong} ran.")
        named = [f"{kernel} is {names} in a profile" for kernel, names in sorted(ran.items()) if names]
        sentence = "; ".join([f"{self.name} computed attentions: {listed(parts)}", *named, *self._errors()])
        return Proof(True, f"{sentence}.")

    def _errors(self) -> list[str]:
        return [
            f"{choice.kernel} is the fastest of {sum(not each.reason for each in choice.candidates)} that are exact here"
            f" (error {choice.error:.2g}, limit {choice.limit:g})"
            for choice in (self.layer.choices.values() if self.layer is not None else ())
        ]


def _another(kernel: str, names: str) -> str:
    """The backend of PyTorch that ran in place of the one that was asked for; `""` where the profile does not say."""
    expected = {
        "sdpa-math": "math",
        "sdpa-flash": "flash",
        "sdpa-efficient": "memory-efficient",
        "sdpa-cudnn": "cuDNN",
    }
    backend = names.partition(", ")[0]
    known = {*expected.values(), "fused"}
    return backend if kernel in expected and backend in known and backend != expected[kernel] else ""


class KernelLayer:
    """The kernels of one model.

    Attributes:
        used: (expert, kernel) -> calls of the last generation.
        choices: shape -> what `auto` chose.
    """

    name = AttentionKernel.name

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.used: Counter[tuple[str, str]] = Counter()
        self.choices: dict[tuple[int, ...], Choice] = {}
        self._seen: dict[str, torch.Tensor] = {}  # kernel -> some queries, for their shape, dtype and device

    def __call__(
        self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        kernel = self.kernel if self.kernel != "auto" else self._chosen(query, key, value).kernel
        output = kernels.KERNELS[kernel].run(query, key, value)
        self.used[site.component, kernel] += 1
        if kernel not in self._seen:
            self._seen[kernel] = query[:1, :PROFILED_TOKENS].detach().clone()
        return output

    def _chosen(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Choice:
        shape = tuple(query.shape)
        if shape not in self.choices:
            self.choices[shape] = choice_module.choose(query, key, value)
        return self.choices[shape]

    def kernel_name(self, kernel: str) -> str:
        """Backend and longest GPU kernel of a call, from a profile of it; `""` inside another profile."""
        query = self._seen[kernel]
        with torch.no_grad():
            return backends.kernel_of(lambda: kernels.KERNELS[kernel].run(query, query, query), query.device)
