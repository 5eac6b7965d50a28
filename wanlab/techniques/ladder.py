"""A stack of techniques taken apart: rung after rung, each alone, and each taken out of the full stack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from wanlab.core.answer import Answer, answer, fitting, step
from wanlab.core.errors import WanlabError
from wanlab.core.words import capital, percent_text
from wanlab.models.pipeline import Model
from wanlab.techniques.answers import next_step
from wanlab.techniques.registry import made
from wanlab.techniques.trial import Trial, Tried, try_out

RUNG, ALONE, WITHOUT = "rung", "alone", "without"

AFTER_LADDER = step("shows which steps a cache skips, and at which threshold", "44_caches")

Stack = Mapping[str, Mapping[str, Any] | None]
"""Technique -> its settings, as in a configuration."""


@dataclass(frozen=True, eq=False)
class Ladder:
    """A stack of techniques, measured in its parts on the same cases.

    Attributes:
        names: techniques in the order in which they are added, which is that of their application.
        trial: all variants. labels: (kind, technique) -> label of its variant; of a rung the technique is the last that was
            added, so that the last rung is the full stack.
    """

    names: tuple[str, ...]
    trial: Trial
    labels: Mapping[tuple[str, str], str]

    def variant(self, kind: str, name: str) -> Tried:
        """The variant of a rung, of a technique alone, or of the stack without it."""
        label = self.labels[kind, name]
        return next(tried for tried in self.trial.variants if tried.label == label)

    @property
    def full(self) -> Tried:
        """The full stack."""
        return self.variant(RUNG, self.names[-1])

    @property
    def product(self) -> float:
        """Speed-up of the full stack if the speed-ups of its techniques alone multiplied."""
        return math.prod(self.trial.comparison(self.labels[ALONE, name]).speedup for name in self.names)

    def frame(self) -> pd.DataFrame:
        """One row per technique: technique, tier, bound_times_faster, alone_speedup, rung_speedup (with those before it)
        with rung_low and rung_high, without_speedup (the stack without it), skipped_percent and quality_loss_percent of
        the rung with loss_low and loss_high, did_what_it_says. Speed-ups are over the original."""
        rows = []
        for technique in self.full.switched.techniques:
            rung, alone = self.variant(RUNG, technique.name), self.variant(ALONE, technique.name)
            gain = self.trial.comparison(rung.label)
            without = self.labels.get((WITHOUT, technique.name))
            rows.append(
                {
                    "technique": technique.name,
                    "tier": technique.tier,
                    "bound_times_faster": alone.times_faster_at_most,
                    "alone_speedup": self.trial.comparison(alone.label).speedup,
                    "rung_speedup": gain.speedup,
                    "rung_low": gain.low,
                    "rung_high": gain.high,
                    "without_speedup": self.trial.comparison(without).speedup if without else np.nan,
                    "skipped_percent": rung.skipped_percent,
                    "quality_loss_percent": rung.loss.percent,
                    "loss_low": rung.loss.low_percent,
                    "loss_high": rung.loss.high_percent,
                    "did_what_it_says": alone.passed and rung.passed,
                }
            )
        return pd.DataFrame(rows)

    def answer(self, limit_percent: float, cases: int) -> Answer:
        """What the full stack buys and costs, and which technique it owes most to.

        Args:
            limit_percent: limit of the quality loss. cases: number of cases.
        """
        full = self.full
        gain = self.trial.comparison(full.label)
        several = len(self.names) > 1
        every = f"with all {len(self.names)} techniques the video"
        subject = every if several else f"the video with {_title(self.names[0])}"
        head = capital(gain.clause(subject, "the original"))
        idle = [name for name in self.names if not self.variant(ALONE, name).passed]
        return answer(
            fitting(f"{head}; {full.loss.text}.", f"{head}."),
            f"Without effect alone: {', '.join(_title(name) for name in idle)}." if idle else "",
            self._owed(gain.speedup),
            f"If the gains of each alone multiplied, it would be {self.product:.2f} times as fast."
            if several
            else "",
            tiles=[
                gain.tile(),
                ("quality loss", *full.loss.tile(limit_percent)),
                ("calls skipped", percent_text(full.skipped_percent), "of the denoiser, by all together"),
                (
                    "most it could buy",
                    f"{full.times_faster_at_most:.2f}×",
                    "by where the time of a video goes",
                ),
            ],
            next=next_step(full, cases, AFTER_LADDER),
        )

    def _owed(self, whole: float) -> str:
        """Which technique the stack would lose most without."""
        left = {
            name: self.trial.comparison(self.labels[WITHOUT, name]).speedup
            for name in self.names
            if (WITHOUT, name) in self.labels
        }
        if not left:
            return ""
        name = min(left, key=left.__getitem__)
        if left[name] >= whole:
            return "Taking any one of them out makes it no slower."
        return f"It owes most to {_title(name)}: without it, it is {left[name]:.2f} times as fast as the original."


def _title(name: str) -> str:
    return name.replace("_", " ")


def climb(
    model: Model, stack: Stack, asked: Sequence[Mapping[str, Any]], truths: Any = None, **timing: Any
) -> Ladder:
    """Measure a stack of techniques rung by rung, each alone, and each taken out of the stack.

    Args:
        model, asked, truths: as `try_out`. stack: technique -> its settings.
        timing: rounds, precision, limit_s, progress of `try_out`.

    Raises:
        WanlabError: as `try_out`; an empty stack.
    """
    if not stack:
        raise WanlabError(
            "this configuration has no techniques, so there is nothing to take apart; name one that has"
            " (`wanlab config show stacked`)"
        )
    names = tuple(technique.name for technique in made(stack))
    labels: dict[tuple[str, str], str] = {}
    variants: dict[str, Stack] = {}

    def add(kind: str, name: str, parts: Sequence[str], label: str) -> None:
        known = next((own for own, chosen in variants.items() if set(chosen) == set(parts)), None)
        labels[kind, name] = known or label
        if known is None:
            variants[label] = {part: stack[part] for part in parts}

    for index, name in enumerate(names):
        add(RUNG, name, names[: index + 1], " + ".join(map(_title, names[: index + 1])))
    for name in names:
        add(ALONE, name, [name], _title(name))
    for name in names if len(names) > 1 else ():
        add(WITHOUT, name, [other for other in names if other != name], f"all but {_title(name)}")
    return Ladder(names, try_out(model, variants, asked, truths, **timing), labels)
