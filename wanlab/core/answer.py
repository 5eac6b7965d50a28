"""The answer of a notebook: a headline, sentences below it and key figures, for a reader who has never seen wanlab."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from wanlab.core.stats import interval_text
from wanlab.core.words import SMALLEST_PERCENT

LONGEST = 240
"""Characters of a headline: four lines of a phone."""
MOST_DETAILS = 3
MOST_TILES = 5


class Tile(NamedTuple):
    """A key figure: what it is, its value with the unit, and its interval or what it is read against."""

    title: str
    value: str
    beside: str = ""


class Step(NamedTuple):
    """What to do next.

    Attributes:
        why: what it brings, as a clause without a subject: "measures it on cases that were not used for choosing".
        notebook: the notebook to run; "" for the same one again, where `parameters` says with what.
        parameters: parameters that differ from the notebook's own, or from those of this run; None is the notebook's own.
    """

    why: str
    notebook: str = ""
    parameters: Mapping[str, Any] = {}

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.parameters.items() if value is not None)
        again = self.notebook or ("this notebook" if given else "")
        return f"Next: {again}{f' with {given}' if given else ''}{': ' if again else ''}{self.why}."


def step(why: str, notebook: str = "", **parameters: Any) -> Step:
    """A `Step`: `step("gives an interval", cases=8)` is this notebook again, with more cases."""
    return Step(why.strip().removesuffix("."), notebook, parameters)


def more_videos(iterations: int) -> Step:
    """The same notebook again with more videos, where equal ones differ by too much."""
    return step("lowers the noise: more videos are timed, best on an idle machine", iterations=iterations)


IDLE = Step("tells how much on an idle machine: nothing else may run beside it")
"""What to do where other work left no more than a direction to tell."""


@dataclass(frozen=True)
class Answer:
    """What a notebook found, for a reader who has ten seconds; `Run.verdict` shows it.

    Attributes:
        headline: one or two plain sentences: what holds, its figure, and how sure it is; at most `LONGEST` characters, no
            name of a file or a column.
        details: sentences that explain or limit it, at most `MOST_DETAILS`.
        tiles: key figures, the most important first; at most `MOST_TILES`.
        next: what to do next; it stands right below the headline.
    """

    headline: str
    details: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = ()
    next: Step | None = None

    def __str__(self) -> str:
        return " ".join([self.headline, *self.details, *([str(self.next)] if self.next else [])])


def fitting(*headlines: str) -> str:
    """The first of some headlines, the fullest first, that is not too long; else the last."""
    return next((each for each in headlines if len(each) <= LONGEST), headlines[-1])


def answer(
    headline: str,
    *details: str,
    tiles: Iterable[tuple[str, str, str] | None] = (),
    next: Step | None = None,
) -> Answer:
    """An answer without its empty details and without tiles that are None."""
    shown = tuple(detail.strip() for detail in details if detail.strip())
    return Answer(headline, shown, tuple(Tile(*tile) for tile in tiles if tile is not None), next)


def ratio_text(ratio: float, low: float | None = None, high: float | None = None, *, beside: str = "") -> str:
    """How fast one is beside another: `"1.73 times as fast as eager (95 % interval 1.70 to 1.77)"`; without an interval
    where there is none."""
    known = not any(end is None or math.isnan(end) for end in (low, high))
    against = f" as {beside}" if beside else ""
    return f"{ratio:.2f} times as fast{against}" + (f" ({interval_text(low, high)})" if known else "")


def loss_texts(percent: float, low: float | None, high: float | None) -> tuple[str, str]:
    """A quality loss and its interval, for a key figure; what is below 0.01 % is said to be so."""
    ends = [abs(value) for value in (percent, low, high) if value is not None and value == value]
    if len(ends) == 3 and max(ends) < SMALLEST_PERCENT:
        return f"< {SMALLEST_PERCENT:g} %", f"95 % interval within ±{SMALLEST_PERCENT:g} %"
    value = f"{percent:+.2f} %" if abs(percent) >= SMALLEST_PERCENT else f"< {SMALLEST_PERCENT:g} %"
    return value, interval_text(low, high, "+.2f")


def speed_text(
    ratio: float,
    low: float = math.nan,
    high: float = math.nan,
    *,
    candidate: str,
    baseline: str,
    same: bool = False,
    noise_percent: float = math.nan,
    how: str = "as fast",
    busy: str = "",
) -> str:
    """How fast one is beside another, in a clause with its interval, and with the noise where that decides.

    Args:
        ratio, low, high: speed-up of the candidate with its 95 % interval, NaN where it is unknown.
        candidate: name of the one, as the subject of the clause; "" leaves subject and verb out.
        same: whether it cannot be told from noise.
        noise_percent: noise that it was read against; shown where it cannot be told from it, and is 1 % or more.
        how: words after "2.00 times".
        busy: what other work took, where it took so much that only the direction holds.
    """
    if busy and not same:
        verdict = f"{'slower' if ratio < 1 else 'faster'} than {baseline}"
        return f"{f'{candidate} is ' if candidate else ''}{verdict}; by how much cannot be told while {busy}"
    noise = f", noise {noise_percent:.0f} %" if same and noise_percent >= 1 else ""
    times, known = f"{ratio:.2f} times {how}", f"({interval_text(low, high)}{noise})"
    if same:
        subject = f"{candidate} cannot" if candidate else "cannot"
        return f"{subject} be told from {baseline} in time: {times} {known}"
    subject = f"{candidate} is " if candidate else ""
    if ratio < 1:
        return f"{subject}slower than {baseline}: {times} {known}"
    return f"{subject}{times} as {baseline} {known}"
