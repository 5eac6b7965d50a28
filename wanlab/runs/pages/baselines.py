"""Which baseline a run is held against, whether both did the same work, and how many times better it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wanlab.errors import WanlabError
from wanlab.runs.comparison.metrics import known, ratio
from wanlab.runs.comparison.same_work import differences, machine_of, work_of
from wanlab.runs.files import read_json
from wanlab.runs.pages.board import Board
from wanlab.runs.pages.columns import missing, number


def baseline_rows(board: Board) -> list[int | None]:
    """For each row the row of its baseline: the one that agrees with it on all axes that the baseline leaves open."""
    fixed = {f"p.{name}" for name in board.sweep.get("baseline") or {}}
    others = [name for name in board.axes if name not in fixed]
    rows = board.frame[others].to_dict(orient="records") if others else [{}] * len(board.entries)
    keys = [tuple(repr(value) for value in row.values()) for row in rows]
    bases: dict[tuple, int] = {}
    for i, (entry, key) in enumerate(zip(board.entries, keys, strict=True)):
        if entry.baseline and entry.state == "finished":
            bases.setdefault(key, i)
    return [bases.get(key) for key in keys]


def work(board: Board) -> list[dict[str, Any]]:
    """What each run did and on what, as far as it recorded it; {} for those that did not finish."""
    names = {prefix: [n for n in board.frame.columns if n.startswith(prefix)] for prefix in ("m.work.", "p.")}
    rows = board.frame[[*names["m.work."], *names["p."]]].to_dict(orient="records")
    device = board.frame.get("m.samples.device")
    found: list[dict[str, Any]] = []
    for i, (entry, row) in enumerate(zip(board.entries, rows, strict=True)):
        told = {
            prefix: {name[len(prefix) :]: row[name] for name in own if not missing(row[name])}
            for prefix, own in names.items()
        }
        if entry.state != "finished" or entry.folder is None:
            found.append({})
            continue
        at = device.iloc[i] if device is not None and not missing(device.iloc[i]) else ""
        done = work_of({"work": told["m.work."]}, told["p."])
        found.append(done | machine_of(_environment(entry.folder), at))
    return found


def differing(board: Board, rows: list[int | None]) -> list[list[str]]:
    """For each row the fields in which its work or its machine is not its baseline's."""
    done = work(board)
    return [
        [name for name, *_ in differences(done[i], done[base])] if base is not None and done[i] else []
        for i, base in enumerate(rows)
    ]


def mixed(board: Board) -> list[str]:
    """Fields in which the runs that finished differ from one another."""
    done = [one for one in work(board) if one]
    found = [name for one in done[1:] for name, *_ in differences(one, done[0])]
    return list(dict.fromkeys(found))


def ratios(board: Board) -> tuple[dict[str, list[float | None]], list[list[str]]]:
    """Times better than its baseline for each metric and row, and in what a row's work differs: it has no ratio then."""
    rows = baseline_rows(board)
    apart = differing(board, rows)
    found = {}
    for column in board.metrics:
        if not column.ratio or not any(base is not None for base in rows):
            continue
        values = [number(value) for value in board.frame[column.name]]
        found[column.name] = [
            _times(column.name, values, i, base) if not apart[i] and not board.entries[i].baseline else None
            for i, base in enumerate(rows)
        ]
    return found, apart


def _times(name: str, values: list[float | None], i: int, base: int | None) -> float | None:
    if base is None or not known(values[i]) or not known(values[base]):
        return None
    times = ratio(name, values[i], values[base])
    return times if known(times) and abs(times) != float("inf") else None


def _environment(folder: Any) -> Mapping[str, Any]:
    try:
        record = read_json(folder / "run.json")
        environment = record.get("environment")
    except (WanlabError, AttributeError):
        return {}
    return environment if isinstance(environment, Mapping) else {}
