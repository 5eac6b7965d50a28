"""DBCache of cache-dit: the first blocks of a denoiser tell whether the others are computed or answered from memory."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

from wanlab.core.errors import WanlabError
from wanlab.core.words import counted, listed
from wanlab.models.schedulers import named_as
from wanlab.models.spec import EXPERTS, ModelSpec, component_title
from wanlab.techniques.easy_cache import Decision
from wanlab.techniques.technique import Bound, Proof, Shares, Technique
from wanlab.techniques.wan import in_graphs, only_wan

if TYPE_CHECKING:
    import torch

    from wanlab.techniques.denoising import Call, Inner
    from wanlab.techniques.place import Place

PACKAGE = "cache_dit"
_DECIDES = "both decide which steps are computed"


class DBCacheSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When blocks are skipped; the names in cache-dit's DBCacheConfig are others.

    Attributes:
        threshold: relative change of what the first blocks add, mean |r - r'| / mean |r'| with r' that of the last computed
            call, below which the other blocks are skipped; 0.08 to 0.24 in publications.
        first_blocks, last_blocks: blocks at the start and at the end that are always computed.
        first_percent: percent of the steps of each expert, from its first, that are computed; its first step always is.
        in_a_row: calls of a branch of guidance that are skipped in a row at most.
    """

    threshold: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.08
    first_blocks: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    last_blocks: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    first_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 20.0
    in_a_row: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3


class DBCache(Technique[DBCacheSettings]):
    """DBCache of https://github.com/vipshop/cache-dit, put around the blocks of each denoiser.

    cache-dit's own hook on a pipeline is not used: it replaces a method of diffusers' class, and so of every model of the
    process, and it begins a cache anew for a video, not for an expert that takes over.
    """

    name = "db_cache"
    does = "computes the first blocks, and the others only where what the first ones add has changed enough"
    tier = "lossy"
    order = 9
    order_reason = "it stands around the blocks, whatever was changed inside of them, and inside of the calls"
    not_with: ClassVar[Mapping[str, str]] = {"easy_cache": _DECIDES, "mag_cache": _DECIDES}
    not_on: ClassVar[Mapping[str, str]] = in_graphs("its graph computes all blocks")
    Settings = DBCacheSettings

    def __init__(self, settings: DBCacheSettings | None = None) -> None:
        super().__init__(settings)
        self.rule: BlockRule | None = None

    def lacks(self, spec: ModelSpec, device: torch.device) -> str:
        if importlib.util.find_spec(PACKAGE) is None:
            return "the package cache-dit: pip install 'wanlab[cache]'"
        if reason := only_wan(spec):
            return reason
        always = self.settings.first_blocks + self.settings.last_blocks
        for name in (name for name in spec.components if name in EXPERTS):
            blocks = spec.part(spec.part_of(name)).config.get("num_layers", 0)
            if blocks <= always:
                return (
                    f"first_blocks and last_blocks of fewer than {blocks} together, the blocks of a denoiser of {spec.name},"
                    f" and they are {always}"
                )
        return ""

    def bound(self, shares: Shares) -> Bound:
        first, longest = self.settings.first_percent / 100, self.settings.in_a_row
        saved = shares.denoising * (1 - first) * longest / (longest + 1)
        return Bound(
            saved,
            f"of the steps after the first {self.settings.first_percent:g} % one in {longest + 1} is computed, and"
            " of the others the blocks that always are",
        )

    def apply(self, place: Place) -> None:
        for component in (name for name in place.model.components if name in EXPERTS):
            place.network(component)  # of its own, for the hooks
        self.rule = BlockRule(self.settings, place)
        place.add(self.rule)

    def proof(self, place: Place) -> Proof:
        assert self.rule is not None
        rule, total, parts = self.rule, 0, []
        rule.collect()
        if early := [answer.component for answer in rule.answers if answer.skipped and answer.first]:
            expert = component_title(early[0])
            return Proof(
                False, f"{self.name} answered the first call of the {expert} from before it took over."
            )
        for component in dict.fromkeys(answer.component for answer in rule.answers):
            own = [answer for answer in rule.answers if answer.component == component]
            expert, skipped = component_title(component), sum(answer.skipped for answer in own)
            told = {(each.step, each.branch) for each in rule.told if each.component == component}
            if told != {(each.step, each.role) for each in own if each.skipped}:
                return Proof(
                    False,
                    f"{self.name}: cache-dit tells of {len(told)} skipped calls of the {expert}, and blocks did not run in"
                    f" {skipped} of {len(own)}, which are not the same.",
                )
            if not skipped and any(answer.free for answer in own):
                return Proof(
                    False,
                    f"{self.name} skipped nothing in {len(own)} calls of the {expert}: {self._why(component)}.",
                )
            total += skipped
            parts.append(f"{skipped} of {len(own)} calls of the {expert}")
        calls = place.calls
        left_out = calls["left_out"].map(len) > 0
        if not total:
            return Proof(
                False,
                f"{self.name} skipped nothing: every step is among the first of an expert, or none ran.",
            )
        blocks = sorted({counted(len(middle), "block") for middle in calls.loc[left_out, "left_out"]})
        return Proof(
            True,
            f"{self.name} left out {listed(blocks)} in {listed(parts)}, by the blocks that ran and by cache-dit.",
        )

    def _why(self, component: str) -> str:
        changes = [each.change for each in self.decisions if each.component == component]
        seen = f"the smallest change was {min(changes):.3g}" if changes else "no change was measured"
        return f"{seen}, the threshold is {self.settings.threshold:g}"

    @property
    def decisions(self) -> list[Decision]:
        """What was decided in the last generation, of the branch with text; each change is that since the last computed
        call, so it is its own sum."""
        if self.rule is None:
            return []
        self.rule.collect()
        return self.rule.decisions


class Answer(msgspec.Struct, frozen=True):
    """How one call was answered.

    Attributes:
        first: whether the expert had just taken over. free: whether it is past the steps that are always computed.
        skipped: whether its middle blocks did not run.
    """

    step: int
    component: str
    branch: str
    first: bool
    free: bool
    skipped: bool

    @property
    def role(self) -> str:
        """What cache-dit takes the branch for."""
        return "uncond" if self.branch == "uncond" else "cond"


class Told(msgspec.Struct, frozen=True):
    """A skipped call, as cache-dit tells it."""

    step: int
    component: str
    branch: str


class BlockRule:
    """Makes the caches of cache-dit anew where an expert takes over, and counts the blocks that run.

    cache-dit tells the branches of guidance apart by counting calls in pairs. So a cache also begins anew where a step needs
    one branch and the last one needed both (a guidance gate), or where the size changes: of the latents, or of the batch.

    Attributes:
        answers: of every call of the last generation. told: its skipped calls, as cache-dit tells them.
        decisions: of the branch with text, where cache-dit measured a change.
    """

    name = DBCache.name

    def __init__(self, settings: DBCacheSettings, place: Place) -> None:
        self.settings, self.place = settings, place
        self._blocks: dict[str, tuple[range, int]] = {}  # those that a skipped call leaves out, of how many
        self._networks: dict[str, torch.nn.Module] = {}
        self._ran: dict[str, int] = {}
        self.begin()

    def begin(self) -> None:
        self.answers: list[Answer] = []
        self.told: list[Told] = []
        self.decisions: list[Decision] = []
        self._schedule: dict[str, int] | None = None
        self._taken_over: dict[str, int] = {}  # expert -> its first step
        self._kind: tuple[Any, ...] | None = None  # of the calls that the open cache is for
        self._open: str | None = None  # expert whose cache is in use
        self._steps: list[int] = []  # those of the open cache, which cache-dit numbers from 0
        self._computed = 0  # first ones of them that are computed

    def __call__(self, call: Call, inner: Inner) -> torch.Tensor:
        if not self._networks:
            self._hook()
        if call.branch != "uncond":
            self._lead(call)
        before = self._ran[call.component]
        prediction = inner(call)
        skipped = self._ran[call.component] == before
        if skipped:
            self.place.denoising.leave_out(*self._blocks[call.component])
        free = len(self._steps) > self._computed
        self.answers.append(Answer(call.step, call.component, call.branch, call.first, free, skipped))
        return prediction

    def collect(self) -> None:
        """Read what cache-dit tells of the cache in use."""
        if self._open is None:
            return
        component, self._open = self._open, None
        steps = dict(enumerate(self._steps))
        stats = _cache_dit().summary(self._networks[component], logging=False)[0]
        for branch, numbers in (("cond", stats.cached_steps), ("uncond", stats.cfg_cached_steps)):
            self.told += [Told(steps.get(number, -1), component, branch) for number in numbers]
        for number, change in stats.residual_diffs.items():
            step, skipped = steps.get(int(number), -1), int(number) in stats.cached_steps
            self.decisions.append(Decision(step, component, float(change), float(change), skipped))

    def _lead(self, call: Call) -> None:
        """Before the branch with text: a new cache where the one in use is not for this call."""
        guided = bool(self.place.model.pipeline.do_classifier_free_guidance)
        pairs = guided and call.branch == "cond" and not call.alone
        kind = (call.component, pairs, tuple(call.latents.shape))
        if call.first:
            self._taken_over[call.component] = call.step
        if call.first or kind != self._kind:
            done = call.step - self._taken_over.get(call.component, call.step)
            self._anew(call.component, pairs, max(1, self._always(call.component) - done))
            self._kind = kind
        self._steps.append(call.step)

    def _anew(self, component: str, pairs: bool, computed: int) -> None:
        self.collect()
        if self._kind is not None and self._kind[0] != component:
            self._forget(self._kind[0])
        self._begin_cache(component, pairs, computed)
        self._open, self._steps, self._computed = component, [], computed

    def _forget(self, component: str) -> None:
        """Free what an expert's cache keeps: two tensors of the size of a block's output for each branch."""
        self._begin_cache(component, True, 1)

    def _begin_cache(self, component: str, pairs: bool, computed: int) -> None:
        config = _config(self.settings, pairs, computed)
        _cache_dit().refresh_context(self._networks[component], cache_config=config)

    def _always(self, component: str) -> int:
        """Steps of an expert, from its first, that are computed."""
        if self._schedule is None:
            model = self.place.model
            asked = getattr(model.pipeline.scheduler, "wanlab_asked", None) or self.place.denoising.steps
            self._schedule = model.schedule(asked)["component"].value_counts().to_dict()
        return math.ceil(self.settings.first_percent / 100 * self._schedule.get(component, 0))

    def _hook(self) -> None:
        """Put cache-dit around the blocks: at the first call, when compilers have made their copies of the networks."""
        for component, network in self.place.bare.components.items():
            if component in EXPERTS:
                self._ran[component] = 0
                count_calls(network.blocks[self.settings.first_blocks], self._counter(component))
                put_around(network, _config(self.settings, True, 1))
                count = len(network.blocks)
                middle = range(self.settings.first_blocks, count - self.settings.last_blocks)
                self._blocks[component] = (middle, count)
                self._networks[component] = network

    def _counter(self, component: str) -> Callable[[], None]:
        def count() -> None:
            self._ran[component] += 1

        return count


def count_calls(module: torch.nn.Module, count: Callable[[], None]) -> None:
    """Call `count` before every call of one module; outside of what a compiler made of it, which a hook would be in."""
    base: Any = type(module)

    class Counted(base):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            count()
            return super().__call__(*args, **kwargs)

    module.__class__ = named_as(Counted, base)


def put_around(network: torch.nn.Module, config: Any) -> None:
    """Put a cache of cache-dit around the blocks of one network, in place.

    Raises:
        WanlabError: cache-dit does not know such blocks.
    """
    cache_dit = _cache_dit()
    try:
        adapter = cache_dit.BlockAdapter(
            transformer=network,
            blocks=network.blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_2,
            has_separate_cfg=True,
        )
        cache_dit.enable_cache(adapter, cache_config=config)
    except (AssertionError, ValueError) as error:
        raise WanlabError(
            f"db_cache: cache-dit does not take the blocks of {type(network).__name__} ({str(error).splitlines()[0]});"
            " leave db_cache out, or install the version of cache-dit that wanlab[cache] asks for"
        ) from error


def _config(settings: DBCacheSettings, pairs: bool, computed: int) -> Any:
    return _cache_dit().DBCacheConfig(
        Fn_compute_blocks=settings.first_blocks,
        Bn_compute_blocks=settings.last_blocks,
        residual_diff_threshold=settings.threshold,
        max_warmup_steps=computed,
        max_cached_steps=-1,
        max_continuous_cached_steps=settings.in_a_row,
        enable_separate_cfg=pairs,
    )


def _cache_dit() -> Any:
    """The package, which says nothing below an error unless its own variable asks for it."""
    if PACKAGE not in sys.modules:
        with _nothing_left():
            os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
            import cache_dit  # noqa: F401 - an optional package
    return sys.modules[PACKAGE]


@contextmanager
def _nothing_left() -> Iterator[None]:
    """Importing cache-dit sets variables, and replaces two methods of all loggers by methods of its own: take both back."""
    import transformers  # noqa: F401 - it gives loggers two methods of the same names, which cache-dit calls then

    variables, methods = (
        set(os.environ),
        {name: getattr(logging.Logger, name) for name in ("warning_once", "info_once")},
    )
    try:
        yield
    finally:
        for name in set(os.environ) - variables:
            del os.environ[name]
        for name, method in methods.items():
            setattr(logging.Logger, name, method)
