"""Which configuration to use: Pareto efficiency, the fastest within a quality limit, the gain of each technique."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wanlab.core.answer import Answer, Tile, answer, fitting, speed_text, step
from wanlab.core.effects import NOT_APPLIED
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.paths import data, existing, locate
from wanlab.core.stats import LEAST, ends_text, interval_text, percentile_interval, resampled_medians
from wanlab.core.words import capital, counted, shown
from wanlab.engines.registry import engine_text, title_of_label
from wanlab.evaluate.catalogue import NUMERIC_PSNR_DB
from wanlab.measure.timing import verdict_of, verdict_sentence
from wanlab.runs.compare import SAME, Comparisons, gain_of, times_better
from wanlab.runs.platforms import RESULTS
from wanlab.runs.result import BUILT, MEASURED, UNCHANGED, Result
from wanlab.runs.results import (
    MeasuredConfiguration,
    better,
    is_number,
    is_time,
    load_results,
    number,
    parameter_text,
)

SENSES = ("min", "max")


def pareto(frame: pd.DataFrame, goals: Mapping[str, str]) -> pd.Series:
    """Which rows are efficient: no other row is at least as good in every column and better in one.

    Rows that are equal in every column are all efficient or all not. A row without one of the values is not efficient
    and dominates no other.

    Args:
        frame: one row per candidate.
        goals: column -> `"min"` where less is better, `"max"` where more is better.

    Returns:
        Booleans with the frame's index.

    Raises:
        WanlabError: no goal, an unknown column, or another word than `"min"` and `"max"`.
    """
    if not goals:
        raise WanlabError('pareto needs at least one column, e.g. {"time_ms": "min"}')
    for column, sense in goals.items():
        if column not in frame.columns:
            raise WanlabError(f"no column {column!r}{did_you_mean(column, map(str, frame.columns))}")
        if sense not in SENSES:
            raise WanlabError(f'{column} is to be "min" or "max", not {sense!r}')
    costs = np.column_stack(
        [
            pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype=float, na_value=np.nan)
            * (1.0 if sense == "min" else -1.0)
            for column, sense in goals.items()
        ]
    )
    complete = ~np.isnan(costs).any(axis=1)
    rows = costs[complete] + 0.0  # no -0.0, which is another row than 0.0
    # One of equal rows is enough, and in sorted order only an earlier row can dominate a row.
    points, of_row = np.unique(rows, axis=0, return_inverse=True)
    efficient = np.zeros(len(points), dtype=bool)
    best = np.empty((0, points.shape[1]))
    for index, point in enumerate(points):
        if not (best <= point).all(axis=1).any():
            efficient[index] = True
            best = np.vstack([best, point])
    mask = np.zeros(len(frame), dtype=bool)
    mask[complete] = efficient[of_row.reshape(-1)]
    return pd.Series(mask, index=frame.index, name="efficient")


def efficient(frame: pd.DataFrame, goals: Mapping[str, str]) -> pd.Series:
    """`pareto` without the rows whose `effect` is "not applied": they are not the configuration that their name says."""
    real = frame["effect"] != NOT_APPLIED if "effect" in frame else frame.index == frame.index
    return pareto(frame[real], goals).reindex(frame.index, fill_value=False)


def frontier_frame(comparisons: Comparisons, goals: Mapping[str, str]) -> pd.DataFrame:
    """`comparisons.frame` with `efficient` by these goals and the ends of intervals, for `plots.run_frontier`.

    The interval of a time is that of its ratio to the baseline; that of a quality loss is as it was recorded.

    Returns:
        The frame with `<figure>_from` and `<figure>_to` of each goal, NaN where an interval is unknown.
    """
    frame = comparisons.frame.assign(efficient=efficient(comparisons.frame, goals))
    for name in goals:
        if name == comparisons.by and is_time(name):
            first = frame[name].iloc[0]
            frame[f"{name}_from"], frame[f"{name}_to"] = first / frame["high"], first / frame["low"]
            continue
        stem = name.removesuffix("_percent")
        for end, key in (("from", "low"), ("to", "high")):
            frame[f"{name}_{end}"] = [
                number(row.results.get(f"{stem}_{key}_percent")) for row in comparisons.rows
            ]
    return frame


DRIFT = "the baseline was run once, so drift between runs is not known"
QUALITY = ("quality_loss_high_percent", "quality_loss_percent")
DIVERGENCE = ("divergence_lpips", "divergence_floor_lpips")


@dataclass(frozen=True, eq=False)
class Choice:
    """The configuration to use.

    Attributes:
        label: its name; the baseline's where nothing better is within the limit.
        row: its row of the comparison's frame.
        within: labels of the configurations within the limit, the baseline among them.
        alike: of these, those that are not distinguishable from the fastest, the fastest among them; the choice has the
            least quality loss of them.
        text: the answer in one sentence, and a second one that says where it was measured and under which load.
        answer: the same for a reader who knows neither the sweep nor wanlab, with the key figures.
        notes: counts of configurations within the limit, refused and not finished.
    """

    label: str
    row: pd.Series
    within: tuple[str, ...]
    alike: tuple[str, ...]
    text: str
    answer: Answer
    notes: tuple[str, ...]


def choose(comparisons: Comparisons, limit_percent: float = 3.0) -> Choice:
    """The best by the compared figure among those whose quality loss, with its interval, is within a limit.

    Of several that are not distinguishable from the best, a lossless one is chosen, else the one with the least upper end
    of the loss, so that noise does not decide. A configuration that was not applied, or whose loss has no interval, is not
    chosen: a point estimate says nothing of what other cases lose.
    """
    base, by = comparisons.baseline, comparisons.by
    losses = {row.label: _loss(row) for row in comparisons.rows}
    within = [
        row
        for row in comparisons.rows
        if row is base
        or (row.applied and losses[row.label] is not None and losses[row.label] <= limit_percent)
    ]
    ahead = [row for row in within if comparisons.ratios[row.label].verdict in ("faster", "better")]
    alike = []
    if ahead:
        pick = min if better(by) == "min" else max
        first = pick(ahead, key=lambda row: number(row.results.get(by)))
        alike = [row for row in ahead if row is first or comparisons.verdict(first, row) in (SAME, "")]
    best = min(alike, key=lambda row: (not _lossless(row), losses[row.label])) if alike else base
    why = "this one loses no quality" if _lossless(best) else "this one loses least"
    tie = f"{len(alike)} configurations are equally good within the noise; {why}" if len(alike) > 1 else ""
    notes = [f"{len(within)} of {len(losses)} configurations within {limit_percent:g} % of quality loss"]
    if unknown := sum(loss is None for loss in losses.values()):
        notes += [f"{unknown} of unknown loss: without an interval (three cases or more) it is not chosen"]
    notes += _left_out(comparisons)
    return Choice(
        label=best.label,
        row=comparisons.frame.set_index("configuration").loc[best.label],
        within=tuple(row.label for row in within),
        alike=tuple(row.label for row in alike),
        text=f"{_sentence(comparisons, best)} {comparisons.place}",
        answer=_answer(comparisons, best, limit_percent, tie, notes),
        notes=(*([tie] if tie else []), *notes),
    )


def _loss(row: MeasuredConfiguration) -> float | None:
    """Upper end of the interval of the quality loss in percent, 0 of a lossless one; None where it is unknown."""
    upper = row.results.get(QUALITY[0])
    return float(upper) if is_number(upper) else 0.0 if _lossless(row) else None


def _lossless(row: MeasuredConfiguration) -> bool:
    """Whether it has no precision plan, and its videos are as near to the original's as rounding makes them."""
    value = {name: number(row.results.get(name)) for name in ("psnr_db", *DIVERGENCE)}
    near = value["psnr_db"] >= NUMERIC_PSNR_DB or value[DIVERGENCE[0]] <= value[DIVERGENCE[1]]
    return row.results.get("plan", "default") in UNCHANGED and near


def _left_out(comparisons: Comparisons) -> list[str]:
    """Counts of configurations that were not compared, and a warning about a baseline that was run once."""
    remarks = []
    if len(comparisons.refused):
        remarks += [f"{comparisons.refused['configuration'].nunique()} refused"]
    if len(comparisons.failures):
        remarks += [f"{len(comparisons.failures)} not finished"]
    return [*remarks, DRIFT] if comparisons.baseline.repeats == 1 else remarks


def _answer(
    comparisons: Comparisons,
    best: MeasuredConfiguration,
    limit_percent: float,
    tie: str,
    notes: Sequence[str],
) -> Answer:
    """Which configuration to use: its name, gain and quality loss in plain words, the rest below.

    Args:
        tie: what is said of others that are as good, "" without any. notes: clauses below the headline.
    """
    base, by = comparisons.baseline, comparisons.by
    name, other = (configuration_text(row.parameters, comparisons.axes) for row in (best, base))
    ratio, loss = comparisons.ratios[best.label], _loss_text(best)
    title, value, before = by.rpartition("_")[0].replace("_", " "), *_shown(by, best, base)
    tiles = [Tile(title or by, value, "" if best is base else f"{before} with {other}")]
    details = [f"{capital('; '.join(notes))}. {comparisons.place}"]
    following = step(
        "a sweep of other configurations, and this notebook with its folder as sweep=, looks farther"
    )
    if best is base:
        headline = (
            f"Keep {name}: of {counted(len(comparisons.rows), 'configuration')}, none within the limit on"
        )
        headline += f" quality loss ({limit_percent:g} %) is better than it beyond noise."
    else:
        how = "as fast" if by.endswith("_ms") else "as good"
        figures = (ratio.value if gain_of(by) == "ratio" else math.nan, ratio.low, ratio.high)
        gain = speed_text(*figures, candidate="", baseline=other, noise_percent=ratio.noise_percent, how=how)
        short = f"Use {name}: {gain}{f', {loss}' if loss else ''}."
        headline = fitting(f"{short} {tie}.", short) if tie else short
        details = [f"{tie}." if headline == short and tie else "", *details]
        beside = f"{interval_text(*figures[1:])}; noise {ratio.noise_percent:.0f} %"
        tiles.insert(0, Tile("speed-up" if how == "as fast" else "gain", f"{figures[0]:.2f}×", beside))
        asked = {name: best.parameters.get(name) for name in comparisons.axes if name in CONFIGURED}
        why = "measures it on cases that were not used for choosing"
        following = step(why, "41_configuration", **asked, case_set="final")
    if is_number(best.results.get(QUALITY[1])):
        high = best.results.get(QUALITY[0])
        upper = f"at most {max(high, 0.01):.2f} %" if is_number(high) else "95 % interval unknown"
        tiles.append(Tile("quality loss", _percent(best), f"{upper}; limit {limit_percent:g} %"))
    if is_number(best.results.get(MEMORY)):
        value, before = _shown(MEMORY, best, base)
        tiles.append(Tile("peak memory", value, "" if best is base else f"{before} with {other}"))
    return answer(headline, *details, tiles=tuple(tiles), next=following)


MEMORY = "peak_memory_gib"
CONFIGURED = (
    "model",
    "dtype",
    "configuration",
    "engine",
    "plan",
    "height",
    "width",
    "frames",
    "steps",
    "guidance_scale",
)
"""Parameters of sweeps that are those of one configuration, too."""


def configuration_text(parameters: Mapping[str, Any], axes: Iterable[str]) -> str:
    """A configuration in words: engine=onnxruntime, plan=ffn-int8 as "ONNX Runtime with plan ffn-int8"."""
    words: list[str] = []
    for axis in axes:
        value = parameter_text(parameters.get(axis))
        if axis == "engine":
            words.insert(0, engine_text(value))
        elif axis == "plan" and value in ("", "None", *map(str, UNCHANGED)):
            continue
        else:
            words.append(f"{axis.replace('_', ' ')} {value}")
    head, *more = words or ["the model as it is"]
    return f"{head} with {', '.join(more)}" if more else head


def _shown(name: str, *rows: MeasuredConfiguration) -> list[str]:
    """A figure of several configurations with its unit."""
    unit = {"ms": "ms", "gib": "GiB", "percent": "%", "db": "dB", "bytes": "bytes"}
    return [shown(number(row.results.get(name)), unit.get(name.rpartition("_")[2], "")) for row in rows]


def _percent(row: MeasuredConfiguration) -> str:
    loss = number(row.results.get(QUALITY[1]))
    return f"{_signed(loss)} %" if abs(loss) >= 0.005 else "< 0.01 %"


def _loss_text(row: MeasuredConfiguration) -> str:
    """The quality loss in a clause: "quality loss +0.43 % (95 % interval -0.20 to +1.10)"; "" where it is unknown."""
    if not is_number(row.results.get(QUALITY[1])):
        return ""
    low, high = (number(row.results.get(f"quality_loss_{end}_percent")) for end in ("low", "high"))
    if max(abs(low), abs(high)) < 0.005:
        return "quality loss below 0.01 %"
    return f"quality loss {_percent(row)} ({interval_text(low, high, '+.2f')})"


def _sentence(comparisons: Comparisons, best: MeasuredConfiguration) -> str:
    """Which configuration to use, with its gain and its quality loss."""
    base, by = comparisons.baseline, comparisons.by
    if best is base:
        floor = f"the noise and the threshold of {comparisons.threshold_percent:g} %"
        return f"Keep {best.label}: nothing within the limit is better by {by} than {floor}."
    how = "as fast" if by.endswith("_ms") else f"as good by {by}"
    ratio = comparisons.ratios[best.label]
    value = ratio.value if gain_of(by) == "ratio" else math.nan
    figures = (value, ratio.low, ratio.high, ratio.noise_percent)
    text = f"Use {best.label}: " + verdict_sentence(ratio.verdict, *figures, baseline=base.label, how=how)
    if is_number(loss := best.results.get(QUALITY[1])):
        ends = [best.results.get(f"quality_loss_{end}_percent") for end in ("low", "high")]
        if max(abs(value) for value in (loss, *ends) if is_number(value)) < 0.005:
            return f"{text}, quality loss below 0.01 %."
        known = all(map(is_number, ends))
        interval = f" ({_signed(ends[0])} to {_signed(ends[1])})" if known else " (95 % interval unknown)"
        text += f", quality loss {_signed(loss)} %{interval}"
    return f"{text}."


def _signed(percent: float) -> str:
    return f"{round(percent, 2) + 0.0:+.2f}"


COLUMNS = (
    "techniques", "moved", "speedup", "low", "high", "product", "product_low", "product_high", "of_product", "of_low",
    "of_high", "noise_percent", "verdict", "best_alone", "of_best", "of_best_low", "of_best_high",
)  # fmt: skip
MULTIPLY = "gains multiply"
MULTIPLY_PERCENT = 10.0
"""Gains multiply where the whole interval of measured over product lies within this of 1: that they cannot be told from the
product says only that they were measured too badly."""
RESAMPLES = 4_000


def technique_matrix(comparisons: Comparisons, *, seed: int = 0) -> pd.DataFrame:
    """Gains of techniques alone and combined.

    A technique is a parameter with another value than in the baseline, e.g. `engine=onnxruntime`; one that was not applied
    is left out. Intervals are percentile bootstraps (95 %) of all configurations together, so that each ratio uses the same
    resamples of the baseline.

    Args:
        comparisons: from `compare`, by a time with samples.

    Returns:
        One row per configuration but the baseline, fewest techniques first: techniques (joined by " + "), moved (their
        number), speedup, low, high; and where each of its techniques was measured alone too: product of their speed-ups,
        with product_low and product_high; of_product (measured over product, 1 where gains multiply), with of_low and
        of_high; noise_percent (the largest of all configurations involved); verdict, which compares the measured speed-up
        with the product. Of combinations also best_alone, the fastest single technique, and of_best, the speed-up over its,
        with of_best_low and of_best_high.

    Raises:
        WanlabError: `comparisons` is by something without samples, or all configurations are the baseline's.
    """
    if not is_time(comparisons.by):
        raise WanlabError(
            f"a technique matrix is of times; compare by time_per_video_ms, not by {comparisons.by}"
        )
    base = comparisons.baseline
    measured: dict[tuple[str, ...], MeasuredConfiguration] = {}
    for row in comparisons.rows[1:]:
        names = tuple(f"{axis}={parameter_text(row.parameters.get(axis))}" for axis in comparisons.moved(row))
        if names and row.applied and row.samples is not None:
            measured.setdefault(names, row)
    if not measured or base.samples is None:
        raise WanlabError(
            f"no technique beside the baseline {base.label}: no other configuration with samples"
        )
    generator = np.random.default_rng(seed)
    times = {names: _medians(row, generator) for names, row in {(): base, **measured}.items()}
    gains = {names: times[()] / time for names, time in times.items()}
    rows, singles = [], [names for names in measured if len(names) == 1]
    best = max(singles, key=lambda names: gains[names][0], default=None)
    for names, row in sorted(
        measured.items(), key=lambda item: (len(item[0]), item[1].results[comparisons.by])
    ):
        alone = [measured.get((name,)) for name in names]
        cells = {"techniques": " + ".join(names), "moved": len(names)}
        cells |= zip(("speedup", "low", "high"), _interval(gains[names]), strict=True)
        cells["noise_percent"] = comparisons.noise_percent(row)
        if len(names) > 1 and all(alone):
            product = np.prod([gains[name,] for name in names], axis=0)
            part = _interval(gains[names] / product)
            noise = comparisons.noise_percent(row, *alone)
            cells |= zip(("product", "product_low", "product_high"), _interval(product), strict=True)
            cells |= zip(("of_product", "of_low", "of_high"), part, strict=True)
            cells |= {"noise_percent": noise, "verdict": _verdict(part, noise) + _simulated(names, alone)}
        if len(names) > 1 and best is not None:
            beside = _interval(gains[names] / gains[best])
            cells |= zip(("of_best", "of_best_low", "of_best_high"), beside, strict=True)
            cells |= {"best_alone": best[0]}
        rows.append(cells)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.assign(verdict=frame["verdict"].astype(object).where(frame["verdict"].notna(), ""))


def technique_verdict(matrix: pd.DataFrame) -> str:
    """The matrix in one or two sentences: the best technique alone, and the best combination.

    Where neither can be told from noise, this is said first; a combination that is not faster than the best technique alone
    is said to be so.
    """
    best = {}
    for word, rows in (("alone", matrix[matrix["moved"] == 1]), ("combined", matrix[matrix["moved"] > 1])):
        if len(rows):
            row = rows.loc[rows["speedup"].idxmax()]
            figures = [row[name] for name in ("speedup", "low", "high", "noise_percent")]
            verdict = SAME if math.isnan(row["low"]) else verdict_of(*figures)
            best[word] = (row, verdict, figures)
    if all(verdict == SAME for _, verdict, _ in best.values()):
        ends = "; ".join(
            f"best {word} {row['techniques']}, ratio {ratio:.2f} "
            f"({interval_text(low, high)}, noise {noise:.1f} %)"
            for word, (row, _, (ratio, low, high, noise)) in best.items()
        )
        return f"No difference from the baseline can be told from noise: {ends}."
    sentences = []
    for word, (row, verdict, figures) in best.items():
        if beside := _beside_best(row):
            text = f"No combination is faster than {row['best_alone']} alone: {row['techniques']} {beside}"
        elif verdict == SAME:
            text = f"Best {word}: " + verdict_sentence(
                verdict, *figures, candidate=row["techniques"], here=False
            )
        else:
            text = f"Best {word}: {row['techniques']}, "
            text += verdict_sentence(verdict, *figures, baseline="the baseline")
        sentences.append(text + (f"; {row['verdict']}" if row["verdict"] else "") + ".")
    return " ".join(sentences)


def _beside_best(row: Any) -> str:
    """How fast a combination is beside the best technique alone; "" where it is faster, or is none."""
    ratio, low, high = (row[name] for name in ("of_best", "of_best_low", "of_best_high"))
    if row["moved"] < 2 or not is_number(ratio):
        return ""
    verdict = verdict_of(ratio, low, high, row["noise_percent"]) if is_number(low) else SAME
    known = f"{interval_text(low, high)}, noise {row['noise_percent']:.1f} %"
    if verdict == SAME:
        return f"cannot be told from it (ratio {ratio:.2f}, {known})"
    return f"is {ratio:.2f} times as fast as it ({known})" if verdict == "slower" else ""


def gains_text(table: pd.DataFrame) -> str:
    """A table of `engine_table` in words: the engines that are faster than the original, and those only built."""
    others = table[(table["state"] == MEASURED) & (table["engine"] != table["engine"][0])]
    gains = [
        f"{row.engine} {row.time_per_video_ms_ratio:.2f} times as fast as the original (95 % interval {row.interval})"
        for row in others.itertuples()
        if row.note == "faster"
    ]
    text = ", ".join(gains) or "No engine is distinguishably faster than the original"
    not_run = ", ".join(table.loc[table["state"] != MEASURED, "engine"])
    return f"{text}; {not_run} built, not executed" if not_run else text


def _medians(row: MeasuredConfiguration, generator: np.random.Generator) -> np.ndarray:
    """Median of a configuration's samples, then of their resamples: `[1 + RESAMPLES]`, NaN where these say nothing."""
    values = np.asarray(row.samples.values_ms)
    if values.size < LEAST:
        return np.append(np.median(values), np.full(RESAMPLES, np.nan))
    return np.append(np.median(values), resampled_medians(values, generator, RESAMPLES))


def _interval(statistic: np.ndarray) -> tuple[float, float, float]:
    """A statistic of `_medians` and its 95 % interval, NaN where it is unknown."""
    return (float(statistic[0]), *percentile_interval(statistic[1:], float(statistic[0])))


def _simulated(names: tuple[str, ...], alone: Iterable[MeasuredConfiguration]) -> str:
    """A remark where a technique alone was only simulated: then its gain and the product are not known."""
    simulated = [
        name for name, row in zip(names, alone, strict=True) if "simulated" in str(row.results.get("kernels"))
    ]
    return f" ({', '.join(simulated)} alone is simulated)" if simulated else ""


def _verdict(part: tuple[float, float, float], noise_percent: float) -> str:
    """Verdict on a measured speed-up over the product of the single ones, with its interval."""
    off = 100 * (part[0] - 1)
    if math.isnan(part[1]):
        return "unknown: too few samples for an interval"
    if max(part[2], 1 / part[1]) <= 1 + MULTIPLY_PERCENT / 100:
        return f"{MULTIPLY}: {part[0]:.2f} of their product"
    if verdict_of(*part, noise_percent) == SAME:
        return f"not distinguishable from their product: {part[0]:.2f} of it"
    if off < 0:
        return f"gains do not multiply: {-off:.0f} % less than their product"
    return f"more than multiply: {off:.0f} % over their product"


FIGURES = ("time_per_frame_ms", "time_per_video_ms", "peak_memory_gib", "load_ms", "weights_gib")
NOT_EXECUTED = "built, not executed"


def engine_table(
    comparisons: Comparisons, built: Sequence[Result] = (), *, axis: str = "engine"
) -> pd.DataFrame:
    """One row per engine, everything else as in the baseline; engines that were built only are rows without figures.

    Args:
        comparisons: from `compare`, with the original as its baseline.
        built: results of engines that this machine cannot run, from `built_records`.
        axis: the parameter that names the engine.

    Returns:
        engine, state, then each figure with `<figure>_ratio` to the baseline (above 1 is better), interval (that of the
        compared figure's ratio, as text), note.
    """
    base, rows = comparisons.baseline.results, []
    for row in comparisons.rows:
        if comparisons.moved(row) in ([], [axis]):
            engine = str(row.parameters.get(axis, row.label))
            cells: dict[str, Any] = {"engine": title_of_label(engine), "state": MEASURED}
            for name in FIGURES:
                cells[name] = number(row.results.get(name))
                cells[f"{name}_ratio"] = times_better(name, cells[name], base.get(name))
            ratio = comparisons.ratios[row.label]
            interval = "" if row is comparisons.baseline else ends_text(ratio.low, ratio.high)
            rows.append(cells | {"interval": interval, "note": ratio.verdict})
    rows += _built(built)
    columns = [column for name in FIGURES for column in (name, f"{name}_ratio")]
    frame = pd.DataFrame(rows, columns=["engine", "state", *columns, "interval", "note"])
    empty = [name for name in FIGURES if frame[name].isna().all()]
    return frame.drop(columns=[column for name in empty for column in (name, f"{name}_ratio")])


def _built(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row per engine, for all GPUs that it was built for."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.state == BUILT:
            groups.setdefault(result.engine, []).append(result)
    rows = []
    for engine, group in groups.items():
        parts = ", ".join(dict.fromkeys(result.work.component for result in group if result.work.component))
        where = ", ".join(dict.fromkeys(result.machine.name for result in group if result.machine))
        took = sum(
            {(result.source, result.work, result.dtype): result.build_ms or 0.0 for result in group}.values()
        )
        note = f"{parts or 'a network'} for {where}; built in {took / 1e3:,.0f} s, no such GPU here"
        rows.append({"engine": title_of_label(engine), "state": NOT_EXECUTED, "interval": "", "note": note})
    return rows


def readable(comparisons: Comparisons, *, apart: bool = False) -> pd.DataFrame:
    """Cells as text: configuration, verdict, the compared figure, its ratio with interval and noise, the other figures.

    Args:
        apart: a column for each varied parameter in place of the configuration's name.
    """
    gain = gain_of(comparisons.by)
    others = [name for name in comparisons.shown if name != comparisons.by]
    rows = []
    for run, row in zip(comparisons.rows, comparisons.frame.to_dict(orient="records"), strict=True):
        axes = {axis: parameter_text(run.parameters.get(axis)) for axis in comparisons.axes} if apart else {}
        effect = f", {NOT_APPLIED}" if row.get("effect") == NOT_APPLIED else ""
        timed = is_time(comparisons.by) and row["configuration"] != comparisons.baseline.label
        cells = (axes or {"configuration": row["configuration"]}) | {
            "verdict": row["verdict"] + effect,
            comparisons.by: figure(row[comparisons.by]),
            gain: figure(row[gain], gain),
            "95 % interval": ends_text(row["low"], row["high"]) if timed else "",
            "noise %": figure(row["noise_percent"]),
        }
        for name in others:
            kind = gain_of(name)
            is_baseline = row["configuration"] == comparisons.baseline.label
            # A difference to a baseline of 0 is the value itself.
            is_value = kind != "ratio" and row[f"{name}_{kind}"] == row[name]
            change = "" if is_baseline or is_value else figure(row[f"{name}_{kind}"], kind)
            cells[name] = figure(row[name]) + (f" ({change})" if change else "")
        rows.append(cells | ({"effect": row["effect"]} if "effect" in row else {}))
    return pd.DataFrame(rows)


def readable_techniques(matrix: pd.DataFrame) -> pd.DataFrame:
    """Cells as text: technique, speed-up with its interval, product of the single speed-ups, verdict on it.

    A column without any text is left out.
    """
    rows = []
    for row in matrix.to_dict(orient="records"):
        both = is_number(row["product"])
        rows.append(
            {
                "techniques": row["techniques"],
                "speed-up": f"{figure(row['speedup'], 'ratio')} ({ends_text(row['low'], row['high'])})",
                "product of each alone": figure(row["product"], "ratio") if both else "",
                "of the product": f"{row['of_product']:.2f} ({ends_text(row['of_low'], row['of_high'])})"
                if both
                else "",
                "verdict": row["verdict"],
            }
        )
    table = pd.DataFrame(rows)
    return table.loc[:, (table != "").any()]


def readable_engines(table: pd.DataFrame) -> pd.DataFrame:
    """Cells as text: a line per figure, a column per engine, the ratio to the first engine after each value."""
    names = [name for name in table.columns if f"{name}_ratio" in table.columns]
    lines: list[dict[str, str]] = []
    for name in ["state", *names, "interval", "note"]:
        line = {"measure": name}
        for place, row in enumerate(table.to_dict(orient="records")):
            if name in names:
                change = figure(row[f"{name}_ratio"], "ratio") if place else ""
                line[row["engine"]] = figure(row[name]) + (f" ({change})" if change else "")
            else:
                line[row["engine"]] = str(row[name])
        lines.append(line)
    return pd.DataFrame(lines)


def figure(value: Any, kind: str = "") -> str:
    """A number in three significant digits; an empty text for NaN."""
    if value is None or value != value:
        return ""
    if kind == "ratio":
        return f"{value:.2f}x" if value < 100 else f"{value:,.0f}x"
    if kind == "difference":
        return f"{value:+.3g}" if value else "0"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


SWEEPS = data("sweeps")


def sweep_folder(given: str | os.PathLike | None, recorded: str) -> Path:
    """The folder of a sweep: `given`, else the recorded sweep of that name in the project's data.

    Raises:
        WanlabError: there is no such folder.
    """
    if given is not None:
        path = locate(given)
        if not path.is_dir():
            raise WanlabError(f"no folder of a sweep at {path}; give the folder that holds its sweep.json")
        return path
    return existing(SWEEPS / recorded / "sweep.json").parent


def built_records(folder: str | os.PathLike | None, sweep: Path) -> list[Result]:
    """Results of engines that were built and did not run.

    Args:
        folder: where their build information is; None takes `built/` in the sweep's folder, and for a recorded sweep the
            recorded results of the project.

    Raises:
        WanlabError: there is no such folder.
    """
    usual = RESULTS if sweep.parent == SWEEPS else sweep / "built"
    path = usual if folder is None else Path(folder)
    if folder is not None and not path.is_dir():
        raise WanlabError(
            f"no folder with build information at {path}; 22_tensorrt leaves them beside its engines"
        )
    return [result for result in load_results([path])[0] if result.state == BUILT] if path.exists() else []
