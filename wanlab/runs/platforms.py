"""Results of several machines in one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from wanlab.core.answer import Answer, Tile, answer, speed_text, step
from wanlab.core.errors import WanlabError
from wanlab.core.paths import data
from wanlab.core.stats import interval_text
from wanlab.core.words import capital, shown
from wanlab.engines.registry import engine_text
from wanlab.measure.timing import NOT_DISTINGUISHABLE
from wanlab.runs.compare import Ratio, baselines, ratio_to
from wanlab.runs.result import BUILT, HERE, MEASURED, VIDEO, Machine, Result
from wanlab.runs.results import number
from wanlab.runs.same_work import differences, load_text

RESULTS = data("results", "platforms.jsonl")
DIFFER = ("machine", "software", "dtype")
"""Fields in which the rows of a platform table may differ: the table compares or shows them."""


def other_work(result: Result, first: Result) -> list[str]:
    """Fields in which a row did other work than the first, without machine and dtype: `"steps is 10, here 2"`.

    A precision plan counts as work here. An engine that did not run is compared by its model, and by its component
    where the first row is of one component.
    """
    if BUILT in (result.state, first.state):
        names = ["model"] + ["component"] * (first.work.component is not None)
        pairs = [(name, getattr(result.work, name), getattr(first.work, name)) for name in names]
        pairs = [pair for pair in pairs if pair[1] and pair[1] != pair[2]]
    else:
        pairs = differences(result, first, DIFFER)
        pairs += [("plan", result.plan, first.plan)] if result.plan != first.plan else []
    return [f"{name} is {_text(name, value)}, here {_text(name, other)}" for name, value, other in pairs]


def comparable(results: Sequence[Result], first: Result | None = None) -> tuple[list[Result], pd.DataFrame]:
    """Split results into those that did the work of the first, and the others with their reasons.

    Args:
        first: the result whose work counts; None takes the first that ran. Engines that were built only did no work; they
            are kept where their model is the same, and their component where the first row is of one component.

    Returns:
        The results that `platform_table` takes, in their order, and a DataFrame of the others: source, machine,
        engine, what, reason (every field that differs, with both values).
    """
    first = first or _first(results)
    reasons = [other_work(result, first) if first else [] for result in results]
    pairs = list(zip(results, reasons, strict=True))
    refused = [
        (result.source, _machine(result), result.engine_name, _what(result), "; ".join(why))
        for result, why in pairs
        if why
    ]
    frame = pd.DataFrame(refused, columns=["source", "machine", "engine", "what", "reason"])
    return [result for result, why in pairs if not why], frame


def platform_table(
    results: Sequence[Result], *, first: Result | None = None, allow_different: bool = False
) -> pd.DataFrame:
    """One row per machine, engine and dtype: the newest result of each, of those with an A/A control if any.

    Args:
        first: the result whose work all must have done; None takes the first that ran.
        allow_different: keep rows of other work, each with a note of the fields in which it differs.

    Returns:
        machine, memory_gib, state, engine, precision, plan, model, what, shape, steps, seed, latency_ms,
        latency_per_frame_ms and throughput_per_s (videos or calls), ratio_to_eager (eager's latency on the same machine
        over this one, above 1 is faster; eager in the same dtype where there is one), low and high (its 95 % interval),
        noise_percent, samples, peak_memory_gib, load_ms, size_bytes, build_ms, software, note, source, on_record_ms (the
        shortest latency of all results of this row, of which the newest is shown).
        A figure that was not measured is NaN.

    Raises:
        WanlabError: no result, or one of other work, with the fields and both values.
    """
    if not results:
        raise WanlabError("no result to put into a platform table; measure one, or read a run of 10_baseline")
    first = first or _first(results)
    newest: dict[tuple, Result] = {}
    shortest: dict[tuple, float] = {}
    for result in results:
        if first and (reasons := other_work(result, first)) and not allow_different:
            raise WanlabError(
                f"{result.source} ({_machine(result)}, {result.engine_name}) is other work: {'; '.join(reasons)};"
                " leave it out with runs.comparable, or pass allow_different=True to mark it"
            )
        key = (_machine(result), result.engine_name, result.dtype, result.work, result.plan, result.state)
        shortest[key] = min(shortest.get(key, math.inf), result.time_ms or math.inf)
        if key not in newest or _worth(result) >= _worth(newest[key]):
            newest[key] = result
    rows = list(newest.values())
    eager = baselines(
        rows,
        [row for row in rows if row.engine == "eager"],
        lambda row: (_machine(row), row.work, row.plan, row.dtype, row.setup.get("torch")),
        lambda row: (_machine(row), row.work, row.plan, row.dtype),
        lambda row: (_machine(row), row.work, row.plan),  # in another dtype, which the note names
    )
    frame = pd.DataFrame([_row(row, first, base) for row, base in zip(rows, eager, strict=True)])
    return frame.assign(on_record_ms=[ms if math.isfinite(ms) else math.nan for ms in shortest.values()])


def platform_answer(table: pd.DataFrame, refused: pd.DataFrame) -> Answer:
    """What the fastest engine of the first machine gains over eager; below it the others and the fastest row on record.

    Args:
        table: from `platform_table`. refused: rows of other work, from `comparable`.
    """
    measured = table[table["state"] == MEASURED]
    if measured.empty:
        return answer(
            f"Nothing here was measured: {platform_notes(table, refused)}.",
            next=step("give results= of the same work, or leave runs= out, which measures this machine"),
        )
    first, best = measured.iloc[0], measured.loc[measured["latency_ms"].idxmin()]
    here = first["source"] == HERE
    place, base = "On this machine" if here else f"On {first['machine']}", engine_text("eager")
    own = measured[measured["machine"] == first["machine"]]
    gains = own[(own["engine"] != "eager") & own["ratio_to_eager"].notna()]
    gains = gains.sort_values("ratio_to_eager", ascending=False, kind="stable").to_dict("records")
    said = [_gain_text(row, base) for row in gains]
    head = f"{place}, {said[0]}" if said else f"{place}, only {engine_text(first['engine'])} was measured"
    fastest = _row_text(best)
    rows = f"{_count(len(measured), 'row')} of {_count(measured['machine'].nunique(), 'machine')}"
    record, older = measured.loc[measured["on_record_ms"].idxmin()], ""
    if record["on_record_ms"] < best["latency_ms"]:
        older = f"; an older result of {_row_text(record)} is faster, {shown(record['on_record_ms'], 'ms')}"
    details = [
        f"{capital('; '.join(said[1:]))}." if said[1:] else "",
        f"Fastest of {rows}: {fastest}, {shown(best['latency_ms'], 'ms')}{older}. The work: {first['model']}"
        f" {first['what']}, {first['shape']}.",
        f"{capital(notes)}." if (notes := platform_notes(table, refused)) else "",
    ]
    tiles = []
    if gains:
        row = gains[0]
        noise = (
            f"; noise {row['noise_percent']:.0f} %" if row["noise_percent"] == row["noise_percent"] else ""
        )
        known = interval_text(row["low"], row["high"])
        tiles.append(Tile("speed-up", f"{row['ratio_to_eager']:.2f}×", f"{known}{noise}"))
        own_ms = shown(row["latency_ms"], "ms")
        eager = own.loc[own["engine"] == "eager", "latency_ms"]
        beside = f"{shown(eager.iloc[0], 'ms')} in {base}" if len(eager) else ""
        tiles.append(Tile(f"time with {engine_text(row['engine'])}", own_ms, beside))
    tiles.append(Tile("fastest of all machines", shown(best["latency_ms"], "ms"), fastest))
    tiles.append(
        Tile("compared", rows.partition(" of ")[0], f"of {_count(measured['machine'].nunique(), 'machine')}")
    )
    tiles.append(Tile("refused", str(len(refused)), "rows of other work"))
    joined = "this notebook on another machine, and then here with runs= of both, puts them into one table"
    return answer(f"{head}.", *details, tiles=tuple(tiles), next=step(joined))


def _row_text(row: pd.Series) -> str:
    """Engine, dtype and machine of a row."""
    return f"{engine_text(row['engine'])} {row['precision']} on {row['machine']}"


def _gain_text(row: dict[str, Any], base: str) -> str:
    """An engine beside eager on its machine."""
    return speed_text(
        row["ratio_to_eager"],
        row["low"],
        row["high"],
        candidate=engine_text(row["engine"]),
        baseline=base,
        same=NOT_DISTINGUISHABLE in row["note"],
        noise_percent=row["noise_percent"],
    )


def platform_notes(table: pd.DataFrame, refused: pd.DataFrame) -> str:
    """What is in the table without figures, and what is not in it: engines only built, rows of other work."""
    notes = [built] if (built := _built(table)) else []
    notes += [f"{_count(len(refused), 'row')} refused as other work"] if len(refused) else []
    return "; ".join(notes)


def _row(result: Result, first: Result | None, eager: Result | None) -> dict[str, Any]:
    work, ms, ran = result.work, result.time_ms, result.state == MEASURED
    ratio = Ratio(math.nan, math.nan, math.nan, math.nan, "")
    if eager and ms and eager.time_ms:
        ratio = ratio_to(eager, result, result.time_name)
    notes = other_work(result, first) if first else []
    if not ran:
        notes.append(f"{work.component} built for it, not executed: no such machine here".strip())
    elif result.noise_percent is None:
        notes.append("no A/A control: its noise is not known")
    elif ratio.verdict == NOT_DISTINGUISHABLE:
        notes.append("not distinguishable from eager")
    if ran and eager is None:
        notes.append("no eager row of this machine")
    if ran and (busy := load_text([result, eager])):
        notes.append(f"timed while {busy}")
    if eager and eager.setup.get("torch") != result.setup.get("torch"):
        notes.append(f"eager is of PyTorch {eager.setup.get('torch')}, this of {result.setup.get('torch')}")
    if eager and eager.dtype != result.dtype:
        notes.append(f"eager is in {eager.dtype}")
    return {
        "machine": _machine(result),
        "memory_gib": number((result.machine or Machine()).memory_gib),
        "state": result.state,
        "engine": result.engine_name,
        "precision": result.dtype or "",
        "plan": result.plan,
        "model": work.model,
        "what": work.what if ran else work.component,
        "shape": work.shape if ran else "",
        "steps": work.steps,
        "seed": work.seed,
        "latency_ms": number(ms),
        "latency_per_frame_ms": number(result.row().get("time_per_frame_ms")),
        "throughput_per_s": 1e3 / ms if ms else math.nan,
        "ratio_to_eager": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "noise_percent": number(result.noise_percent),
        "samples": result.n,
        "peak_memory_gib": number(result.peak_memory_gib),
        "load_ms": number(result.load_ms),
        "size_bytes": number(result.size_bytes),
        "build_ms": number(result.build_ms),
        "software": ", ".join(f"{name} {version}" for name, version in result.software.items()),
        "note": "; ".join(notes),
        "source": result.source,
    }


def _built(table: pd.DataFrame) -> str:
    """Number of engines that were only built, and of the machines they were built for; "" without any."""
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


def _text(name: str, value: Any) -> str:
    """A field's value in words; without a component it is the whole video."""
    return str(value) if value is not None else {"component": VIDEO, "plan": "none"}.get(name, "not known")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
