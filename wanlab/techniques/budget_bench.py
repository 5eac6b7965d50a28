"""Stacks of techniques measured on a model: their videos beside the original's, what they did, and their time in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from wanlab.core.errors import WanlabError
from wanlab.evaluate.loss import QualityLoss, loss_to_truth
from wanlab.measure.in_turn import until_told
from wanlab.measure.timing import Comparison
from wanlab.models.pipeline import Generation, Model
from wanlab.techniques.budget import ORIGINAL
from wanlab.techniques.candidates import Candidate, Stack
from wanlab.techniques.costs import Costs
from wanlab.techniques.registry import made
from wanlab.techniques.switch_on import Switched, lacks, switch_on
from wanlab.techniques.technique import Proof

_SIZE = ("height", "width", "frames", "steps")


class ModelBench:
    """Measures stacks on some cases of a model; the original's videos are made once.

    Args:
        model: the original, from `wanlab.models.load`: what quality and time are read against.
        asked: arguments of `Model.generate`, of each case. truths: their true videos; the loss is unknown without.
        base: model that techniques are switched on in, such as the original on other engines; the original if None.
        costs: measured times of another run, which replace timing here.
        rounds, precision, limit_s: as `wanlab.measure.until_told`; exactly so many rounds where `precision` is None.
    """

    def __init__(
        self,
        model: Model,
        asked: Sequence[Mapping[str, Any]],
        truths: Sequence[np.ndarray] | None = None,
        *,
        base: Model | None = None,
        costs: Costs | None = None,
        rounds: int = 2,
        precision: float | None = None,
        limit_s: float | None = None,
        progress: bool = True,
    ) -> None:
        if not asked:
            raise WanlabError("quality is measured on cases; give at least one")
        self.model, self.base = model, model if base is None else base
        self.asked, self.truths = list(asked), truths
        self.costs, self.progress = costs, progress
        self.timing: dict[str, Any] = {"rounds": rounds, "precision": precision, "limit_s": limit_s}
        self._originals: list[Generation] = []
        self._opened: dict[str, Switched] = {}
        self._first: dict[str, Generation] = {}
        self._device = str(model.device)

    @property
    def facts(self) -> dict[str, str]:
        """What the times are those of, as a table of costs has it: model with size, baseline, device."""
        if self.costs is not None:
            return {
                "model": self.costs.model,
                "baseline": self.costs.baseline or "its baseline",
                "device": "",
            }
        size = {name: self.asked[0].get(name) or getattr(self.model.spec.defaults, name) for name in _SIZE}
        shape = "x".join(str(size[name]) for name in ("height", "width", "frames"))
        model = f"{self.model.spec.name} at {shape}, {size['steps']} steps"
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"model": model, "baseline": f"eager {dtype}", "device": self._device}

    def clips(self, stacks: Sequence[Stack]) -> dict[str, Generation]:
        """Videos of the first case: the original's, and those of stacks that were measured."""
        made_here = {each.label: self._first[each.key] for each in stacks if each.key in self._first}
        return {"original": self.originals[0]} | made_here

    @property
    def originals(self) -> list[Generation]:
        """The original's videos of all cases."""
        if not self._originals:
            self._originals = [self.model.generate(**each) for each in self.asked]
        return self._originals

    def lacks(self, candidate: Candidate) -> str:
        (technique,) = made({candidate.technique: candidate.settings})
        if reason := lacks(technique, self.base.spec, self.base.device, self.base.engines):
            return f"it needs {reason}"
        simulated = technique.simulated(self.base.spec, self.base.device) if self.costs is None else ""
        return f"it is simulated here, which saves no time; that needs {simulated}" if simulated else ""

    def quality(self, stack: Stack) -> tuple[QualityLoss, Mapping[str, Proof]]:
        originals = self.originals
        switched = switch_on(self.base, stack.chosen)
        videos: list[Generation] = []
        proofs: dict[str, Proof] = {}
        for each in self.asked:
            videos.append(switched.model.generate(**each))
            for name, proof in switched.proofs().items():
                if name not in proofs or proofs[name].passed:
                    proofs[name] = proof
        self._opened[stack.key], self._first[stack.key] = switched, videos[0]
        return loss_to_truth(self.truths, originals, videos), proofs

    def time(self, stacks: Sequence[Stack]) -> list[Comparison]:
        opened = [self._opened.pop(stack.key, None) for stack in stacks]
        self._opened.clear()  # those that are not timed
        if self.costs is not None:
            return [self._read(stack) for stack in stacks]
        calls = {ORIGINAL: partial(self.model.generate, **self.asked[0])}
        for stack, switched in zip(stacks, opened, strict=True):
            if switched is None:  # makes a video first, as those that are timed are warm
                switched = switch_on(self.base, stack.chosen)
                switched.model.generate(**self.asked[0])
            calls[stack.label] = partial(switched.model.generate, **self.asked[0])
        timed = until_told(
            calls,
            warmup=0,  # all of them have made videos of this size
            device=self.model.device,
            progress=self.progress,
            **self.timing,
        )
        self._device = timed.samples[ORIGINAL].device or self._device
        baseline = self.facts["baseline"]
        return [replace(timed.comparisons[stack.label], baseline=baseline) for stack in stacks]

    def _read(self, stack: Stack) -> Comparison:
        found = None if self.costs is None else self.costs.of(stack.chosen)
        if found is None:
            raise WanlabError(f"the table of costs has no row of {stack.label}")
        return replace(found, candidate=stack.label)
