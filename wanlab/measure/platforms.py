"""The same work on different machines and engines, side by side; what is not the same work is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wanlab.errors import WanlabError
from wanlab.measure.platform_records import BUILT, MEASURED, VIDEO, PlatformRecord, Work

if TYPE_CHECKING:
    import pandas as pd


def comparable(
    records: Sequence[PlatformRecord], work: Work | None = None
) -> tuple[list[PlatformRecord], pd.DataFrame]:
    """Split records into those of this work, and the others with their reasons.

    Args:
        work: None takes the first record's that ran. Engines that were built only did no work; they are kept where they
            are of the model, and of the component that was timed.

    Returns:
        The records that `platform_table` takes, in their order, and a DataFrame of the others: source, machine,
        engine, what, reason (every field that differs, with both values).
    """
    import pandas as pd

    kept, refused, work = [], [], work or _first_work(records)
    for record in records:
        reasons = _reasons(record, work)
        if not reasons:
            kept.append(record)
            continue
        refused.append(
            {
                "source": record.source,
                "machine": record.machine,
                "engine": record.engine,
                "what": str(record.work or f"{record.model} {record.component}, {record.state}"),
                "reason": "; ".join(reasons),
            }
        )
    return kept, pd.DataFrame(refused, columns=["source", "machine", "engine", "what", "reason"])


def platform_table(
    records: Sequence[PlatformRecord], *, work: Work | None = None, allow_different: bool = False
) -> pd.DataFrame:
    """One row per machine, engine and precision: the newest record of each, of those with an A/A control if any.

    Args:
        work: that all of them must have done; None takes the first measured record's.
        allow_different: keep rows of other work, each with a note that says in what it differs.

    Returns:
        machine, memory_gib, state, engine, precision, plan, model, what, shape, steps, seed, latency_ms,
        latency_per_frame_ms and throughput_per_s (videos or calls), ratio_to_eager (eager's latency on the same machine
        over this one, above 1 is faster; eager in the same precision where there is one), noise_percent, samples,
        peak_memory_gib, load_ms, size_bytes, build_ms, software, note, source.
        What was not measured is empty.

    Raises:
        WanlabError: no record, or one of other work, with the fields and both values.
    """
    import pandas as pd

    if not records:
        raise WanlabError("no record to put into a platform table; measure one, or read a run of 10_baseline")
    work = work or _first_work(records)
    newest: dict[tuple, PlatformRecord] = {}
    for record in records:
        if (reasons := _reasons(record, work)) and not allow_different:
            raise WanlabError(
                f"{record.source} ({record.machine}, {record.engine}) is other work: {'; '.join(reasons)};"
                " leave it out with measure.comparable, or pass allow_different=True to mark it"
            )
        built = (record.state, record.model, record.component)
        key = (record.machine, record.engine, record.precision, record.work, *built)
        if key not in newest or _worth(record) >= _worth(newest[key]):
            newest[key] = record
    eager = [record for record in newest.values() if record.engine == "eager"]
    return pd.DataFrame([_row(record, work, _baseline(record, eager)) for record in newest.values()])


def platform_verdict(table: pd.DataFrame, refused: pd.DataFrame) -> str:
    """The table in a sentence: the fastest row, what each engine did against eager, what was left out."""
    measured = table[table["state"] == MEASURED]
    if measured.empty:
        return f"Nothing here was measured: {_built(table)}."
    best = measured.loc[measured["latency_ms"].idxmin()]
    first = measured.iloc[0]
    said = [
        f"{first['model']} {first['what']}, {first['shape']}: {_count(measured['machine'].nunique(), 'machine')},"
        f" {_count(len(measured), 'row')};"
        f" fastest {best['engine']} {best['precision']} on {best['machine']}, {best['latency_ms']:,.1f} ms"
    ]
    for _, row in measured[measured["machine"] == first["machine"]].iterrows():
        ratio = row["ratio_to_eager"]
        if row["engine"] == "eager" or math.isnan(ratio):
            continue
        noise = row["noise_percent"]
        floor = "noise not known" if math.isnan(noise) else f"noise {noise:.1f} %"
        if "not distinguishable" in row["note"]:
            said.append(f"{row['engine']} not distinguishable from eager ({floor})")
        else:
            how = f"{ratio:.2f}x as fast as" if ratio > 1 else f"{1 / ratio:.2f}x slower than"
            said.append(f"{row['engine']} {how} eager ({floor})")
    said += [built] if (built := _built(table)) else []
    said += [f"{_count(len(refused), 'row')} refused as other work"] if len(refused) else []
    return "; ".join(said) + "."


def _row(record: PlatformRecord, work: Work | None, eager: PlatformRecord | None) -> dict[str, Any]:
    mine, ms = record.work, record.latency_ms
    ratio = eager.latency_ms / ms if eager and eager.latency_ms and ms else math.nan
    notes = _reasons(record, work)
    if record.state == BUILT:
        notes.append(f"{record.component} built for it, not executed: no such machine here".strip())
    elif record.noise_percent is None:
        notes.append("no A/A control: its noise is not known")
    elif eager and record is not eager:
        noise = max(record.noise_percent, eager.noise_percent or 0)
        if max(ratio, 1 / ratio) - 1 <= noise / 100:
            notes.append("not distinguishable from eager")
    if record.state == MEASURED and eager is None:
        notes.append("no eager row of this machine")
    if eager and eager.precision != record.precision:
        notes.append(f"eager is in {eager.precision}")
    return {
        "machine": record.machine,
        "memory_gib": record.memory_gib,
        "state": record.state,
        "engine": record.engine,
        "precision": record.precision,
        "plan": mine.plan if mine else None,
        "model": mine.model if mine else record.model,
        "what": mine.what if mine else record.component,
        "shape": f"{mine.frames}x{mine.height}x{mine.width}" if mine else "",
        "steps": mine.steps if mine else None,
        "seed": mine.seed if mine else None,
        "latency_ms": _number(ms),
        "latency_per_frame_ms": ms / mine.frames if ms and mine and mine.what == VIDEO else math.nan,
        "throughput_per_s": 1e3 / ms if ms else math.nan,
        "ratio_to_eager": ratio,
        "noise_percent": _number(record.noise_percent),
        "samples": record.samples,
        "peak_memory_gib": _number(record.peak_memory_gib),
        "load_ms": _number(record.load_ms),
        "size_bytes": _number(record.size_bytes),
        "build_ms": _number(record.build_ms),
        "software": ", ".join(f"{name} {version}" for name, version in record.software.items()),
        "note": "; ".join(notes),
        "source": record.source,
    }


def _baseline(record: PlatformRecord, eager: Sequence[PlatformRecord]) -> PlatformRecord | None:
    """Eager's record of the same work on the same machine, in the same precision if there is one."""
    same = [one for one in eager if (one.machine, one.work) == (record.machine, record.work)]
    return next((one for one in same if one.precision == record.precision), same[0] if same else None)


def _built(table: pd.DataFrame) -> str:
    """How many engines were built for how many machines; one engine may serve several. Empty without any."""
    rows = table[table["state"] == BUILT]
    if rows.empty:
        return ""
    engines = _count(len(rows.drop_duplicates(["engine", "precision", "model", "what", "source"])), "engine")
    return f"{engines} built for {_count(rows['machine'].nunique(), 'machine')} not there, not executed"


def _first_work(records: Sequence[PlatformRecord]) -> Work | None:
    return next((record.work for record in records if record.work), None)


def _reasons(record: PlatformRecord, work: Work | None) -> list[str]:
    return record.differences(work) if work else []


def _worth(record: PlatformRecord) -> tuple[bool, str]:
    return record.noise_percent is not None, record.taken


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
