"""DBCache of cache-dit: the first blocks of a denoiser tell whether the others are computed or answered from the last call."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

from wanlab.core.errors import WanlabError
from wanlab.core.words import listed
from wanlab.models.spec import EXPERTS, ModelSpec, component_title
from wanlab.techniques.technique import Bound, Proof, Shares, Technique

if TYPE_CHECKING:
    import torch

    from wanlab.techniques.denoising import Call, Inner
    from wanlab.techniques.place import Place

_GRAPH = "its graph computes all blocks"
_PARITY = "it tells the branches of guidance apart by counting the calls"
_DECIDES = "both decide what is computed in a step"


class DBSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When blocks are skipped, as in cache-dit's DBCacheConfig; each expert has a cache of its own.

    Attributes:
        threshold: relative change of what the first blocks add, mean |r - r'| / mean |r'| since the last computed call, below
            which the other blocks are skipped; 0.08 to 0.24 in publications.
        first_blocks, last_blocks: blocks at the start and at the end that are always computed.
        first_percent: percent of the steps of each expert, from its first, that are computed; its first step always is.
        in_a_row: calls of a branch that are skipped in a row at most.
    """

    threshold: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.08
    first_blocks: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    last_blocks: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    first_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 20.0
    in_a_row: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3


class DBCache(Technique[DBSettings]):
    """DBCache of https://github.com/vipshop/cache-dit, without its hook on the pipeline, which it puts into the class and so
    into every model of the process. Its caches are made anew when an expert takes over.
    """

    name = "db_cache"
    does = "computes the first blocks, and the others only where the first change enough"
    tier = "lossy"
    order = 1
    order_reason = "it changes the inside of the networks, before anything stands around their calls"
    not_with: ClassVar[Mapping[str, str]] = {
        "batched_guidance": _PARITY,
        "guidance_gate": _PARITY,
        "guidance_interval": _PARITY,
        "easy_cache": _DECIDES,
        "mag_cache": _DECIDES,
    }
    not_on: ClassVar[Mapping[str, str]] = {
        "onnxruntime": _GRAPH,
        "tensorrt": _GRAPH,
        "tvm": _GRAPH,
        "compiled": "compiling copies a network, and the hooks of cache-dit stay with the one that was copied",
    }
    Settings = DBSettings

    def __init__(self, settings: DBSettings | None = None) -> None:
        super().__init__(settings)
        self.rule: BlockRule | None = None

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        if importlib.util.find_spec("cache_dit") is None:
            return "the package cache-dit: pip install 'wanlab[cache]'"
        always = self.settings.first_blocks + self.settings.last_blocks
        for name in (name for name in spec.components if name in EXPERTS):
            part = spec.part(spec.part_of(name))
            if part.class_name != "WanTransformer3DModel":
                return f"a WanTransformer3DModel; {spec.name} has {part.class_name}"
            if (blocks := part.config.get("num_layers", 0)) <= always:
                return f"fewer blocks that are always computed than {always}: a denoiser of {spec.name} has {blocks}"
        return ""

    def bound(self, shares: Shares) -> Bound:
        computed = max(math.ceil(self.settings.first_percent / 100 * shares.steps), 1)
        longest = self.settings.in_a_row
        saved = shares.denoising * (1 - computed / shares.steps) * longest / (longest + 1)
        return Bound(
            saved,
            f"of the steps after the first {computed} one in {longest + 1} is computed, if few blocks always are",
        )

    def apply(self, place: Place) -> None:
        networks = {name: place.network(name) for name in place.model.components if name in EXPERTS}
        self.rule = BlockRule(self.settings, place, networks)
        place.add(self.rule)

    def proof(self, place: Place) -> Proof:
        assert self.rule is not None
        rule, total, parts = self.rule, 0, []
        rule.collect()
        for component in rule.networks:
            own = [each for each in rule.answers if each.component == component]
            if not own:
                continue
            expert, skipped = component_title(component), sum(each.skipped for each in own)
            if (told := len(rule.told[component])) != skipped:
                return Proof(
                    False,
                    f"{self.name}: cache-dit tells of {told} skipped calls of the {expert}, whose blocks were left out in"
                    f" {skipped}.",
                )
            if any(each.skipped and each.first for each in own):
                return Proof(
                    False,
                    f"{self.name} answered the first call of the {expert} with what another expert had predicted.",
                )
            may = max((each.step for each in own), default=0) - min(
                each.step for each in own
            ) >= rule.warm_up(component)
            if not skipped and may:
                return Proof(
                    False,
                    f"{self.name} skipped nothing in {len(own)} calls of the {expert}: {self._why(component)}.",
                )
            total += skipped
            parts.append(f"{skipped} of {len(own)} calls of the {expert}")
        if not total:
            return Proof(False, f"{self.name} skipped nothing: the steps are too few.")
        blocks = listed(
            [f"{count} blocks" for count in sorted({rule.skippable(name) for name in rule.networks})]
        )
        return Proof(
            True,
            f"{self.name} left out {blocks} in {listed(parts)}, by the blocks that ran and by cache-dit.",
        )

    def _why(self, component: str) -> str:
        assert self.rule is not None
        changes = self.rule.changes[component]
        seen = f"the smallest change was {min(changes):.3g}" if changes else "no change was measured"
        return f"{seen}, the threshold is {self.settings.threshold:g}"


class Answer(msgspec.Struct, frozen=True):
    """How one call was answered.

    Attributes:
        skipped: whether its middle blocks did not run. first: whether the expert had just taken over.
    """

    step: int
    component: str
    branch: str
    first: bool
    skipped: bool


class BlockRule:
    """Makes the caches of cache-dit anew where an expert takes over, and counts the blocks that run.

    Attributes:
        answers: of every call of the last generation.
        told: component -> its skipped calls by the summary of cache-dit. changes: component -> measured changes.
    """

    name = DBCache.name

    def __init__(self, settings: DBSettings, place: Place, networks: dict[str, torch.nn.Module]) -> None:
        self.settings, self.place, self.networks = settings, place, networks
        self._ran = dict.fromkeys(networks, 0)
        for component, network in networks.items():
            middle = network.blocks[settings.first_blocks]  # type: ignore[index]
            middle.register_forward_pre_hook(self._counter(component))
        _hook(networks, {name: self._config(name, guided=True, warm_up=1) for name in networks})
        self.begin()

    def _counter(self, component: str) -> Any:
        def count(*_: Any) -> None:
            self._ran[component] += 1

        return count

    def begin(self) -> None:
        self.answers: list[Answer] = []
        self.told: dict[str, list[tuple[str, int]]] = {name: [] for name in self.networks}
        self.changes: dict[str, list[float]] = {name: [] for name in self.networks}
        self._open: set[str] = set()  # experts whose cache has something to tell
        self._schedule: dict[str, int] | None = None

    def __call__(self, call: Call, inner: Inner) -> torch.Tensor:
        if call.first and call.branch != "uncond":
            self._anew(call.component)
        before = self._ran[call.component]
        prediction = inner(call)
        skipped = self._ran[call.component] == before
        self.answers.append(Answer(call.step, call.component, call.branch, call.first, skipped))
        return prediction

    def skippable(self, component: str) -> int:
        """Blocks of an expert that a skipped call leaves out."""
        always = self.settings.first_blocks + self.settings.last_blocks
        return len(self.networks[component].blocks) - always  # type: ignore[arg-type]

    def warm_up(self, component: str) -> int:
        """Steps of an expert that are always computed."""
        if self._schedule is None:
            model = self.place.model
            asked = getattr(model.pipeline.scheduler, "wanlab_asked", None) or self.place.denoising.steps
            self._schedule = model.schedule(asked)["component"].value_counts().to_dict()
        return max(1, math.ceil(self.settings.first_percent / 100 * self._schedule.get(component, 0)))

    def collect(self) -> None:
        """Read what cache-dit tells of the caches since they were made."""
        for component in sorted(self._open):
            stats = _cache_dit().summary(self.networks[component], logging=False)[0]
            self.told[component] += [("cond", step) for step in stats.cached_steps]
            self.told[component] += [("uncond", step) for step in stats.cfg_cached_steps]
            for found in (stats.residual_diffs, stats.cfg_residual_diffs):
                self.changes[component] += [float(change) for change in found.values()]
        self._open = set()

    def _anew(self, component: str) -> None:
        if component in self._open:
            self.collect()
        guided = bool(self.place.model.pipeline.do_classifier_free_guidance)
        config = self._config(component, guided, self.warm_up(component))
        _cache_dit().refresh_context(self.networks[component], cache_config=config)
        self._open.add(component)

    def _config(self, component: str, guided: bool, warm_up: int) -> Any:
        """The whole of an expert's settings: cache-dit takes its own defaults for what is left out."""
        chosen = self.settings
        return _cache_dit().DBCacheConfig(
            Fn_compute_blocks=chosen.first_blocks,
            Bn_compute_blocks=chosen.last_blocks,
            residual_diff_threshold=chosen.threshold,
            max_warmup_steps=warm_up,
            max_cached_steps=-1,
            max_continuous_cached_steps=chosen.in_a_row,
            enable_separate_cfg=guided,
        )


def _hook(networks: Mapping[str, torch.nn.Module], configs: Mapping[str, Any]) -> None:
    """Put the hooks of cache-dit into networks.

    Raises:
        WanlabError: cache-dit does not know their blocks.
    """
    cache_dit = _cache_dit()
    adapter = cache_dit.BlockAdapter(
        transformer=list(networks.values()),
        blocks=[network.blocks for network in networks.values()],
        forward_pattern=[cache_dit.ForwardPattern.Pattern_2] * len(networks),
        params_modifiers=[cache_dit.ParamsModifier(cache_config=configs[name]) for name in networks],
        has_separate_cfg=True,
    )
    try:
        cache_dit.enable_cache(adapter, cache_config=next(iter(configs.values())))
    except (AssertionError, ValueError) as error:
        raise WanlabError(
            f"db_cache: cache-dit does not take the blocks of this denoiser: {error}"
        ) from error


def _cache_dit() -> Any:
    """The package, which says nothing below an error unless its own variable asks for it."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    import cache_dit  # an optional package

    return cache_dit
