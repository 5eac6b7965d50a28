"""Which configuration to use: Pareto efficiency, the fastest within a quality limit, what each technique bought."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wanlab.core.effects import NOT_APPLIED
from wanlab.core.errors import WanlabError, did_you_mean
from wanlab.core.paths import data, existing, locate
from wanlab.core.stats import percentile_interval, resampled_medians
from wanlab.engines.registry import title_of_label
from wanlab.measure.timing import verdict_of, verdict_sentence
from wanlab.runs.compare import BASELINE, SAME, Comparisons, times_better
from wanlab.runs.platforms import RESULTS
from wanlab.runs.result import BUILT, MEASURED, Result
from wanlab.runs.results import MeasuredConfiguration, better, is_ratio, is_time, known, load_results, shown

SENSES = ("min", "max")


def pareto(frame: pd.DataFrame, goals: Mapping[str, str]) -> pd.Series:
    """Which rows are efficient: no other row is at least as good in every column and better in one.

    Rows that are equal in every column stand or fall together. A row that lacks one of the values is not efficient and
    beats nobody.

    Args:
        frame: one row per candidate.
        goals: column -> `"min"` where less is better, `"max"` where more is.

    Returns:
        Booleans with the frame's index.

    Raises:
        WanlabError: no goal, an unknown column, or another sense.
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
    known = ~np.isnan(costs).any(axis=1)
    rows = costs[known] + 0.0  # no -0.0, which is another row than 0.0
    # Of equal rows one is looked at. Sorted, a row can only be beaten by one before it.
    points, of_row = np.unique(rows, axis=0, return_inverse=True)
    efficient = np.zeros(len(points), dtype=bool)
    best = np.empty((0, points.shape[1]))
    for index, point in enumerate(points):
        if not (best <= point).all(axis=1).any():
            efficient[index] = True
            best = np.vstack([best, point])
    mask = np.zeros(len(frame), dtype=bool)
    mask[known] = efficient[of_row.reshape(-1)]
    return pd.Series(mask, index=frame.index, name="efficient")


def efficient(frame: pd.DataFrame, goals: Mapping[str, str]) -> pd.Series:
    """`pareto` among the rows whose `effect` is not "not applied": those are another configuration than their name says."""
    real = frame["effect"] != NOT_APPLIED if "effect" in frame else frame.index == frame.index
    return pareto(frame[real], goals).reindex(frame.index, fill_value=False)


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
        text: the answer in one sentence.
        notes: what stands behind it: how many are within the limit, were refused, did not finish.
    """

    label: str
    row: pd.Series
    within: tuple[str, ...]
    alike: tuple[str, ...]
    text: str
    notes: tuple[str, ...]


def choose(comparisons: Comparisons, limit_percent: float = 3.0) -> Choice:
    """The best by the compared figure among those whose quality loss, with its interval, is within a limit.

    Of those that cannot be told apart from the best, the one that loses least: noise does not choose.
    A configuration that was not applied, or whose loss is not known, is not chosen.
    """
    frame = comparisons.frame.set_index("configuration")
    within, without = [], 0
    for row in comparisons.rows:
        loss = _loss(row.results)
        fits = loss is not None and loss <= limit_percent
        without += loss is None
        if row is comparisons.baseline or (fits and row.results.get("effect") != NOT_APPLIED):
            within.append(row.label)
    ahead = [
        label
        for label in within
        if frame.loc[label, "verdict"] not in (SAME, BASELINE, "slower", "worse", "")
    ]
    pick = min if better(comparisons.by) == "min" else max
    alike = []
    if ahead:
        first = comparisons.row(pick(ahead, key=lambda label: frame.loc[label, comparisons.by]))
        alike = [
            label
            for label in ahead
            if label == first.label or comparisons.verdict(first, comparisons.row(label)) in (SAME, "")
        ]
    best = (
        min(alike, key=lambda label: _loss(comparisons.row(label).results))
        if alike
        else comparisons.baseline.label
    )
    row = frame.loc[best]
    notes = _notes(comparisons, within, alike, without, limit_percent)
    return Choice(best, row, tuple(within), tuple(alike), _text(comparisons, best, row), tuple(notes))


def _loss(values: dict[str, Any]) -> float | None:
    """Upper end of the quality loss in percent, or the loss where it has no interval."""
    return next((float(values[name]) for name in QUALITY if known(values.get(name))), None)


def _notes(
    comparisons: Comparisons, within: list[str], alike: list[str], without: int, limit: float
) -> list[str]:
    notes = [f"of {len(alike)} that cannot be told apart it loses least"] if len(alike) > 1 else []
    notes += [f"{len(within)} of {len(comparisons.rows)} configurations within {limit:g} % of quality loss"]
    notes += [f"{without} of unknown loss"] if without else []
    notes += [f"{comparisons.refused['configuration'].nunique()} refused"] if len(comparisons.refused) else []
    notes += [f"{len(comparisons.failures)} not finished"] if len(comparisons.failures) else []
    return notes + ([DRIFT] if comparisons.baseline.repeats == 1 else [])


def _text(comparisons: Comparisons, best: str, row: Any) -> str:
    if best == comparisons.baseline.label:
        floor = f"the noise and the threshold of {comparisons.threshold_percent:g} %"
        return f"Keep {best}: nothing within the limit is better by {comparisons.by} than {floor}."
    how = "as fast" if comparisons.by.endswith("_ms") else f"as good by {comparisons.by}"
    figures = (row.get("ratio", math.nan), row["low"], row["high"], row["noise_percent"])
    text = f"Use {best}: " + verdict_sentence(
        row["verdict"], *figures, baseline=comparisons.baseline.label, how=how
    )
    results = comparisons.row(best).results
    if known(loss := results.get(QUALITY[1])):
        ends = [results.get(f"quality_loss_{end}_percent") for end in ("low", "high")]
        span = f" ({_signed(ends[0])} to {_signed(ends[1])})" if all(map(known, ends)) else ""
        text += f", quality loss {_signed(loss)} %{span}"
    return f"{text}."


def _signed(percent: float) -> str:
    return f"{round(percent, 2) + 0.0:+.2f}"


COLUMNS = (
    "techniques", "moved", "speedup", "low", "high", "product", "product_low", "product_high", "of_product", "of_low",
    "of_high", "noise_percent", "verdict",
)  # fmt: skip
MULTIPLY = "gains multiply"
RESAMPLES = 4_000


def technique_matrix(comparisons: Comparisons, *, seed: int = 0) -> pd.DataFrame:
    """Techniques alone and combined.

    A technique is a parameter moved off its value in the baseline, e.g. `engine=onnxruntime`; one that was not applied is
    left out. Intervals are percentile bootstraps (95 %) over all samples of all configurations involved at once, so that the
    baseline, which stands in every ratio, is drawn once.

    Args:
        comparisons: from `compare`, by a time with samples.

    Returns:
        One row per configuration but the baseline, fewest techniques first: techniques (joined by " + "), moved (how many),
        speedup, low, high; and where each of its techniques was measured alone too: product of their speed-ups, with
        product_low and product_high; of_product (measured over product, 1 where gains multiply), with of_low and of_high;
        noise_percent (of all that are involved); verdict, which says what became of the product.

    Raises:
        WanlabError: compared by something without samples, or nothing was moved.
    """
    if not is_time(comparisons.by):
        raise WanlabError(
            f"a technique matrix is of times; compare by time_per_video_ms, not by {comparisons.by}"
        )
    base = comparisons.baseline
    moved: dict[tuple[str, ...], MeasuredConfiguration] = {}
    for row in comparisons.rows[1:]:
        applied = row.samples is not None and row.results.get("effect") != NOT_APPLIED
        if applied and (names := _moved(row, base, comparisons.axes)):
            moved.setdefault(names, row)
    if not moved or base.samples is None:
        raise WanlabError(
            f"no technique beside the baseline {base.label}: no other configuration with samples"
        )
    generator = np.random.default_rng(seed)
    drawn = {id(row): _medians(row, generator) for row in (base, *moved.values())}
    rows = []
    for names, row in sorted(moved.items(), key=lambda item: (len(item[0]), item[1].results[comparisons.by])):
        gain = _Ratio(base.samples.median / row.samples.median, drawn[id(base)] / drawn[id(row)])
        alone = [moved.get((name,)) for name in names]
        cells = {"techniques": " + ".join(names), "moved": len(names), **gain.named("speedup", "low", "high")}
        cells["noise_percent"] = comparisons.noise_percent(row)
        if len(names) > 1 and all(alone):
            gains = [
                _Ratio(base.samples.median / one.samples.median, drawn[id(base)] / drawn[id(one)])
                for one in alone
            ]
            product = math.prod(gains[1:], start=gains[0])
            part = gain / product
            noise = comparisons.noise_percent(row, *alone)
            cells |= product.named("product", "product_low", "product_high")
            cells |= part.named("of_product", "of_low", "of_high")
            cells |= {"noise_percent": noise, "verdict": _verdict(part, noise) + _simulated(names, alone)}
        rows.append(cells)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.assign(verdict=frame["verdict"].astype(object).where(frame["verdict"].notna(), ""))


def technique_verdict(matrix: pd.DataFrame) -> str:
    """The matrix in one or two sentences: the best technique alone, and the best combination.

    Where neither can be told from noise, this is said first.
    """
    best = {}
    for word, rows in (("alone", matrix[matrix["moved"] == 1]), ("combined", matrix[matrix["moved"] > 1])):
        if len(rows):
            row = rows.loc[rows["speedup"].idxmax()]
            figures = [row[name] for name in ("speedup", "low", "high", "noise_percent")]
            best[word] = (row, verdict_of(*figures), figures)
    if all(verdict == SAME for _, verdict, _ in best.values()):
        ends = "; ".join(
            f"best {word} {row['techniques']}, ratio {ratio:.2f} "
            f"(95 % interval {low:.2f} to {high:.2f}, noise {noise:.1f} %)"
            for word, (row, _, (ratio, low, high, noise)) in best.items()
        )
        return f"No difference from the baseline can be told from noise on this machine now: {ends}."
    sentences = []
    for word, (row, verdict, figures) in best.items():
        if verdict == SAME:
            text = f"Best {word}: " + verdict_sentence(verdict, *figures, candidate=row["techniques"])
        else:
            text = f"Best {word}: {row['techniques']}, "
            text += verdict_sentence(verdict, *figures, baseline="the baseline")
        sentences.append(text + (f"; {row['verdict']}" if row["verdict"] else "") + ".")
    return " ".join(sentences)


def gains_text(table: pd.DataFrame) -> str:
    """A table of `engine_table` in words: the engines that are faster than the original, and those only built."""
    others = table[(table["state"] == MEASURED) & (table["engine"] != table["engine"][0])]
    gains = [
        f"{row.engine} {row.time_per_video_ms_ratio:.2f} times as fast as the original"
        for row in others.itertuples()
        if row.note == "faster"
    ]
    text = ", ".join(gains) or "No engine is distinguishably faster than the original"
    not_run = ", ".join(table.loc[table["state"] != MEASURED, "engine"])
    return f"{text}; {not_run} built, not executed" if not_run else text


class _Ratio:
    """A ratio with its bootstrap distribution."""

    def __init__(self, value: float, drawn: np.ndarray) -> None:
        self.value, self.drawn = value, drawn

    def __mul__(self, other: _Ratio) -> _Ratio:
        return _Ratio(self.value * other.value, self.drawn * other.drawn)

    def __truediv__(self, other: _Ratio) -> _Ratio:
        return _Ratio(self.value / other.value, self.drawn / other.drawn)

    def ends(self) -> tuple[float, float]:
        return percentile_interval(self.drawn, self.value)

    def named(self, *names: str) -> dict[str, float]:
        return dict(zip(names, (self.value, *self.ends()), strict=True))


def _moved(row: MeasuredConfiguration, base: MeasuredConfiguration, axes: Iterable[str]) -> tuple[str, ...]:
    return tuple(
        f"{axis}={shown(row.parameters.get(axis))}"
        for axis in axes
        if row.parameters.get(axis) != base.parameters.get(axis)
    )


def _medians(row: MeasuredConfiguration, generator: np.random.Generator) -> np.ndarray:
    return resampled_medians(np.asarray(row.samples.values_ms), generator, RESAMPLES)


def _simulated(names: tuple[str, ...], alone: Iterable[MeasuredConfiguration]) -> str:
    """Of a technique that was only simulated alone the gain is not known, nor is the product."""
    only = [
        name for name, one in zip(names, alone, strict=True) if "simulated" in str(one.results.get("kernels"))
    ]
    return f" ({', '.join(only)} alone is simulated)" if only else ""


def _verdict(part: _Ratio, noise_percent: float) -> str:
    low, high = part.ends()
    off = 100 * (part.value - 1)
    if low <= 1 <= high or max(part.value, 1 / part.value) - 1 <= noise_percent / 100:
        return f"{MULTIPLY} within noise"
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
        built: results of engines that no machine here could run, see `built_records`.
        axis: the parameter that names the engine.

    Returns:
        engine, state, then each figure with `<figure>_ratio` to the baseline (above 1 is better), note.
    """
    base = comparisons.baseline
    rows = []
    for row in comparisons.rows:
        moved = [name for name in comparisons.axes if row.parameters.get(name) != base.parameters.get(name)]
        if moved not in ([], [axis]):
            continue
        engine = str(row.parameters.get(axis, row.label))
        cells: dict[str, Any] = {"engine": title_of_label(engine), "state": MEASURED}
        for name in FIGURES:
            value = row.results.get(name)
            cells[name] = math.nan if value is None else value
            cells[f"{name}_ratio"] = times_better(name, cells[name], base.results.get(name))
        verdict = comparisons.frame.loc[comparisons.frame["configuration"] == row.label, "verdict"].iloc[0]
        rows.append(cells | {"note": verdict})
    rows += _built(built)
    columns = [column for name in FIGURES for column in (name, f"{name}_ratio")]
    frame = pd.DataFrame(rows, columns=["engine", "state", *columns, "note"])
    empty = [name for name in FIGURES if frame[name].isna().all()]
    return frame.drop(columns=[column for name in empty for column in (name, f"{name}_ratio")])


def _built(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row per engine, whatever it was built for."""
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
        rows.append({"engine": title_of_label(engine), "state": NOT_EXECUTED, "note": note})
    return rows


def readable(comparisons: Comparisons, *, apart: bool = False) -> pd.DataFrame:
    """Words only: configuration, verdict, the compared figure, its ratio with interval and noise, the other figures.

    Args:
        apart: a column for each varied parameter in place of the configuration's name.
    """
    gain = "ratio" if is_ratio(comparisons.by) else "difference"
    others = [name for name in comparisons.shown if name != comparisons.by]
    rows = []
    for row in comparisons.frame.to_dict(orient="records"):
        known = row["low"] == row["low"]
        named = {axis: shown(row[axis]) for axis in comparisons.axes} if apart and comparisons.axes else None
        effect = f", {NOT_APPLIED}" if row.get("effect") == NOT_APPLIED else ""
        cells = (named or {"configuration": row["configuration"]}) | {
            "verdict": row["verdict"] + effect,
            comparisons.by: figure(row[comparisons.by]),
            gain: figure(row[gain], gain),
            "95 % interval": f"{row['low']:.2f} to {row['high']:.2f}" if known else "",
            "noise %": figure(row["noise_percent"]),
        }
        for name in others:
            kind = "ratio" if is_ratio(name) else "difference"
            first = row["configuration"] == comparisons.baseline.label
            change = "" if first else figure(row[f"{name}_{kind}"], kind)
            cells[name] = figure(row[name]) + (f" ({change})" if change else "")
        rows.append(cells | ({"effect": row["effect"]} if "effect" in row else {}))
    return pd.DataFrame(rows)


def readable_techniques(matrix: pd.DataFrame) -> pd.DataFrame:
    """Words only: technique, speed-up with its interval, the product of the single ones, what became of it."""
    rows = []
    for row in matrix.to_dict(orient="records"):
        both = row["product"] == row["product"]
        rows.append(
            {
                "techniques": row["techniques"],
                "speed-up": f"{figure(row['speedup'], 'ratio')} ({row['low']:.2f} to {row['high']:.2f})",
                "product of the single ones": figure(row["product"], "ratio") if both else "",
                "of the product": f"{row['of_product']:.2f} ({row['of_low']:.2f} to {row['of_high']:.2f})"
                if both
                else "",
                "verdict": row["verdict"],
            }
        )
    return pd.DataFrame(rows)


def readable_engines(table: pd.DataFrame) -> pd.DataFrame:
    """Words only: a line per measure, a column per engine, the ratio to the first behind each figure."""
    names = [name for name in table.columns if f"{name}_ratio" in table.columns]
    lines: list[dict[str, str]] = []
    for name in ["state", *names, "note"]:
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
    """A number in few digits; nothing for NaN."""
    if value is None or value != value:
        return ""
    if kind == "ratio":
        return f"{value:.2f}x" if value < 100 else f"{value:,.0f}x"
    if kind == "difference":
        return f"{value:+.3g}" if value else "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


SWEEPS = data("sweeps")


def sweep_folder(given: str | os.PathLike | None, recorded: str) -> Path:
    """The folder of a sweep that was given, else of a recorded one.

    Raises:
        WanlabError: it is not there.
    """
    if given is not None:
        path = locate(given)
        if not path.is_dir():
            raise WanlabError(f"no folder of a sweep at {path}; give the folder that holds its sweep.json")
        return path
    return existing(SWEEPS / recorded / "sweep.json").parent


def built_records(folder: str | os.PathLike | None, sweep: Path) -> list[Result]:
    """Receipts of engines that were only built, from a folder.

    None looks for `built/` beside the sweep's runs, and for a sweep of the project in its recorded results.

    Raises:
        WanlabError: the folder that was given is not there.
    """
    own = RESULTS if sweep.parent == SWEEPS else sweep / "built"
    path = own if folder is None else Path(folder)
    if folder is not None and not path.is_dir():
        raise WanlabError(
            f"no folder with build information at {path}; 22_tensorrt leaves them beside its engines"
        )
    return [result for result in load_results([path])[0] if result.state == BUILT] if path.exists() else []
