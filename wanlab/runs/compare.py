"""Rows compared with a baseline: which one it is, ratio, interval, noise, verdict, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pandas as pd

from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.measure.timing import NOT_DISTINGUISHABLE, Samples, verdict_of
from wanlab.measure.timing import compare as compare_samples
from wanlab.runs.result import differences, fields
from wanlab.runs.results import (
    TIMED,
    MeasuredConfiguration,
    MeasuredConfigurations,
    better,
    configurations,
    is_ratio,
    is_time,
    known,
    number,
    resolve,
    shown,
)

Row = TypeVar("Row")
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
    asked: dict[str, str] = {}
    for given in [text] if isinstance(text, str) else text:
        for part in PART.split(given):
            name, equals, value = part.partition("=")
            if not equals:
                raise WanlabError(f"baseline {part!r} is not NAME=VALUE, such as plan=default")
            asked[name.strip().removeprefix("p.")] = value.strip()
    return asked


def find_baseline(
    measured: MeasuredConfigurations, wanted: str | Sequence[str] | Mapping[str, Any] | None
) -> MeasuredConfiguration:
    """The one configuration with these parameters; without any, the sweep's own baseline, else the first.

    Raises:
        WanlabError: an unknown parameter or value, none that fits or several, or nothing finished.
    """
    if not measured.rows:
        failed = f": {len(measured.failures)} did not finish" if len(measured.failures) else ""
        raise WanlabError(f"no finished run in {measured.where}{failed}; see `wanlab runs`")
    asked = parse_baseline(wanted if wanted is not None else measured.sweep.get("baseline"))
    if not asked:
        return measured.rows[0]
    words = ", ".join(f"{name}={value}" for name, value in asked.items())
    names = dict.fromkeys(name for row in measured.rows for name in row.parameters)
    for name, value in asked.items():
        if name not in names:
            raise WanlabError(f"baseline {words}: no parameter {name!r}{did_you_mean(name, names)}")
        values = dict.fromkeys(shown(row.parameters[name]) for row in measured.rows if name in row.parameters)
        if value not in values:
            failed = measured.failures["configuration"].str.contains(f"{name}={value}", regex=False).any()
            more = "; that run did not finish" if failed else did_you_mean(value, values)
            some = ", ".join(list(values)[:8])
            raise WanlabError(f"baseline {words}: no run has {name}={value}{more}; {name} is {some}")
    fitting = [row for row in measured.rows if has_parameters(row.parameters, asked)]
    if not fitting:
        raise WanlabError(f"baseline {words}: no finished run has all of it")
    if len(fitting) > 1:
        labels = "; ".join(row.label for row in fitting[:4])
        more = f"; and {len(fitting) - 4} more" if len(fitting) > 4 else ""
        raise WanlabError(f"baseline {words} fits {len(fitting)} configurations, name one: {labels}{more}")
    return fitting[0]


def has_parameters(parameters: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether a row has all the parameters of a baseline, in words: 4 and "4" are the same."""
    return all(
        name in parameters and shown(parameters[name]) == shown(value) for name, value in asked.items()
    )


def baselines(
    rows: Iterable[Row], candidates: Iterable[Row], *keys: Callable[[Row], Hashable]
) -> list[Row | None]:
    """For each row its baseline among the candidates: the first that agrees with it in the keys that a baseline leaves open.

    Args:
        keys: the first that finds one counts; the later are less strict.
    """
    by_key: list[dict[Hashable, Row]] = [{} for _ in keys]
    for candidate in candidates:
        for by, key in zip(by_key, keys, strict=True):
            by.setdefault(key(candidate), candidate)
    return [
        next((by[key(row)] for by, key in zip(by_key, keys, strict=True) if key(row) in by), None)
        for row in rows
    ]


THRESHOLD_PERCENT = 3.0
"""Smaller changes are reported as not distinguishable, whatever the samples say."""

SHOWN = (
    "time_per_video_ms",
    "peak_memory_gib",
    "load_ms",
    "weights_gib",
    "divergence_lpips",
    "quality_loss_percent",
)
"""Figures that are shown when nobody says which."""

MOST_SHOWN = 8
SAME = NOT_DISTINGUISHABLE
BASELINE = "baseline"
RESAMPLES = 10_000
REFUSED_COLUMNS = ("configuration", "field", "value", "baseline", "reason")


@dataclass(frozen=True, eq=False)
class Comparisons:
    """Configurations beside their baseline.

    Attributes:
        baseline: the configuration that the others are compared with.
        by: the figure that is compared. rows: the configurations that did the baseline's work, the baseline first.
        frame: one row each: configuration, the axes, `by`, ratio (above 1 is better; of percentages, decibels and LPIPS
            difference instead), low, high (its 95 % interval; NaN where there are no samples), noise_percent, verdict, then
            the other figures, each with `<figure>_ratio` or `<figure>_difference`, and effect where it was recorded.
        refused: a row per difference: configuration, field, value, baseline, reason.
        failures: runs that did not finish.
        axes: parameters that vary. shown: figures of the frame. threshold_percent: declared.
    """

    baseline: MeasuredConfiguration
    by: str
    rows: tuple[MeasuredConfiguration, ...]
    frame: pd.DataFrame
    refused: pd.DataFrame
    failures: pd.DataFrame
    axes: tuple[str, ...]
    shown: tuple[str, ...]
    threshold_percent: float

    def row(self, label: str) -> MeasuredConfiguration:
        """The configuration of a label."""
        return next(row for row in self.rows if row.label == label)

    def verdict(self, first: MeasuredConfiguration, second: MeasuredConfiguration) -> str:
        """The second compared with the first, as the others are with the baseline."""
        return ratio_to(first, second, self.by, self.threshold_percent).verdict

    def noise_percent(self, *rows: MeasuredConfiguration) -> float:
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
    """Compare configurations with a baseline.

    Times are compared over all samples (`measure.compare`): the ratio of medians with its 95 % bootstrap interval. An effect
    whose interval holds 1, or which is within the threshold or the A/A noise of either side, reads "not distinguishable".
    What differs from the baseline in model, weights, resolution, frames, steps, guidance, seed or machine is refused, with
    the field and both values, unless `allow` names it.

    Args:
        runs: as `configurations` takes them.
        baseline: `"plan=default"`, `{"plan": "default"}`, ...; None takes the sweep's own, else the first run.
        by: a recorded number; None takes the time per video, else the first that all runs have.
        allow: fields that may differ, e.g. `("steps",)`; see `runs.differences`. A dtype that the runs vary may.
        threshold_percent: the smallest effect that counts.
        show: other numbers in the table; None takes the sweep's, else the usual ones.
        seed: of the bootstrap.

    Raises:
        WanlabError: no runs, a baseline that fits none or several, an unknown column or field.
    """
    measured = configurations(runs)
    if not (math.isfinite(threshold_percent) and threshold_percent >= 0):
        raise WanlabError(f"threshold_percent is {threshold_percent}; give a percentage, 0 or more")
    fields(allow)
    base = find_baseline(measured, baseline)
    by = _by(measured, by)
    if not known(base.results.get(by)):
        raise WanlabError(f"the baseline {base.label} has no {by}; name another with by= or baseline=")
    kept, refused = [base], []
    for row in measured.rows:
        if row is base:
            continue
        reasons = _reasons(row, base, by, [*allow, *(["dtype"] if "dtype" in measured.axes else [])])
        refused += [(row.label, *reason) for reason in reasons]
        if not reasons:
            kept.append(row)
    shown_columns = _shown(measured, by, show)
    return Comparisons(
        baseline=base,
        by=by,
        rows=tuple(kept),
        frame=_frame(kept, by, measured.axes, shown_columns, threshold_percent, seed),
        refused=_refused(refused),
        failures=measured.failures,
        axes=measured.axes,
        shown=shown_columns,
        threshold_percent=threshold_percent,
    )


def _by(measured: MeasuredConfigurations, by: str | None) -> str:
    if by is not None:
        return resolve(by, measured.columns)
    for name in (*TIMED, *measured.columns):
        if name in measured.columns:
            return name
    raise WanlabError(f"the runs in {measured.where} recorded no number to compare by")


def _shown(measured: MeasuredConfigurations, by: str, show: Sequence[str] | None) -> tuple[str, ...]:
    if show is None:
        asked = [str(name) for name in measured.sweep.get("show") or ()]
        show = [name for name in asked if name in measured.columns]
        show = show or [name for name in SHOWN if name in measured.columns]
        show = show or [name for name in measured.columns if name not in measured.axes][:MOST_SHOWN]
    return tuple(dict.fromkeys([by, *(resolve(name, measured.columns) for name in show)]))


def _reasons(
    row: MeasuredConfiguration, base: MeasuredConfiguration, by: str, allow: Sequence[str]
) -> list[tuple]:
    reasons = [
        (name, shown(value), shown(other), f"{name} is {shown(value)}, the baseline's {shown(other)}")
        for name, value, other in differences(row, base, allow)
    ]
    if not known(row.results.get(by)):
        reasons.append((by, "none", shown(base.results[by]), f"it recorded no {by}"))
    return reasons


def _refused(rows: list[tuple]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(REFUSED_COLUMNS))


def _frame(
    rows: Sequence[MeasuredConfiguration],
    by: str,
    axes: Sequence[str],
    columns: Sequence[str],
    threshold_percent: float,
    seed: int,
) -> pd.DataFrame:
    base = rows[0]
    resamples = resamples_of(len(rows))
    ratios = [ratio_to(base, row, by, threshold_percent, resamples=resamples, seed=seed) for row in rows]
    data: dict[str, list] = {"configuration": [row.label for row in rows]}
    data |= {axis: [row.parameters.get(axis) for row in rows] for axis in axes}
    data["repeats"] = [row.repeats for row in rows]
    data[by] = [number(row.results.get(by)) for row in rows]
    gain = "ratio" if is_ratio(by) else "difference"
    data |= {gain: [each.value for each in ratios]}
    data |= {
        name: [getattr(each, name) for each in ratios] for name in ("low", "high", "noise_percent", "verdict")
    }
    for name in columns:
        if name == by:
            continue
        values = [number(row.results.get(name)) for row in rows]
        data[name] = values
        if is_ratio(name):
            data[f"{name}_ratio"] = [times_better(name, value, values[0]) for value in values]
        else:
            data[f"{name}_difference"] = [value - values[0] for value in values]
    if any("effect" in row.results for row in rows):
        data["effect"] = [str(row.results.get("effect", "")) for row in rows]
    return pd.DataFrame(data)


class Measured(Protocol):
    """What a ratio is taken of: a `Result`, or all repeats of one configuration."""

    @property
    def results(self) -> Mapping[str, Any]: ...

    @property
    def samples(self) -> Samples | None: ...

    @property
    def noise_percent(self) -> float | None: ...


@dataclass(frozen=True)
class Ratio:
    """One figure beside its baseline's.

    Attributes:
        value: how many times better, above 1 is better; the difference of what is subtracted (percentages, decibels, LPIPS).
        low, high: its 95 % interval; NaN without samples.
        noise_percent: that an effect must exceed; NaN for a difference.
        verdict: "faster", "slower", "better", "worse", "not distinguishable", "baseline", or "" where nothing can be words.
    """

    value: float
    low: float
    high: float
    noise_percent: float
    verdict: str


def ratio_to(
    base: Measured,
    row: Measured,
    by: str,
    threshold_percent: float = 0.0,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ratio:
    """A row's figure compared with its baseline's: the only rule of ratios, intervals and verdicts.

    Times are compared over all samples. Whether the two did the same work is asked before, by `differences`.
    """
    mine, theirs = number(row.results.get(by)), number(base.results.get(by))
    noises = [each.noise_percent or 0.0 for each in (base, row)] if is_time(by) else []
    noise = max([threshold_percent, *noises])
    if row is base:
        return Ratio(1.0 if is_ratio(by) else 0.0, math.nan, math.nan, noise, BASELINE)
    if is_time(by) and base.samples is not None and row.samples is not None:
        timed = compare_samples(
            base.samples,
            row.samples,
            noise,
            resamples=resamples,
            seed=seed,
            allow_different_devices=True,  # what may differ was settled before
        )
        return Ratio(timed.speedup, timed.low, timed.high, noise, timed.verdict)
    if not is_ratio(by):
        return Ratio(mine - theirs, math.nan, math.nan, math.nan, _moved(row, base, by))
    gain = times_better(by, mine, theirs)
    if math.isnan(gain):
        return Ratio(gain, math.nan, math.nan, noise, "")
    words = ("faster", "slower") if by.endswith(("_ms", "_s")) else ("better", "worse")
    return Ratio(gain, math.nan, math.nan, noise, verdict_of(gain, noise_percent=noise, words=words))


def resamples_of(rows: int) -> int:
    """Resamples of each row's bootstrap, so that a table of hundreds of rows takes no longer than one of fifty."""
    return max(1_000, min(RESAMPLES, 500_000 // max(rows, 1)))


def times_better(column: str, value: Any, baseline: Any) -> float:
    """How many times better than the baseline, above 1 is better; NaN where there is nothing to divide."""
    top, bottom = (value, baseline) if better(column) == "max" else (baseline, value)
    if not (known(top) and known(bottom)) or bottom == 0 or top == 0:
        return math.nan
    return top / bottom


def _moved(row: Measured, base: Measured, by: str) -> str:
    """Verdict on a figure that is subtracted: only where both sides have intervals, by whether these overlap."""
    stem = by.removesuffix("_percent")
    ends = [each.results.get(f"{stem}_{end}_percent") for each in (row, base) for end in ("low", "high")]
    if not all(known(end) for end in ends):
        return ""
    low, high, base_low, base_high = ends
    if low <= base_high and base_low <= high:
        return SAME
    return "better" if (low > base_high) == (better(by) == "max") else "worse"
