"""Which configuration to use: the fastest whose quality loss is within a limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wanlab.runs.comparison.compare import BASELINE, SAME, Comparisons
from wanlab.runs.comparison.frontier import NO_EFFECT
from wanlab.runs.comparison.metrics import better, known

if TYPE_CHECKING:
    import pandas as pd

DRIFT = "the baseline was run once, so drift between runs is not known"
QUALITY = ("quality_loss_high_percent", "quality_loss_percent")


@dataclass(frozen=True, eq=False)
class Choice:
    """The configuration to use.

    Attributes:
        label: its name; the baseline's where nothing better is within the limit.
        row: of the comparison's frame.
        within: labels that are within the limit, the baseline among them.
        alike: of these, those that cannot be told apart from the fastest; the choice loses least of them.
        text: the answer in a sentence or two.
    """

    label: str
    row: pd.Series
    within: tuple[str, ...]
    alike: tuple[str, ...]
    text: str


def choose(found: Comparisons, limit_percent: float = 3.0) -> Choice:
    """The best by the compared figure among those whose quality loss, with its interval, is within a limit.

    Of those that cannot be told apart from the best, the one that loses least: noise does not choose.
    A configuration that had no effect, or whose loss is not known, is not chosen.
    """
    frame = found.frame.set_index("configuration")
    within, without = [], 0
    for row in found.rows:
        loss = _loss(row.results)
        fits = loss is not None and loss <= limit_percent
        without += loss is None
        if row is found.baseline or (fits and row.results.get("effect") != NO_EFFECT):
            within.append(row.label)
    ahead = [
        label
        for label in within
        if frame.loc[label, "verdict"] not in (SAME, BASELINE, "slower", "worse", "")
    ]
    pick = min if better(found.by) == "min" else max
    alike = []
    if ahead:
        first = found.row(pick(ahead, key=lambda label: frame.loc[label, found.by]))
        alike = [
            label
            for label in ahead
            if label == first.label or found.verdict(first, found.row(label)) in (SAME, "")
        ]
    best = min(alike, key=lambda label: _loss(found.row(label).results)) if alike else found.baseline.label
    row = frame.loc[best]
    text = _text(found, best, row, within, alike, without, limit_percent)
    return Choice(best, row, tuple(within), tuple(alike), text)


def _loss(values: dict[str, Any]) -> float | None:
    """Upper end of the quality loss in percent, or the loss where it has no interval."""
    return next((float(values[name]) for name in QUALITY if known(values.get(name))), None)


def _text(
    found: Comparisons,
    best: str,
    row: Any,
    within: list[str],
    alike: list[str],
    without: int,
    limit: float,
) -> str:
    beside = [f"of {len(alike)} that cannot be told apart it loses least"] if len(alike) > 1 else []
    beside += [f"{len(within)} of {len(found.rows)} configurations within {limit:g} % of quality loss"]
    beside += [f"{without} of unknown loss"] if without else []
    beside += [f"{found.refused['configuration'].nunique()} refused"] if len(found.refused) else []
    beside += [f"{len(found.failures)} not finished"] if len(found.failures) else []
    beside += [DRIFT] if found.baseline.repeats == 1 else []
    tail = f" ({'; '.join(beside)})."
    if best == found.baseline.label:
        floor = f"the noise and the threshold of {found.threshold_percent:g} %"
        return f"Keep {best}: nothing within the limit is better by {found.by} than {floor}{tail}"
    timed = found.by.endswith("_ms")
    interval = "" if row["low"] != row["low"] else f", 95 % interval {row['low']:.2f} to {row['high']:.2f}"
    how = "times as fast as" if timed else f"times as good by {found.by} as"
    gain = row.get("ratio", float("nan"))
    said = (
        f"Use {best}: {gain:.2f} {how} {found.baseline.label}{interval} (noise {row['noise_percent']:.1f} %)"
    )
    results = found.row(best).results
    if known(loss := results.get(QUALITY[1])):
        ends = [results.get(f"quality_loss_{end}_percent") for end in ("low", "high")]
        span = f" ({_signed(ends[0])} to {_signed(ends[1])})" if all(map(known, ends)) else ""
        said += f", quality loss {_signed(loss)} %{span}"
    return f"{said}{tail}"


def _signed(percent: float) -> str:
    return f"{round(percent, 2) + 0.0:+.2f}"
