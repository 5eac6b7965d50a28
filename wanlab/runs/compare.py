"""Configurations of runs held against a baseline: ratio, interval, noise, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.measure.timing import compare as compare_samples
from wanlab.runs.results import (
    MOST_SHOWN,
    SHOWN,
    TIMED,
    Configuration,
    Configurations,
    better,
    configurations,
    differences,
    fields,
    is_ratio,
    known,
    number,
    ratio,
    resolve,
    shown,
)

PART = re.compile(r",\s*(?=[A-Za-z_]\w*\s*=)")


def parse_baseline(text: str | Sequence[str] | Mapping[str, Any] | None) -> dict[str, str]:
    """`"engine=eager,plan=default"`, several such, or a mapping, as parameter -> value in words.

    Raises:
        WanlabError: a part without "=".
    """
    if text is None:
        return {}
    if isinstance(text, Mapping):
        return {str(name): shown(value) for name, value in text.items()}
    wanted: dict[str, str] = {}
    for given in [text] if isinstance(text, str) else text:
        for part in PART.split(given):
            name, equals, value = part.partition("=")
            if not equals:
                raise WanlabError(f"baseline {part!r} is not NAME=VALUE, such as plan=default")
            wanted[name.strip().removeprefix("p.")] = value.strip()
    return wanted


def find_baseline(
    found: Configurations, wanted: str | Sequence[str] | Mapping[str, Any] | None
) -> Configuration:
    """The one configuration with these parameters; without any, the sweep's own baseline, else the first.

    Raises:
        WanlabError: an unknown parameter or value, none that fits or several, or nothing finished.
    """
    if not found.rows:
        failed = f": {len(found.failures)} did not finish" if len(found.failures) else ""
        raise WanlabError(f"no finished run in {found.where}{failed}; see `wanlab runs`")
    asked = parse_baseline(wanted if wanted is not None else found.sweep.get("baseline"))
    if not asked:
        return found.rows[0]
    said = ", ".join(f"{name}={value}" for name, value in asked.items())
    names = dict.fromkeys(name for row in found.rows for name in row.parameters)
    for name, value in asked.items():
        if name not in names:
            raise WanlabError(f"baseline {said}: no parameter {name!r}{did_you_mean(name, names)}")
        there = dict.fromkeys(shown(row.parameters[name]) for row in found.rows if name in row.parameters)
        if value not in there:
            failed = found.failures["configuration"].str.contains(f"{name}={value}", regex=False).any()
            more = "; that run did not finish" if failed else did_you_mean(value, there)
            some = ", ".join(list(there)[:8])
            raise WanlabError(f"baseline {said}: no run has {name}={value}{more}; {name} is {some}")
    fitting = [row for row in found.rows if _fits(row, asked)]
    if not fitting:
        raise WanlabError(f"baseline {said}: no finished run has all of it")
    if len(fitting) > 1:
        labels = "; ".join(row.label for row in fitting[:4])
        more = f"; and {len(fitting) - 4} more" if len(fitting) > 4 else ""
        raise WanlabError(f"baseline {said} fits {len(fitting)} configurations, name one: {labels}{more}")
    return fitting[0]


def _fits(row: Configuration, asked: Mapping[str, str]) -> bool:
    return all(
        name in row.parameters and shown(row.parameters[name]) == value for name, value in asked.items()
    )


THRESHOLD_PERCENT = 3.0
"""Effects within this are not told as effects, whatever the samples say."""

SAME = "not distinguishable"
BASELINE = "baseline"
RESAMPLES = 10_000  # of a bootstrap; fewer each where there are hundreds of rows
REFUSED_COLUMNS = ("configuration", "field", "value", "baseline", "reason")


@dataclass(frozen=True, eq=False)
class Comparisons:
    """Configurations beside their baseline.

    Attributes:
        baseline: the configuration that the others are held against.
        by: the figure that is compared. rows: the configurations that did the baseline's work, the baseline first.
        frame: one row each: configuration, the axes, `by`, ratio (above 1 is better; of percentages, decibels and LPIPS
            difference instead), low, high (its 95 % interval; NaN where there are no samples), noise_percent, verdict, then
            the other figures, each with `<figure>_ratio` or `<figure>_difference`, and effect where it was recorded.
        refused: a row per difference: configuration, field, value, baseline, reason.
        failures: runs that did not finish.
        axes: parameters that vary. shown: figures of the frame. threshold_percent: declared.
    """

    baseline: Configuration
    by: str
    rows: tuple[Configuration, ...]
    frame: pd.DataFrame
    refused: pd.DataFrame
    failures: pd.DataFrame
    axes: tuple[str, ...]
    shown: tuple[str, ...]
    threshold_percent: float

    def row(self, label: str) -> Configuration:
        """The configuration of a label."""
        return next(row for row in self.rows if row.label == label)

    def verdict(self, first: Configuration, second: Configuration) -> str:
        """The second held against the first, as the others are against the baseline."""
        return _held(first, second, self.by, self.threshold_percent, RESAMPLES, 0)[-1]

    def noise_percent(self, *rows: Configuration) -> float:
        """What an effect must exceed: the threshold, or the noise of the baseline and of these, where that is more."""
        known_noise = [row.noise_percent for row in (self.baseline, *rows) if row.noise_percent is not None]
        return max([self.threshold_percent, *known_noise])


def compare(
    runs: Any,
    *,
    baseline: str | Sequence[str] | Mapping[str, Any] | None = None,
    by: str | None = None,
    allow: Sequence[str] = (),
    threshold_percent: float = THRESHOLD_PERCENT,
    show: Sequence[str] | None = None,
    seed: int = 0,
) -> Comparisons:
    """Hold configurations against a baseline.

    Times are compared over all samples (`measure.compare`): the ratio of medians with its 95 % bootstrap interval. An effect
    whose interval holds 1, or which is within the threshold or the A/A noise of either side, reads "not distinguishable".
    What differs from the baseline in model, weights, resolution, frames, steps, guidance, seed or machine is refused, with
    the field and both values, unless `allow` names it.

    Args:
        runs: as `configurations` takes them.
        baseline: `"plan=default"`, `{"plan": "default"}`, ...; None takes the sweep's own, else the first run.
        by: a recorded number; None takes the time per video, else the first that all runs have.
        allow: fields that may differ, e.g. `("steps",)`; see `same_work`.
        threshold_percent: the smallest effect that counts.
        show: other numbers in the table; None takes the sweep's, else the usual ones.
        seed: of the bootstrap.

    Raises:
        WanlabError: no runs, a baseline that fits none or several, an unknown column or field.
    """
    found = configurations(runs)
    if not (math.isfinite(threshold_percent) and threshold_percent >= 0):
        raise WanlabError(f"threshold_percent is {threshold_percent}; give a percentage, 0 or more")
    fields(allow)
    base = find_baseline(found, baseline)
    by = _by(found, by)
    if not known(base.results.get(by)):
        raise WanlabError(f"the baseline {base.label} has no {by}; name another with by= or baseline=")
    kept, refused = [base], []
    for row in found.rows:
        if row is base:
            continue
        reasons = _reasons(row, base, by, allow)
        refused += [(row.label, *reason) for reason in reasons]
        if not reasons:
            kept.append(row)
    shown_columns = _shown(found, by, show)
    return Comparisons(
        baseline=base,
        by=by,
        rows=tuple(kept),
        frame=_frame(kept, by, found.axes, shown_columns, threshold_percent, seed),
        refused=_refused(refused),
        failures=found.failures,
        axes=found.axes,
        shown=shown_columns,
        threshold_percent=threshold_percent,
    )


def _by(found: Configurations, by: str | None) -> str:
    if by is not None:
        return resolve(by, found.columns)
    for name in (*TIMED, *found.columns):
        if name in found.columns:
            return name
    raise WanlabError(f"the runs in {found.where} recorded no number to compare by")


def _shown(found: Configurations, by: str, show: Sequence[str] | None) -> tuple[str, ...]:
    if show is None:
        told = [str(name) for name in found.sweep.get("show") or ()]
        show = [name for name in told if name in found.columns]
        show = show or [name for name in SHOWN if name in found.columns]
        show = show or [name for name in found.columns if name not in found.axes][:MOST_SHOWN]
    return tuple(dict.fromkeys([by, *(resolve(name, found.columns) for name in show)]))


def _reasons(row: Configuration, base: Configuration, by: str, allow: Sequence[str]) -> list[tuple]:
    mine, theirs = row.work | row.machine, base.work | base.machine
    reasons = [
        (name, shown(value), shown(other), f"{name} is {shown(value)}, the baseline's {shown(other)}")
        for name, value, other in differences(mine, theirs, allow)
    ]
    if not known(row.results.get(by)):
        reasons.append((by, "none", shown(base.results[by]), f"it recorded no {by}"))
    return reasons


def _refused(rows: list[tuple]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(REFUSED_COLUMNS))


def _frame(
    rows: Sequence[Configuration],
    by: str,
    axes: Sequence[str],
    columns: Sequence[str],
    threshold_percent: float,
    seed: int,
) -> pd.DataFrame:
    base = rows[0]
    resamples = max(1_000, min(RESAMPLES, 500_000 // len(rows)))
    held = [_held(base, row, by, threshold_percent, resamples, seed) for row in rows]
    data: dict[str, list] = {"configuration": [row.label for row in rows]}
    data |= {axis: [row.parameters.get(axis) for row in rows] for axis in axes}
    data["repeats"] = [row.repeats for row in rows]
    data[by] = [number(row.results.get(by)) for row in rows]
    gain = "ratio" if is_ratio(by) else "difference"
    for index, name in enumerate((gain, "low", "high", "noise_percent", "verdict")):
        data[name] = [each[index] for each in held]
    for name in columns:
        if name == by:
            continue
        values = [number(row.results.get(name)) for row in rows]
        data[name] = values
        if is_ratio(name):
            data[f"{name}_ratio"] = [ratio(name, value, values[0]) for value in values]
        else:
            data[f"{name}_difference"] = [value - values[0] for value in values]
    if any("effect" in row.results for row in rows):
        data["effect"] = [str(row.results.get("effect", "")) for row in rows]
    return pd.DataFrame(data)


def _held(
    base: Configuration, row: Configuration, by: str, threshold_percent: float, resamples: int, seed: int
) -> tuple[float, float, float, float, str]:
    """Ratio or difference, its interval, the noise it was held against, and the verdict."""
    mine, theirs = number(row.results.get(by)), number(base.results[by])
    timed = by.rpartition(".")[2] in TIMED
    noises = [each.noise_percent or 0.0 for each in (base, row)] if timed else []
    noise = max([threshold_percent, *noises])
    if row is base:
        return (1.0 if is_ratio(by) else 0.0), math.nan, math.nan, noise, BASELINE
    if timed and base.samples is not None and row.samples is not None:
        made = compare_samples(
            base.samples,
            row.samples,
            noise,
            resamples=resamples,
            seed=seed,
            allow_different_devices=True,  # what may differ was settled before
        )
        return made.speedup, made.low, made.high, noise, made.verdict
    if not is_ratio(by):
        return mine - theirs, math.nan, math.nan, math.nan, _moved(row, base, by)
    gain = ratio(by, mine, theirs)
    if math.isnan(gain):
        return gain, math.nan, math.nan, noise, ""
    if max(gain, 1 / gain) - 1 <= noise / 100:
        return gain, math.nan, math.nan, noise, SAME
    words = ("faster", "slower") if by.endswith("_ms") or by.endswith("_s") else ("better", "worse")
    return gain, math.nan, math.nan, noise, words[gain < 1]


def _moved(row: Configuration, base: Configuration, by: str) -> str:
    """Of a figure that is subtracted: told only where both sides have intervals, by whether these are apart."""
    stem = by.removesuffix("_percent")
    ends = [each.results.get(f"{stem}_{end}_percent") for each in (row, base) for end in ("low", "high")]
    if not all(known(end) for end in ends):
        return ""
    low, high, base_low, base_high = ends
    if low <= base_high and base_low <= high:
        return SAME
    return "better" if (low > base_high) == (better(by) == "max") else "worse"
