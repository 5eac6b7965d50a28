"""The same optimization on different machines, side by side: a view on results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from wanlab.core.errors import WanlabError
from wanlab.core.paths import data
from wanlab.measure.timing import NOT_DISTINGUISHABLE, verdict_sentence
from wanlab.runs.compare import Ratio, baselines, ratio_to
from wanlab.runs.result import BUILT, HERE, MEASURED, VIDEO, Result, differences

RESULTS = data("results", "platforms.jsonl")
DIFFER = ("machine", "dtype")
"""What rows of a platform table may differ in: that is what it shows."""


def other_work(result: Result, first: Result) -> list[str]:
    """In what a row is other work than the first, machine and dtype aside: `"steps is 10, here 2"`.

    A precision plan counts as work here. An engine that did not run is compared by its model, and by its component
    when that alone was timed.
    """
    if BUILT in (result.state, first.state):
        names = ["model"] + ["component"] * (first.work.component is not None)
        pairs = [(name, getattr(result.work, name), getattr(first.work, name)) for name in names]
        return [f"{name} is {mine}, here {theirs}" for name, mine, theirs in pairs if mine and mine != theirs]
    pairs = differences(result, first, DIFFER)
    pairs += [("plan", result.plan, first.plan)] if result.plan != first.plan else []
    return [f"{name} is {_value(name, mine)}, here {_value(name, theirs)}" for name, mine, theirs in pairs]


def comparable(results: Sequence[Result], first: Result | None = None) -> tuple[list[Result], pd.DataFrame]:
    """Split results into those of the first one's work, and the others with their reasons.

    Args:
        first: whose work counts; None takes the first that ran. Engines that were built only did no work; they are kept
            where they are of the model, and of the component that was timed.

    Returns:
        The results that `platform_table` takes, in their order, and a DataFrame of the others: source, machine,
        engine, what, reason (every field that differs, with both values).
    """
    kept, refused, first = [], [], first or _first(results)
    for result in results:
        reasons = other_work(result, first) if first else []
        if not reasons:
            kept.append(result)
            continue
        refused.append(
            {
                "source": result.source,
                "machine": _machine(result),
                "engine": result.engine_name,
                "what": _what(result),
                "reason": "; ".join(reasons),
            }
        )
    return kept, pd.DataFrame(refused, columns=["source", "machine", "engine", "what", "reason"])


def platform_table(
    results: Sequence[Result], *, first: Result | None = None, allow_different: bool = False
) -> pd.DataFrame:
    """One row per machine, engine and dtype: the newest result of each, of those with an A/A control if any.

    Args:
        first: whose work all of them must have done; None takes the first that ran.
        allow_different: keep rows of other work, each with a note that says in what it differs.

    Returns:
        machine, memory_gib, state, engine, precision, plan, model, what, shape, steps, seed, latency_ms,
        latency_per_frame_ms and throughput_per_s (videos or calls), ratio_to_eager (eager's latency on the same machine
        over this one, above 1 is faster; eager in the same dtype where there is one), low and high (its 95 % interval),
        noise_percent, samples, peak_memory_gib, load_ms, size_bytes, build_ms, software, note, source.
        What was not measured is empty.

    Raises:
        WanlabError: no result, or one of other work, with the fields and both values.
    """
    if not results:
        raise WanlabError("no result to put into a platform table; measure one, or read a run of 10_baseline")
    first = first or _first(results)
    newest: dict[tuple, Result] = {}
    for result in results:
        if first and (reasons := other_work(result, first)) and not allow_different:
            raise WanlabError(
                f"{result.source} ({_machine(result)}, {result.engine_name}) is other work: {'; '.join(reasons)};"
                " leave it out with runs.comparable, or pass allow_different=True to mark it"
            )
        key = (_machine(result), result.engine_name, result.dtype, result.work, result.plan, result.state)
        if key not in newest or _worth(result) >= _worth(newest[key]):
            newest[key] = result
    rows = list(newest.values())
    eager = baselines(
        rows,
        [row for row in rows if row.engine == "eager"],
        lambda row: (_machine(row), row.work, row.plan, row.dtype),
        lambda row: (_machine(row), row.work, row.plan),  # in another dtype, which the note says
    )
    return pd.DataFrame([_row(row, first, base) for row, base in zip(rows, eager, strict=True)])


def platform_verdict(table: pd.DataFrame, refused: pd.DataFrame) -> str:
    """The table in two sentences: what each engine of the first machine gains over eager, and the fastest row of all."""
    measured = table[table["state"] == MEASURED]
    if measured.empty:
        return f"Nothing here was measured: {platform_notes(table, refused)}."
    best, first = measured.loc[measured["latency_ms"].idxmin()], measured.iloc[0]
    gains = []
    for _, row in measured[measured["machine"] == first["machine"]].iterrows():
        if row["engine"] == "eager" or math.isnan(row["ratio_to_eager"]):
            continue
        figures = (row["ratio_to_eager"], row["low"], row["high"], row["noise_percent"])
        verdict = NOT_DISTINGUISHABLE if NOT_DISTINGUISHABLE in row["note"] else ""
        names = {"candidate": row["engine"], "baseline": "eager", "here": row["source"] == HERE}
        gains.append(verdict_sentence(verdict, *figures, **names))
    work = f"{first['model']} {first['what']}, {first['shape']}: "
    rows = f"{_count(len(measured), 'row')} on {_count(measured['machine'].nunique(), 'machine')}"
    end = f"{rows}: {best['engine']} {best['precision']} on {best['machine']}, {best['latency_ms']:,.1f} ms."
    return work + (f"{'; '.join(gains)}. Fastest of {end}" if gains else f"fastest of {end}")


def platform_notes(table: pd.DataFrame, refused: pd.DataFrame) -> str:
    """What is in the table without figures, and what is not in it: engines only built, rows of other work."""
    notes = [built] if (built := _built(table)) else []
    notes += [f"{_count(len(refused), 'row')} refused as other work"] if len(refused) else []
    return "; ".join(notes)


def _row(result: Result, first: Result | None, eager: Result | None) -> dict[str, Any]:
    work, ms, ran = result.work, result.time_ms, result.state == MEASURED
    ratio = Ratio(math.nan, math.nan, math.nan, math.nan, "")
    if eager and ms and eager.time_ms:
        by = "time_per_video_ms" if work.component is None else "time_per_call_ms"
        ratio = ratio_to(eager, result, by)
    notes = other_work(result, first) if first else []
    if not ran:
        notes.append(f"{work.component} built for it, not executed: no such machine here".strip())
    elif result.noise_percent is None:
        notes.append("no A/A control: its noise is not known")
    elif ratio.verdict == NOT_DISTINGUISHABLE:
        notes.append("not distinguishable from eager")
    if ran and eager is None:
        notes.append("no eager row of this machine")
    if eager and eager.dtype != result.dtype:
        notes.append(f"eager is in {eager.dtype}")
    return {
        "machine": _machine(result),
        "memory_gib": _number(result.machine.memory_gib if result.machine else None),
        "state": result.state,
        "engine": result.engine_name,
        "precision": result.dtype or "",
        "plan": result.plan,
        "model": work.model,
        "what": work.what if ran else work.component,
        "shape": work.shape if ran else "",
        "steps": work.steps,
        "seed": work.seed,
        "latency_ms": _number(ms),
        "latency_per_frame_ms": ms / work.frames
        if ms and work.component is None and work.frames
        else math.nan,
        "throughput_per_s": 1e3 / ms if ms else math.nan,
        "ratio_to_eager": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "noise_percent": _number(result.noise_percent),
        "samples": result.n,
        "peak_memory_gib": _number(result.peak_memory_gib),
        "load_ms": _number(result.load_ms),
        "size_bytes": _number(result.size_bytes),
        "build_ms": _number(result.build_ms),
        "software": ", ".join(f"{name} {version}" for name, version in result.software.items()),
        "note": "; ".join(notes),
        "source": result.source,
    }


def _built(table: pd.DataFrame) -> str:
    """How many engines were built for how many machines; one engine may serve several. Empty without any."""
    rows = table[table["state"] == BUILT]
    if rows.empty:
        return ""
    engines = _count(len(rows.drop_duplicates(["engine", "precision", "model", "what", "source"])), "engine")
    return f"{engines} built for {_count(rows['machine'].nunique(), 'machine')} not there, not executed"


def _first(results: Sequence[Result]) -> Result | None:
    return next((result for result in results if result.state == MEASURED), None)


def _worth(result: Result) -> tuple[bool, str]:
    return result.noise_percent is not None, result.taken


def _machine(result: Result) -> str:
    return result.machine.name if result.machine else ""


def _what(result: Result) -> str:
    if result.state == BUILT:
        return f"{result.work.model} {result.work.component}, {BUILT}"
    return f"{result.work}{f', {result.plan}' if result.plan else ''}"


def _value(name: str, value: Any) -> str:
    """A field's value in words; no component is the whole video, no plan none."""
    return str(value) if value is not None else {"component": VIDEO, "plan": "none"}.get(name, "not known")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
