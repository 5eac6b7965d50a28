"""Configurations compared with a baseline: its choice, ratio, interval, noise and verdict, and refused rows."""

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
from wanlab.runs.results import (
    TIMED,
    MeasuredConfiguration,
    MeasuredConfigurations,
    better,
    configurations,
    is_number,
    is_ratio,
    is_time,
    number,
    parameter_text,
    resolve,
)
from wanlab.runs.same_work import differences, fields, load_text

Row = TypeVar("Row")
PART = re.compile(r",\s*(?=[A-Za-z_]\w*\s*=)")


def parse_baseline(text: str | Sequence[str] | Mapping[str, Any] | None) -> dict[str, str]:
    """Parameter -> value as text, from `"engine=eager,plan=default"`, several such texts, or a mapping.

    Raises:
        WanlabError: a part without "=".
    """
    if text is None:
        return {}
    if isinstance(text, Mapping):
        return {str(name): parameter_text(value) for name, value in text.items()}
    parameters: dict[str, str] = {}
    for part in (part for each in ([text] if isinstance(text, str) else text) for part in PART.split(each)):
        name, equals, value = part.partition("=")
        if not equals:
            raise WanlabError(f"baseline {part!r} is not NAME=VALUE, such as plan=default")
        parameters[name.strip().removeprefix("p.")] = value.strip()
    return parameters


def find_baseline(
    measured: MeasuredConfigurations, baseline: str | Sequence[str] | Mapping[str, Any] | None
) -> MeasuredConfiguration:
    """The one configuration with these parameters; without parameters the sweep's own baseline, else the first.

    Raises:
        WanlabError: an unknown parameter or value, no or several configurations with them, or no finished run.
    """
    if not measured.rows:
        unfinished = f": {len(measured.failures)} did not finish" if len(measured.failures) else ""
        raise WanlabError(f"no finished run in {measured.where}{unfinished}; see `wanlab runs`")
    parameters = parse_baseline(baseline if baseline is not None else measured.sweep.get("baseline"))
    if not parameters:
        return measured.rows[0]
    words = ", ".join(f"{name}={value}" for name, value in parameters.items())
    names = dict.fromkeys(name for row in measured.rows for name in row.parameters)
    for name, value in parameters.items():
        if name not in names:
            raise WanlabError(f"baseline {words}: no parameter {name!r}{did_you_mean(name, names)}")
        values = dict.fromkeys(
            parameter_text(row.parameters[name]) for row in measured.rows if name in row.parameters
        )
        if value not in values:
            failures = measured.failures
            failed = failures[failures["configuration"].str.contains(f"{name}={value}", regex=False)]
            more = f"; {_why(failed)}" if len(failed) else did_you_mean(value, values)
            some = ", ".join(list(values)[:8])
            raise WanlabError(f"baseline {words}: no run has {name}={value}{more}; {name} is {some}")
    fitting = [row for row in measured.rows if has_parameters(row.parameters, parameters)]
    if not fitting:
        raise WanlabError(f"baseline {words}: no finished run has all of it")
    if len(fitting) > 1:
        labels = "; ".join(row.label for row in fitting[:4])
        more = f"; and {len(fitting) - 4} more" if len(fitting) > 4 else ""
        raise WanlabError(f"baseline {words} fits {len(fitting)} configurations, name one: {labels}{more}")
    return fitting[0]


def _why(failures: pd.DataFrame) -> str:
    """Why the first of some runs does not count: "that run is changed: run.json was changed after the run ended"."""
    state, reason = failures[["state", "reason"]].iloc[0]
    return f"that run {'is' if state in ('changed', 'unreadable') else 'did not finish:'} {state}" + (
        f" ({reason})" if reason else ""
    )


def has_parameters(parameters: Mapping[str, Any], baseline: Mapping[str, Any]) -> bool:
    """Whether a row has all the parameters of a baseline, compared as text: 4 and "4" are the same."""
    return all(
        name in parameters and parameter_text(parameters[name]) == parameter_text(value)
        for name, value in baseline.items()
    )


def baselines(
    rows: Iterable[Row], candidates: Iterable[Row], *keys: Callable[[Row], Hashable]
) -> list[Row | None]:
    """For each row its baseline: the first candidate with the same key; None without one.

    Args:
        keys: functions of a row; a later one is less strict, and counts where no candidate has the same earlier key.
    """
    first: dict[tuple[int, Hashable], Row] = {}
    for candidate in candidates:
        for level, key in enumerate(keys):
            first.setdefault((level, key(candidate)), candidate)
    return [
        next((first[at] for level, key in enumerate(keys) if (at := (level, key(row))) in first), None)
        for row in rows
    ]


THRESHOLD_PERCENT = 3.0
"""Smaller changes are reported as not distinguishable, even where the samples distinguish them."""

SHOWN = (
    "time_per_video_ms",
    "peak_memory_gib",
    "load_ms",
    "weights_gib",
    "divergence_lpips",
    "quality_loss_percent",
)
"""Figures that are shown where neither the caller nor the sweep names any."""

MOST_SHOWN = 8
SAME = NOT_DISTINGUISHABLE
BASELINE = "baseline"
RESAMPLES = 10_000
REFUSED_COLUMNS = ("configuration", "field", "value", "baseline", "reason")


@dataclass(frozen=True, eq=False)
class Comparisons:
    """Configurations compared with their baseline.

    Attributes:
        baseline: the configuration that the others are compared with.
        by: name of the compared figure.
        rows: the configurations that did the baseline's work, the baseline first.
        ratios: label -> `by` of that configuration compared with the baseline's.
        frame: one row per configuration: configuration, the axes, `by`, ratio (above 1 is better; a difference for
            percentages, decibels and LPIPS), low, high (its 95 % interval; NaN where it is unknown), noise_percent, verdict,
            then the other figures, each with `<figure>_ratio` or `<figure>_difference`, and effect where it was recorded.
        refused: a row per difference: configuration, field, value, baseline, reason.
        failures: runs that did not finish.
        axes: parameters that vary.
        shown: figures of the frame.
        threshold_percent: smallest effect that counts.
        cautions: sentences about times that were taken on a busy machine.
        notes: what the runs said of their weights and settings, with the configurations that said it unless all did.
    """

    baseline: MeasuredConfiguration
    by: str
    rows: tuple[MeasuredConfiguration, ...]
    ratios: dict[str, Ratio]
    frame: pd.DataFrame
    refused: pd.DataFrame
    failures: pd.DataFrame
    axes: tuple[str, ...]
    shown: tuple[str, ...]
    threshold_percent: float
    cautions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Where it was measured, as a sentence, and the load of the machine where it matters for the times."""
        cautions = "".join(f"; {caution}" for caution in self.cautions)
        return f"Measured on {self.baseline.machine.name}{cautions}."

    def row(self, label: str) -> MeasuredConfiguration:
        """The configuration of a label."""
        return next(row for row in self.rows if row.label == label)

    def verdict(self, first: MeasuredConfiguration, second: MeasuredConfiguration) -> str:
        """Verdict on the second compared with the first, by the rule of all comparisons here."""
        return ratio_to(first, second, self.by, self.threshold_percent).verdict

    def moved(self, row: MeasuredConfiguration) -> list[str]:
        """Axes on which a configuration has another value than the baseline."""
        base = self.baseline.parameters
        return [axis for axis in self.axes if row.parameters.get(axis) != base.get(axis)]

    def noise_percent(self, *rows: MeasuredConfiguration) -> float:
        """What an effect must exceed: the largest of the threshold and the noise of the baseline and of these rows."""
        return max(self.threshold_percent, *(row.noise_percent or 0.0 for row in (self.baseline, *rows)))


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
    whose interval includes 1, or which is within the threshold or the A/A noise of either side, is "not distinguishable".
    A configuration that differs from the baseline in a field of `runs.differences` is refused, with the field and both
    values, unless `allow` names the field.

    Args:
        runs: runs as `configurations` takes them.
        baseline: parameters of the baseline, `"plan=default"` or `{"plan": "default"}`; None takes the sweep's own, else
            the first run.
        by: name of a recorded number; None takes the time per video, else the number that most runs have.
        allow: fields that may differ, e.g. `("steps",)`. The dtype may always differ where the runs vary it.
        threshold_percent: smallest effect that counts.
        show: names of other numbers in the table; None takes the sweep's, else `SHOWN`.
        seed: seed of the bootstrap.

    Raises:
        WanlabError: no runs, no or several runs with the baseline's parameters, an unknown column or field.
    """
    measured = configurations(runs)
    if not (math.isfinite(threshold_percent) and threshold_percent >= 0):
        raise WanlabError(f"threshold_percent is {threshold_percent}; give a percentage, 0 or more")
    fields(allow)
    base = find_baseline(measured, baseline)
    by = _by(measured, by)
    if not is_number(base.results.get(by)):
        raise WanlabError(f"the baseline {base.label} has no {by}; name another with by= or baseline=")
    allow = [*allow, *(["dtype"] if "dtype" in measured.axes else [])]
    rows, refused = [base], []
    for row in measured.rows:
        if row is not base:
            reasons = _reasons(row, base, by, allow)
            refused += [(row.label, *reason) for reason in reasons]
            rows += [] if reasons else [row]
    resamples = resamples_of(len(rows))
    ratios = {
        row.label: ratio_to(base, row, by, threshold_percent, resamples=resamples, seed=seed) for row in rows
    }
    columns = _shown(measured, by, show)
    return Comparisons(
        baseline=base,
        by=by,
        rows=tuple(rows),
        ratios=ratios,
        frame=_frame(rows, ratios, by, measured.axes, columns),
        refused=pd.DataFrame(refused, columns=list(REFUSED_COLUMNS)),
        failures=measured.failures,
        axes=measured.axes,
        shown=columns,
        threshold_percent=threshold_percent,
        cautions=tuple(cautions(rows, measured.sweep)),
        notes=tuple(_notes(rows)),
    )


def cautions(rows: Sequence[MeasuredConfiguration], sweep: Mapping[str, Any]) -> list[str]:
    """Clauses about times that other work disturbed: the load that was measured, and runs that shared the machine."""
    loaded = [row for row in rows if row.load]
    busy = [f"{row.label} was timed while {row.load}" for row in loaded]
    if len(loaded) > 1:
        most = load_text(run.result for row in loaded for run in row.runs)
        busy = [f"{len(loaded)} of {len(rows)} configurations were timed beside other work: at most {most}"]
    executor = sweep.get("executor") or {}
    listed = sweep.get("runs") or () if executor.get("slots", 1) > 1 else ()
    together = {str(run.get("run_id")) for run in listed if run.get("machine") == "shared"}
    shared = sum(any(str(run.row["run_id"]) in together for run in row.runs) for row in rows)
    words = f"{shared} of {len(rows)} configurations shared the machine with other runs (`machine: alone` prevents it)"
    return busy + ([words] if shared else [])


def _notes(rows: Sequence[MeasuredConfiguration]) -> list[str]:
    """Notes of the compared runs, each once, with the configurations that have it where not all do."""
    said: dict[str, dict[str, None]] = {}
    for row in rows:
        for note in (note for run in row.runs if run.result for note in run.result.notes):
            said.setdefault(note, {})[row.label] = None
    return [
        note if len(labels) == len(rows) else f"{', '.join(labels)}: {note}" for note, labels in said.items()
    ]


def _by(measured: MeasuredConfigurations, by: str | None) -> str:
    if by is not None:
        return resolve(by, measured.columns)
    for name in (*TIMED, *measured.columns):
        if name in measured.columns:
            return name
    raise WanlabError(f"the runs in {measured.where} recorded no number to compare by")


def _shown(measured: MeasuredConfigurations, by: str, show: Sequence[str] | None) -> tuple[str, ...]:
    if show is None:
        of_sweep = map(str, measured.sweep.get("show") or ())
        show = [name for name in of_sweep if name in measured.columns]
        show = show or [name for name in SHOWN if name in measured.columns]
        show = show or [name for name in measured.columns if name not in measured.axes][:MOST_SHOWN]
    return tuple(dict.fromkeys([by, *(resolve(name, measured.columns) for name in show)]))


def _reasons(
    row: MeasuredConfiguration, base: MeasuredConfiguration, by: str, allow: Sequence[str]
) -> list[tuple]:
    reasons = [
        (name, text, base_text, f"{name} is {text}, the baseline's {base_text}")
        for name, *values in differences(row, base, allow)
        for text, base_text in [map(parameter_text, values)]
    ]
    if not is_number(row.results.get(by)):
        reasons.append((by, "none", parameter_text(base.results[by]), f"it recorded no {by}"))
    return reasons


def _frame(
    rows: Sequence[MeasuredConfiguration],
    ratios: Mapping[str, Ratio],
    by: str,
    axes: Sequence[str],
    columns: Sequence[str],
) -> pd.DataFrame:
    data: dict[str, list] = {"configuration": [row.label for row in rows]}
    # A parameter `configuration` stands in the label, which this column keeps.
    data |= {axis: [row.parameters.get(axis) for row in rows] for axis in axes if axis != "configuration"}
    data["repeats"] = [row.repeats for row in rows]
    data[by] = [number(row.results.get(by)) for row in rows]
    data[gain_of(by)] = [ratio.value for ratio in ratios.values()]
    for name in ("low", "high", "noise_percent", "verdict"):
        data[name] = [getattr(ratio, name) for ratio in ratios.values()]
    for name in columns:
        if name != by:
            data[name] = values = [number(row.results.get(name)) for row in rows]
            data[f"{name}_{gain_of(name)}"] = [gain(name, value, values[0]) for value in values]
    if any("effect" in row.results for row in rows):
        data["effect"] = [str(row.results.get("effect", "")) for row in rows]
    return pd.DataFrame(data)


class Measured(Protocol):
    """What `ratio_to` compares: a `Result`, or all repeats of one configuration."""

    @property
    def results(self) -> Mapping[str, Any]: ...

    @property
    def samples(self) -> Samples | None: ...

    @property
    def noise_percent(self) -> float | None: ...


@dataclass(frozen=True)
class Ratio:
    """One figure compared with its baseline's.

    Attributes:
        value: ratio, above 1 is better; for percentages, decibels and LPIPS the difference.
        low, high: its 95 % interval; NaN where it is unknown.
        noise_percent: noise that an effect must exceed; NaN for a difference.
        verdict: "faster", "slower", "better", "worse", "not distinguishable", "baseline", or "" where none can be given.
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

    Times are compared over all samples. The caller checks with `differences` that both did the same work.
    """
    value, base_value = number(row.results.get(by)), number(base.results.get(by))
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
            allow_different_devices=True,  # `differences` has decided what may differ
        )
        return Ratio(timed.speedup, timed.low, timed.high, noise, timed.verdict)
    if not is_ratio(by):
        return Ratio(value - base_value, math.nan, math.nan, math.nan, _difference_verdict(row, base, by))
    ratio = times_better(by, value, base_value)
    words = ("faster", "slower") if by.endswith(("_ms", "_s")) else ("better", "worse")
    verdict = "" if math.isnan(ratio) else verdict_of(ratio, noise_percent=noise, words=words)
    return Ratio(ratio, math.nan, math.nan, noise, verdict)


def resamples_of(rows: int) -> int:
    """Resamples of each row's bootstrap: fewer for many rows, so that hundreds take no longer than fifty."""
    return max(1_000, min(RESAMPLES, 500_000 // max(rows, 1)))


def gain_of(column: str) -> str:
    """How a figure is compared: `"ratio"` or `"difference"`."""
    return "ratio" if is_ratio(column) else "difference"


def gain(column: str, value: float, baseline: float) -> float:
    """Ratio or difference of two values of a figure, as `gain_of` says."""
    return times_better(column, value, baseline) if is_ratio(column) else value - baseline


def times_better(column: str, value: Any, baseline: Any) -> float:
    """Ratio to the baseline, above 1 is better; NaN where a value is missing or 0."""
    top, bottom = (value, baseline) if better(column) == "max" else (baseline, value)
    return top / bottom if is_number(top) and is_number(bottom) and top and bottom else math.nan


def _difference_verdict(row: Measured, base: Measured, by: str) -> str:
    """Verdict on a figure that is subtracted: "" unless both sides have intervals; else by whether these overlap."""
    stem = by.removesuffix("_percent")
    ends = [each.results.get(f"{stem}_{end}_percent") for each in (row, base) for end in ("low", "high")]
    if not all(map(is_number, ends)):
        return ""
    low, high, base_low, base_high = ends
    if low <= base_high and base_low <= high:
        return SAME
    return "better" if (low > base_high) == (better(by) == "max") else "worse"
