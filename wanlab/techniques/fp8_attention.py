"""FP8 attention: products of self-attention in 8 bits, where rules say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from wanlab.core.errors import WanlabError
from wanlab.core.lazy import LazyModule
from wanlab.core.words import listed
from wanlab.models.spec import ModelSpec, component_title
from wanlab.precision.plan import KEEP, Rule, make_plan
from wanlab.techniques.technique import Bound, Proof, Shares, Technique
from wanlab.techniques.wan import head_size, in_graphs, only_wan

if TYPE_CHECKING:
    import pandas as pd
    import torch
    import torch.nn.functional as F

    from wanlab.models.pipeline import Model
    from wanlab.techniques import place as place_module
    from wanlab.techniques.attention import errors, fp8, kernels, sites
    from wanlab.techniques.attention.sites import Site
    from wanlab.techniques.place import Place
else:  # a configuration is read without them
    pd = LazyModule("pandas")
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")
    errors = LazyModule("wanlab.techniques.attention.errors")
    fp8 = LazyModule("wanlab.techniques.attention.fp8")
    kernels = LazyModule("wanlab.techniques.attention.kernels")
    sites = LazyModule("wanlab.techniques.attention.sites")
    place_module = LazyModule("wanlab.techniques.place")

FORMAT = "fp8"


class Fp8Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where and how.

    Attributes:
        rules: rules as in a precision plan, of which the last that fits counts: format (`fp8`, or `default` to leave it),
            component, blocks, steps. Without any it is everywhere.
        rotate: whether queries and keys are rotated by a Hadamard matrix, which helps where a few channels are large.
        kernel: `"auto"` is FlashAttention-3 where it runs, and else a simulation, which is slower than no technique at all
            and has the same quality.
    """

    rules: tuple[Rule, ...] = ()
    rotate: bool = False
    kernel: Literal["auto", "flash-attention-3", "simulated"] = "auto"

    def __post_init__(self) -> None:
        for number, rule in enumerate(self.rules, 1):
            if rule.format not in (FORMAT, KEEP):
                raise ValueError(f"rule {number} has format {rule.format!r}; give {FORMAT} or {KEEP}")
            if rule.layers != ("*",):
                raise ValueError(
                    f"rule {number} names layers; self-attention is the only one here, so leave layers out"
                )
        try:
            make_plan("rules", rules=self.rules, num_steps=10_000)
        except WanlabError as error:
            raise ValueError(str(error).removeprefix("plan rules, ")) from None


@cache
def wanted(rules: tuple[Rule, ...], component: str, block: int, blocks: int, step: int) -> bool:
    """Whether the self-attention of a block is in FP8 at a step: the last rule that fits says."""
    answer = not rules
    for rule in rules:
        numbers, steps = rule.block_numbers(blocks), rule.step_numbers()
        fits = fnmatchcase(component, rule.component)
        fits &= numbers is None or block in numbers
        fits &= steps is None or step in steps
        answer = rule.format == FORMAT if fits else answer
    return answer


class Fp8Attention(Technique[Fp8Settings]):
    """Queries, keys and values become codes with a scale for each head; the means of keys and values are taken off before.
    FlashAttention-3 multiplies them on Hopper."""

    name = "fp8_attention"
    does = "multiplies queries, keys and values of self-attention in 8 bits, with the means of keys and values off"
    tier = "lossy"
    order = 3
    order_reason = "it takes attention from the kernel below it, by its rules"
    not_on = in_graphs("its graph has an attention of its own")
    Settings = Fp8Settings

    def __init__(self, settings: Fp8Settings | None = None) -> None:
        super().__init__(settings)
        self.layer: Fp8Layer | None = None
        self.sites: dict[str, list[Site]] = {}

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        if (reason := only_wan(spec)) or self.settings.kernel != "flash-attention-3":
            return reason
        return fp8.lacks_kernel(device, head_size(spec))

    def simulated(self, spec: ModelSpec, device: torch.device) -> str:
        if self.settings.kernel == "simulated":
            return "the setting kernel: auto"
        return "" if only_wan(spec) else fp8.lacks_kernel(device, head_size(spec))

    def bound(self, shares: Shares) -> Bound:
        share = 100 * shares.self_attention
        return Bound(
            shares.denoising * shares.self_attention / 2,
            f"self-attention is {share:.2g} % of a forward by {shares.source}, and GPUs multiply 8 bits twice as fast as 16",
        )

    def apply(self, place: Place) -> None:
        kernel = self.settings.kernel
        if kernel == "auto":
            kernel = fp8.kernel_here(place.model.device, head_size(place.model.spec))  # type: ignore[assignment]
        self.layer = Fp8Layer(self.settings, kernel)
        self.sites = sites.add_layer(place, self.layer)
        place.denoising.at_begin.append(self.layer.used.clear)

    def proof(self, place: Place) -> Proof:
        layer = self.layer
        assert layer is not None
        if elsewhere := sites.went_elsewhere(place, self.sites):
            return Proof(False, f"{self.name} is not everywhere: {elsewhere}.")
        parts, total = [], 0
        for component, (own, every) in sites.answers(self.sites, self.name).items():
            title = component_title(component)
            in_codes = layer.used[component]
            if in_codes < own:
                return Proof(
                    False,
                    f"{self.name} fell back: {own - in_codes} of {own} attentions of the {title} multiplied no 8-bit codes.",
                )
            error = layer.errors.get(component)
            if own and error is not None and error.same:
                return Proof(
                    False,
                    f"{self.name} fell back: attention of the {title} is bit for bit that of the model's dtype, which 8 bits"
                    " cannot be.",
                )
            if missed := sites.left_out(place, self.sites[component], self.name, self._wanted):
                return Proof(
                    False, f"{self.name} left out {missed} attentions of the {title} that its rules name."
                )
            exact = ""
            if error is not None:
                exact = f", error {error.fp8:.2g} against float64, {error.own:.2g} in the model's dtype"
            parts.append(f"{own} of {every} of the {title}{exact}")
            total += own
        if total == 0:
            return Proof(
                False, f"{self.name} computed no attention: no rule fits a block and a step that ran."
            )
        how = (
            "simulated in PyTorch, so that nothing is faster: this machine has no FP8 attention"
            if layer.kernel == "simulated"
            else f"by {layer.kernel} on {layer.dtypes()}"
        )
        return Proof(True, f"{self.name} computed attentions in 8 bits, {how}: {listed(parts)}.")

    def _wanted(self, site: Site, step: int) -> bool:
        return wanted(self.settings.rules, site.component, site.block, site.blocks, step)


class Errors(NamedTuple):
    """The first attention in FP8 of an expert, on sampled queries.

    Attributes:
        fp8, own: error against float64, and that of PyTorch's attention in the model's dtype.
        same: whether the two are the same bit for bit.
    """

    fp8: float
    own: float
    same: bool


class Fp8Layer:
    """FP8 attention of one model.

    Attributes:
        kernel: see `attention.fp8.KERNELS_FP8`.
        used: expert -> calls of the last generation whose kernel was given codes of 8 bits.
        errors: expert -> how exact its first call in FP8 was.
    """

    name = Fp8Attention.name

    def __init__(self, settings: Fp8Settings, kernel: str) -> None:
        self.settings, self.kernel = settings, kernel
        self.errors: dict[str, Errors] = {}
        self._kinds: set[str] = set()
        self.used: Counter[str] = Counter()

    def dtypes(self) -> str:
        """Names of what the kernels multiplied."""
        return listed(sorted(self._kinds))

    def __call__(
        self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor | None:
        rules = self.settings.rules
        if not wanted(rules, site.component, site.block, site.blocks, site.denoising.step):
            return None

        def told(kernel: str, dtype: torch.dtype) -> None:
            self._kinds.add(str(dtype).removeprefix("torch."))
            self.used[site.component] += dtype == fp8.CODES

        output = fp8.fp8_attention(query, key, value, self.kernel, self.settings.rotate, told)
        if site.component not in self.errors:
            self.errors[site.component] = self._errors(output, query, key, value)
        return output

    @staticmethod
    def _errors(output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Errors:
        picked = errors.sampled_queries(query.shape[1])
        exact = errors.exact_attention(query, key, value, picked)
        tensors: Mapping[str, Any] = {"query": query, "key": key, "value": value, "reference": exact}
        own = kernels.heads_first(F.scaled_dot_product_attention)(query, key, value)
        here = picked.to(query.device)
        return Errors(
            errors.attention_error(lambda *_: output, **tensors),
            errors.attention_error(lambda *_: own, **tensors),
            torch.equal(output[:, here], own[:, here]),
        )


class _Measuring:
    """Stands above all kernels, computes nothing, and measures the errors of what passes."""

    name = "attention_errors"

    def __init__(self, rules: tuple[Rule, ...], options: Mapping[str, Any]) -> None:
        self.rules, self.options = rules, options
        self.frames: list[pd.DataFrame] = []

    def __call__(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        step = site.denoising.step
        if wanted(self.rules, site.component, site.block, site.blocks, step):
            frame = fp8.fp8_errors(query, key, value, **self.options)
            frame.insert(0, "component", site.component)
            frame.insert(1, "block", site.block)
            frame.insert(2, "step", step)
            self.frames.append(frame)


def attention_errors(
    model: Model,
    request: Mapping[str, Any],
    *,
    blocks: str | None = None,
    steps: str | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Error of attention in FP8 on a model's own queries, keys and values in one generation, beside bfloat16's.

    Args:
        model: eager model. request: arguments of `Model.generate`.
        blocks, steps: as in rules of a precision plan; None is all of them.
        options: kernel, queries and variants of `attention.fp8.fp8_errors`.

    Returns:
        DataFrame: component, block, step, variant, kernel, error, times_bf16; a step with guidance has a row for each
        branch.
    """
    measuring = _Measuring((Rule(format=FORMAT, blocks=blocks, steps=steps),), options)
    place = place_module.Place(model)
    sites.add_layer(place, measuring)
    place.finish(place.model).generate(**request)
    return pd.concat(measuring.frames, ignore_index=True)
