"""The fastest stack of techniques within a limit of quality loss: a search whose every stack is measured.

Gains of techniques do not multiply, and their losses do not add up: a cache finds little to skip where a solver has left out
the steps. So a stack is never judged by its parts. Parts only decide which stack is measured next: first those that are
predicted to stay within the limit, the fastest of them first; then the others, by saved time per lost quality. The search
begins with each candidate alone, goes on with the stacks that are one technique larger than one that was kept, and ends
where there are none or at a time limit. Nothing in it is drawn at random.

Who is chosen among many is flattered by the cases that it was chosen by. So the stack is verified, in quality and time, on
cases that nothing was chosen by; where the fastest does not hold the limit there, the next one is verified.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import pandas as pd

from wanlab.core.errors import WanlabError
from wanlab.evaluate.loss import QualityLoss
from wanlab.measure.timing import Comparison
from wanlab.techniques.candidates import CANDIDATES, Candidate, Stack, make_candidates
from wanlab.techniques.costs import Costs
from wanlab.techniques.technique import Proof

ORIGINAL = "original"

KEPT = "kept"
NOTHING = "did nothing"
LOSES = "loses too much"
NO_GAIN = "gains nothing"
NO_MORE = "no faster than a part"
CANNOT = "cannot run"
REFUSED = (NOTHING, LOSES, CANNOT)
"""Fates that a larger stack would share."""


@dataclass(frozen=True, eq=False)
class Judged:
    """A stack that was measured on some cases.

    Attributes:
        stack: its techniques. loss: quality loss over the cases.
        proofs: technique -> what it did: that of the first case in which it failed, else of the last case.
        gain: speed-up over the baseline; None where it was not timed.
        fate: what the search did with it, one of this module's words. reason: why, in words; "" where it was kept.
    """

    stack: Stack
    loss: QualityLoss
    proofs: Mapping[str, Proof]
    gain: Comparison | None = None
    fate: str = KEPT
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether each technique did what it says in every case."""
        return bool(self.proofs) and all(proof.passed for proof in self.proofs.values())

    @property
    def speedup(self) -> float:
        """Times as fast as the baseline; NaN where it was not timed."""
        return math.nan if self.gain is None else self.gain.speedup

    def within(self, limit_percent: float) -> bool:
        """Whether it did what it says, is faster, and holds a limit at the upper end of its interval."""
        return self.passed and self.speedup > 1 and self.loss.within(limit_percent) == "yes"


class Bench(Protocol):
    """What a search measures with; `budget_bench.ModelBench` is the one on a model."""

    def lacks(self, candidate: Candidate) -> str:
        """Why a candidate cannot be measured here, with what would bring it; "" if it can."""

    def quality(self, stack: Stack) -> tuple[QualityLoss, Mapping[str, Proof]]:
        """The quality loss of a stack over the cases, and what each of its techniques did."""

    def time(self, stacks: Sequence[Stack]) -> list[Comparison]:
        """The speed-ups of some stacks, measured in turn with the baseline."""


class Space(Protocol):
    """Which stacks there are."""

    def roots(self) -> list[Stack]:
        """Stacks that are measured first."""

    def larger(self, stack: Stack, kept: Sequence[Candidate]) -> list[Stack]:
        """Stacks with one technique more, of those candidates that were kept alone."""

    def speedup(self, stack: Stack) -> float | None:
        """What is known of its time before it is measured."""


@dataclass(frozen=True)
class Combined:
    """All stacks of some candidates."""

    candidates: Sequence[Candidate]

    def roots(self) -> list[Stack]:
        """Each candidate alone; the first settings of every technique, then the second of every technique, and so on."""
        ladders: dict[str, list[Candidate]] = {}
        for each in self.candidates:
            ladders.setdefault(each.technique, []).append(each)
        longest = max(map(len, ladders.values()), default=0)
        return [
            Stack.of([ladder[rung]])
            for rung in range(longest)
            for ladder in ladders.values()
            if rung < len(ladder)
        ]

    def larger(self, stack: Stack, kept: Sequence[Candidate]) -> list[Stack]:
        return [more for each in kept if (more := stack.extended(each)) is not None]

    def speedup(self, stack: Stack) -> float | None:
        return None


@dataclass(frozen=True)
class Listed:
    """The stacks of a table of costs; each is reached from one of its parts that is in the table too, if there is one."""

    stacks: Sequence[Stack]
    costs: Costs

    def roots(self) -> list[Stack]:
        known = {stack.key for stack in self.stacks}
        return [stack for stack in self.stacks if not any(part.key in known for part in stack.parts())]

    def larger(self, stack: Stack, kept: Sequence[Candidate]) -> list[Stack]:
        return [more for more in self.stacks if any(part.key == stack.key for part in more.parts())]

    def speedup(self, stack: Stack) -> float | None:
        found = self.costs.of(stack.chosen)
        return None if found is None else found.speedup


def space_of(candidates: Sequence[Candidate] | None, costs: Costs | None = None) -> Combined | Listed:
    """The stacks to search: all that candidates give, or those of a table of costs.

    Args:
        candidates: None takes `CANDIDATES`, or every row of the table.

    Raises:
        WanlabError: no row of the table consists of the candidates.
    """
    if costs is None:
        return Combined(make_candidates(CANDIDATES) if candidates is None else candidates)
    if candidates is None:
        return Listed(costs.stacks, costs)
    wanted = set(candidates)
    stacks = [stack for stack in costs.stacks if wanted.issuperset(stack.candidates)]
    if not stacks:
        raise WanlabError(
            f"{costs.source} has no row that consists of the candidates; add a row, or name no candidates"
        )
    return Listed(stacks, costs)


@dataclass(frozen=True, eq=False)
class Search:
    """A finished search.

    Attributes:
        limit_percent: limit of the quality loss.
        judged: every stack that was measured, in that order, on the cases of the selection.
        missing: candidate -> why it was not measured. left: stacks that were not measured, the most promising first.
        seconds, limit_s: time that it took, and its limit.
    """

    limit_percent: float
    judged: tuple[Judged, ...]
    missing: Mapping[Candidate, str]
    left: tuple[Stack, ...]
    seconds: float
    limit_s: float

    @property
    def alone(self) -> dict[Candidate, Judged]:
        """Candidate -> it alone."""
        return {each.stack.candidates[0]: each for each in self.judged if len(each.stack.candidates) == 1}

    def promising(self) -> list[Judged]:
        """Stacks that hold the limit at the upper end of their interval, the fastest first."""
        held = [each for each in self.judged if each.within(self.limit_percent)]
        return sorted(held, key=lambda each: -each.speedup)

    def product(self, stack: Stack) -> float:
        """Its speed-up if those of its techniques alone multiplied; NaN where one of them was not timed alone."""
        alone = self.alone
        return math.prod(alone[each].speedup if each in alone else math.nan for each in stack.candidates)

    def frame(self) -> pd.DataFrame:
        """One row per measured stack: stack, tier, speedup, low, high (95 % interval), noise_percent, product (speed-up if
        the gains multiplied), quality_loss_percent, loss_low, loss_high, did_what_it_says, efficient (faster than the
        original, and no other stack beats it in both), within_limit (at the upper end), fate, reason, techniques (JSON)."""
        efficient = _efficient(self.judged)
        rows = []
        for each, best in zip(self.judged, efficient, strict=True):
            row = judged_row(each)
            row["product"] = self.product(each.stack)
            row["efficient"] = best
            row["within_limit"] = each.within(self.limit_percent)
            row |= {"fate": each.fate, "reason": each.reason, "techniques": json.dumps(each.stack.chosen)}
            rows.append(row)
        return pd.DataFrame(rows)

    def candidates_frame(self) -> pd.DataFrame:
        """One row per candidate, also those that were not measured: candidate, tier, speedup, low, high,
        quality_loss_percent, loss_low, loss_high, fate, reason."""
        rows = []
        for candidate, each in self.alone.items():
            row = judged_row(each)
            rows.append({"candidate": candidate.title} | {name: row[name] for name in _OF_CANDIDATES})
            rows[-1] |= {"fate": each.fate, "reason": each.reason}
        for candidate, reason in self.missing.items():
            rows.append(
                {
                    "candidate": candidate.title,
                    "tier": candidate.tier,
                    "fate": "not measured",
                    "reason": reason,
                }
            )
        return pd.DataFrame(rows)


_OF_CANDIDATES = ("tier", "speedup", "low", "high", "quality_loss_percent", "loss_low", "loss_high")


STACK_COLUMNS = (
    "stack",
    "tier",
    "speedup",
    "low",
    "high",
    "product",
    "quality_loss_percent",
    "loss_low",
    "loss_high",
    "did_what_it_says",
    "fate",
    "reason",
)
"""Columns of `Search.frame` for readers."""


def judged_row(each: Judged) -> dict[str, object]:
    """A measured stack as a row: stack, tier, speedup, low, high, noise_percent, quality_loss_percent, loss_low, loss_high,
    did_what_it_says; None where unknown."""
    gain = each.gain
    return {
        "stack": each.stack.label,
        "tier": each.stack.tier,
        "speedup": each.speedup,
        "low": math.nan if gain is None else gain.low,
        "high": math.nan if gain is None else gain.high,
        "noise_percent": math.nan if gain is None else gain.noise_percent,
        "quality_loss_percent": each.loss.percent,
        "loss_low": each.loss.low_percent,
        "loss_high": each.loss.high_percent,
        "did_what_it_says": each.passed,
    }


def proofs_frame(judged: Iterable[Judged]) -> pd.DataFrame:
    """What each technique did in each stack: stack, technique, did_what_it_says, what_it_did."""
    rows = [
        {
            "stack": each.stack.label,
            "technique": name,
            "did_what_it_says": proof.passed,
            "what_it_did": proof.sentence,
        }
        for each in judged
        for name, proof in each.proofs.items()
    ]
    return pd.DataFrame(rows, columns=["stack", "technique", "did_what_it_says", "what_it_did"])


def _efficient(judged: Sequence[Judged]) -> list[bool]:
    """Whether it is faster than the original, and no other with an effect is as fast, loses no more and is better in one."""
    points = [
        (each.speedup, each.loss.percent) if each.passed and each.loss.known else (math.nan, math.nan)
        for each in judged
    ]
    others = np.array([*points, (1.0, 0.0)], dtype=float)
    found = []
    for speed, loss in points:
        no_worse = (others[:, 0] >= speed) & (others[:, 1] <= loss)
        better = (others[:, 0] > speed) | (others[:, 1] < loss)
        found.append(bool(speed > 1 and not (no_worse & better).any()))
    return found


@dataclass(eq=False)
class _State:
    """What a search knows while it runs."""

    bench: Bench
    space: Space
    limit_percent: float
    limit_s: float
    begun: float
    judged: dict[str, Judged] = field(default_factory=dict)

    def room(self, count: int) -> int:
        """How many of so many stacks can be measured within the limit, each as long as those before."""
        if math.isinf(self.limit_s):
            return count
        elapsed = time.monotonic() - self.begun
        if not self.judged or elapsed == 0:
            return 1
        return max(min(count, math.floor((self.limit_s - elapsed) * len(self.judged) / elapsed)), 0)

    def measure(self, stacks: Sequence[Stack], told: Callable[[int], object]) -> int:
        """Measure stacks, at least one; the number of those that the time limit let through.

        Quality comes first: what does nothing is not timed.
        """
        found: list[Judged] = []
        for stack in stacks:
            if found and time.monotonic() - self.begun > self.limit_s:
                break
            found.append(self._quality(stack))
            told(1)
        timed = [each for each in found if each.passed]
        gains = self.bench.time([each.stack for each in timed]) if timed else []
        times = {each.stack.key: gain for each, gain in zip(timed, gains, strict=True)}
        for each in found:
            gain = times.get(each.stack.key)
            self.judged[each.stack.key] = each if gain is None else self._timed(each, gain)
        return len(found)

    def _quality(self, stack: Stack) -> Judged:
        try:
            loss, proofs = self.bench.quality(stack)
        except WanlabError as error:
            return Judged(stack, QualityLoss.unknown(), {}, None, CANNOT, str(error))
        idle = [proof.sentence for proof in proofs.values() if not proof.passed]
        if idle or not proofs:
            reason = " ".join(idle) or "no technique says what it did."
            return Judged(stack, loss, proofs, None, NOTHING, reason)
        if loss.percent is not None and loss.percent > self.limit_percent:
            return Judged(stack, loss, proofs, None, LOSES, f"{loss}, limit {self.limit_percent:g} %")
        return Judged(stack, loss, proofs)

    def _timed(self, each: Judged, gain: Comparison) -> Judged:
        fate, reason = each.fate, each.reason
        parts = [self.judged[part.key] for part in each.stack.parts() if part.key in self.judged]
        best = max((part for part in parts if part.speedup == part.speedup), key=lambda part: part.speedup,
                   default=None)  # fmt: skip
        if fate != KEPT:
            pass
        elif gain.speedup <= 1:  # whether a gain can be told from noise is decided by the verification
            fate, reason = NO_GAIN, gain.clause("it", "the baseline")
        elif best is not None and gain.speedup <= best.speedup:
            fate, reason = NO_MORE, f"{best.stack.label} is {best.speedup:.2f} times as fast"
        return Judged(each.stack, each.loss, each.proofs, gain, fate, reason)

    def next(self) -> list[Stack]:
        """Stacks that are one technique larger than a kept one and not measured, the most promising first."""
        kept = [each for each in self.judged.values() if each.fate == KEPT]
        alone = {each.stack.candidates[0]: each for each in kept if len(each.stack.candidates) == 1}
        ranks: dict[str, tuple[tuple[bool, float], Stack]] = {}
        for parent in kept:
            for stack in self.space.larger(parent.stack, list(alone)):
                if stack.key in self.judged or self._refused(stack):
                    continue
                rank = self._rank(stack, parent, alone)
                if stack.key not in ranks or rank > ranks[stack.key][0]:  # the part that says the least of it
                    ranks[stack.key] = rank, stack
        return [stack for _, stack in sorted(ranks.values(), key=lambda each: each[0])]

    def _refused(self, stack: Stack) -> bool:
        parts = (self.judged.get(part.key) for part in stack.parts())
        return any(part is not None and part.fate in REFUSED for part in parts)

    def _rank(self, stack: Stack, parent: Judged, alone: Mapping[Candidate, Judged]) -> tuple[bool, float]:
        """Smaller is more promising; from the measured parts, as if gains multiplied and losses added up."""
        added = [
            alone[each] for each in stack.candidates if each in alone and each not in parent.stack.candidates
        ]
        known = self.space.speedup(stack)
        speedup = known or parent.speedup * math.prod(each.speedup for each in added)
        lost = sum(max(each.loss.percent or 0.0, 0.0) for each in [parent, *added])
        if lost <= self.limit_percent:
            return False, -speedup
        return True, -(1 - 1 / speedup) / lost


def search(
    space: Space,
    bench: Bench,
    limit_percent: float,
    *,
    limit_s: float = math.inf,
    at_once: int = 3,
    told: Callable[[int], object] = lambda count: None,
) -> Search:
    """Measure stacks of techniques, the most promising first.

    Args:
        space: `Combined` of candidates, or `Listed`.
        limit_percent: limit of the quality loss.
        limit_s: seconds. The first stack is measured alone, to know how long one takes; a batch begins where time is left.
        at_once: stacks that are timed in turn with the baseline.
        told: called with 1 after each stack whose videos were made.

    Raises:
        WanlabError: a limit that is not above 0, or no candidate that can be measured here.
    """
    for name, value in (("limit_percent", limit_percent), ("limit_s", limit_s), ("at_once", at_once)):
        if not value > 0:
            raise WanlabError(f"{name} is {value}; give a number above 0")
    missing: dict[Candidate, str] = {}
    roots = []
    for stack in space.roots():
        reasons = {each: reason for each in stack.candidates if (reason := bench.lacks(each))}
        missing |= reasons
        if not reasons:
            roots.append(stack)
    if not roots:
        why = "; ".join(f"{each.title}: {reason}" for each, reason in missing.items())
        raise WanlabError(f"none of the candidates can be measured here ({why})")
    state = _State(bench, space, limit_percent, limit_s, time.monotonic())
    while roots and (count := state.room(len(roots[:at_once]))):
        roots = roots[state.measure(roots[:count], told) :]
    left = list(roots)
    while not left and (following := state.next()):
        here = [stack for stack in following if not any(map(bench.lacks, stack.candidates))]
        if not here:
            break
        if not (count := state.room(len(here[:at_once]))):
            left = here
            break
        state.measure(here[:count], told)
    for stack in roots:
        if len(stack.candidates) == 1:
            missing[stack.candidates[0]] = f"the time limit of {limit_s:g} s came first"
    return Search(
        limit_percent,
        tuple(state.judged.values()),
        missing,
        tuple(left),
        time.monotonic() - state.begun,
        limit_s,
    )


@dataclass(frozen=True, eq=False)
class Budget:
    """What a search found, and what held on cases that nothing was chosen by.

    Attributes:
        search: the search. verified: stacks that were verified on the final cases, in that order.
        winner: the first of them that holds the limit; None where none does.
        more: stacks that held the limit in the search and were not verified.
    """

    search: Search
    verified: tuple[Judged, ...]
    winner: Judged | None
    more: int = 0

    @property
    def techniques(self) -> dict[str, dict]:
        """Technique -> settings of the winner, as in a configuration; empty where there is none, which is the original."""
        return {} if self.winner is None else self.winner.stack.chosen

    @property
    def about(self) -> str:
        """What the configuration of the winner is, in one line."""
        limit = f"{self.search.limit_percent:g} % quality loss"
        if self.winner is None or self.winner.gain is None:
            return f"the original: no stack of techniques was verified to hold {limit}"
        speed = f"{self.winner.speedup:.2f} times as fast as {self.winner.gain.baseline}"
        return f"the fastest verified within {limit}: {speed}, {self.winner.loss.text}"

    def verified_frame(self) -> pd.DataFrame:
        """One row per verified stack: columns of `judged_row` (no speed-up where it lost too much), verdict of the time,
        held (whether it is the winner), and selection_loss_percent and selection_speedup, what the search measured."""
        before = {each.stack.key: each for each in self.search.judged}
        rows = []
        for each in self.verified:
            chosen = before[each.stack.key]
            rows.append(
                judged_row(each)
                | {
                    "verdict": "not timed" if each.gain is None else each.gain.verdict,
                    "held": each is self.winner,
                    "selection_loss_percent": chosen.loss.percent,
                    "selection_speedup": chosen.speedup,
                }
            )
        return pd.DataFrame(rows)

    def proofs(self) -> pd.DataFrame:
        """What each technique did: `proofs_frame` of the verified stacks, then of all others."""
        done = {each.stack.key for each in self.verified}
        return proofs_frame(
            [*self.verified, *(each for each in self.search.judged if each.stack.key not in done)]
        )


def verify(found: Search, bench: Bench, *, most: int = 3) -> Budget:
    """Measure the fastest stacks of a search anew until one holds the limit.

    A stack holds it that did what it says in every case, is faster than the baseline by more than the noise, and whose
    quality loss is within the limit at the upper end of its interval.

    Args:
        bench: on cases that nothing was chosen by. most: stacks that are verified at most.

    Raises:
        WanlabError: `most` is below 1.
    """
    if most < 1:
        raise WanlabError(f"{most} stacks to verify; give at least 1")
    verified: list[Judged] = []
    promising = found.promising()
    for each in promising[:most]:
        loss, proofs = bench.quality(each.stack)
        again = Judged(each.stack, loss, proofs)
        if again.passed and loss.within(found.limit_percent) == "yes":  # else its time says nothing
            (gain,) = bench.time([each.stack])
            again = replace(again, gain=gain)
        verified.append(again)
        if again.within(found.limit_percent) and again.gain is not None and again.gain.verdict == "faster":
            return Budget(found, tuple(verified), again, len(promising) - len(verified))
    return Budget(found, tuple(verified), None, len(promising) - len(verified))
