"""The calls of the denoisers in a generation, and rules around them that may answer in place of the network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
import torch

from wanlab.models.calls import largest_timestep
from wanlab.models.pipeline import Model
from wanlab.models.spec import EXPERTS
from wanlab.models.taps import CallProxy

WHOLE = "both"
"""Branch of a call whose pipeline does not say which one it is: guidance is a batch of both, or there is none."""


@dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Attributes:
        component: the expert. step: denoising step, from 0, of `steps`.
        first: whether the expert has just taken over: this branch has not been called in its steps before.
        branch: `"cond"` or `"uncond"` of guidance, or `WHOLE`.
        alone: whether the other branch of this step will not be needed.
        arguments: arguments of the denoiser by name.
    """

    component: str
    step: int
    steps: int
    first: bool
    branch: str
    alone: bool
    arguments: dict[str, Any]

    @property
    def latents(self) -> torch.Tensor:
        """What the denoiser takes, `[B, C, T, H, W]` in most families: noisy latents, then masks and conditions."""
        return self.arguments["hidden_states"]

    @property
    def timestep(self) -> float:
        """Noise level as the denoiser takes it, 0 to 1000 in most families; reading it waits for the device."""
        return largest_timestep(self.arguments["timestep"])

    @property
    def text(self) -> torch.Tensor | None:
        """Embeddings of the text, `[B, L, D]`."""
        return self.arguments.get("encoder_hidden_states")


Inner = Callable[[Call], torch.Tensor]
"""The next rule inside, or the network: a call to what the denoiser predicts."""


class Rule(Protocol):
    """What stands around the calls of the denoisers."""

    name: str

    def begin(self) -> None:
        """Forget everything: another generation begins."""

    def __call__(self, call: Call, inner: Inner) -> torch.Tensor:
        """The prediction of a call, from `inner(call)` or in place of it."""


class Denoising:
    """The denoisers of one model with rules around them; a clock of its scheduler (`models.clocks`).

    Attributes:
        rules: from the innermost to the outermost.
        at_begin: what else is called when a generation begins.
        rows: a record for each call of the last generation, see `frame`.
    """

    def __init__(self) -> None:
        self.rules: list[Rule] = []
        self.at_begin: list[Callable[[], None]] = []
        self.rows: list[dict[str, Any]] = []
        self.step, self.steps = 0, 0
        self._before: dict[str, str] = {}  # branch -> the expert of its last call
        self._branch: str | None = None
        self._left_out: tuple[range, int] = (range(0), 1)

    def __deepcopy__(self, memo) -> Denoising:
        """Copies of the scheduler tell the same denoisers."""
        return self

    def begin(self, num_steps: int) -> None:
        """Start a generation of this number of steps."""
        self.step, self.steps, self.rows, self._before = 0, num_steps, [], {}
        for forget in (*(rule.begin for rule in self.rules), *self.at_begin):
            forget()

    def advance(self) -> None:
        """Go to the next step."""
        self.step += 1

    def install(self, model: Model) -> None:
        """Put stand-ins in the place of the denoisers of a model's pipeline."""
        for component, network in model.components.items():
            if component in EXPERTS:
                # Bypasses the pipeline's own __setattr__, which would write the stand-in to its config.
                vars(model.pipeline)[model.spec.part_of(component)] = StandIn(network, component, self)

    def frame(self) -> pd.DataFrame:
        """A row per call of the last generation, in order: step, component, branch, timestep, first, ran (whether the
        network ran for it), by (the rule that answered in its place, or `""`), size (of the latents that the network took,
        `(T, H, W)` in most families; None where it did not run), left_out (numbers of the blocks that did not run in a
        network that ran), skipped (share of its blocks that did not run; 1 where it did not run)."""
        columns = [
            "step",
            "component",
            "branch",
            "timestep",
            "first",
            "ran",
            "by",
            "size",
            "left_out",
            "skipped",
        ]
        rows = [row | {"timestep": largest_timestep(row["timestep"])} for row in self.rows]
        return pd.DataFrame(rows, columns=columns)

    def leave_out(self, blocks: range, of: int) -> None:
        """A rule tells that these blocks of the network, of a number, do not run in this call."""
        self._left_out = (blocks, of)

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Inside the block calls are of this branch of guidance."""
        before, self._branch = self._branch, name
        try:
            yield
        finally:
            self._branch = before

    def predict(self, component: str, network: Inner, arguments: dict[str, Any]) -> torch.Tensor:
        """What the denoiser, or a rule in its place, predicts for a call of the pipeline."""
        branch = self._branch or WHOLE
        first = self._before.get(branch) != component
        self._before[branch] = component
        call = Call(component, self.step, self.steps, first, branch, branch == WHOLE, arguments)
        passed: list[str] = []  # rules that the call came to, and "" once it came to the network
        sizes: list[tuple[int, ...]] = []

        def run(given: Call) -> torch.Tensor:
            passed.append("")
            sizes.append(tuple(given.latents.shape[2:]))
            return network(given)

        def inside(depth: int) -> Inner:
            if depth < 0:
                return run
            rule = self.rules[depth]

            def answer(given: Call) -> torch.Tensor:
                passed.append(rule.name)
                return rule(given, inside(depth - 1))

            return answer

        self._left_out = (range(0), 1)
        prediction = inside(len(self.rules) - 1)(call)
        ran, (blocks, count) = passed[-1] == "", self._left_out
        self.rows.append(
            {
                "step": call.step,
                "component": component,
                "branch": branch,
                "timestep": arguments["timestep"],  # read when it is asked for
                "first": first,
                "ran": ran,
                "by": passed[-1],
                "size": sizes[-1] if sizes else None,
                "left_out": blocks,
                "skipped": len(blocks) / count if ran else 1.0,
            }
        )
        return prediction


class StandIn(CallProxy):
    """Stands in for a denoiser: its calls go through the rules. `isinstance` and attributes are those of the denoiser."""

    def __init__(self, network: Any, component: str, denoising: Denoising) -> None:
        names = getattr(network, "names", None) or list(inspect.signature(network.forward).parameters)

        def call(original: Callable) -> Callable:
            def run(given: Call) -> torch.Tensor:
                return original(**given.arguments, return_dict=False)[0]

            def through(*positional: Any, return_dict: bool = True, **named: Any) -> Any:
                arguments = dict(zip(names, positional, strict=False)) | named
                arguments = {name: value for name, value in arguments.items() if value is not None}
                sample = denoising.predict(component, run, arguments)
                return _Sample(sample) if return_dict else (sample,)

            return through

        def context(original: Callable) -> Callable:
            @contextmanager
            def named(name: str, **others: Any) -> Iterator[None]:
                with (
                    original(name, **others),
                    denoising.branch(name if name in ("cond", "uncond") else WHOLE),
                ):
                    yield

            return named

        wrappers = {"__call__": call}
        if hasattr(network, "cache_context"):
            wrappers["cache_context"] = context
        super().__init__(network, wrappers)


@dataclass(frozen=True)
class _Sample:
    """What diffusers' denoisers return with `return_dict`."""

    sample: torch.Tensor

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.sample,)[index]
