"""index.html: all runs of a folder on one page that opens offline. Failures first, then what is worth choosing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import plotly.io as pio
from markupsafe import Markup

from wanlab.core.effects import NOT_APPLIED
from wanlab.core.errors import WanlabError
from wanlab.core.files import read_json, write_text
from wanlab.pages import sweep_table, templates
from wanlab.pages.sweep_table import (
    BesideBaseline,
    ClipEmbedder,
    Column,
    RunRow,
    SweepTable,
    gather,
    href,
    verdict,
)
from wanlab.plots.style import theme
from wanlab.runs.choose import Choice, choose, pareto
from wanlab.runs.compare import compare
from wanlab.runs.results import is_time

QUALITY = "m.quality_loss_percent"
PLAYING = 12  # clips that play at once
SCRIPTS = ("state", "filters", "table", "clips", "frontier", "lines", "start")

Linked = Callable[[Path], bool]


def render_index(folder: str | Path) -> Path:
    """Write index.html of a sweep's folder, or of any folder of runs.

    Raises:
        WanlabError: no such folder, or no run in it.
    """
    board = gather(folder)
    text, _ = page_of(board)
    return write_text(board.root / "index.html", text)


def page_of(board: SweepTable, linked: Linked = lambda path: True) -> tuple[str, list[Path]]:
    """The page as text, and the clips that it plays from files. `linked` says which reports and notebooks may be."""
    axes = sweep_table.axes(board.frame[board.measured], board.metrics)
    start = sweep_table.default_axes(axes)
    pairs = _frontiers(board, axes)
    best = _efficient(pairs, axes, start)
    beside = sweep_table.beside_baselines(board)
    ratios = sweep_table.ratios(board, beside)
    shelf = ClipEmbedder(board.root)
    runs = [_run(*each, board, linked) for each in zip(board.entries, beside, strict=True)]
    first = [i for i, entry in enumerate(board.entries) if entry.baseline]
    selected = [i for i in dict.fromkeys(first + best) if board.measured[i]]
    reference = _reference(board, selected, shelf)
    for i in dict.fromkeys(selected + list(range(len(runs)))):
        if "video" in board.entries[i].clips:
            runs[i]["clip"] = shelf.put(board.entries[i].clips["video"])
    if not start:
        selected = [i for i, run in enumerate(runs) if "clip" in run][:PLAYING]
    choice = _choice(board) if start and best else None
    failures = [(entry, run) for entry, run in zip(board.entries, runs, strict=True) if entry.failed]
    states = [entry.state for entry in board.entries]
    text = templates.fill(
        "index.html",
        title=board.title,
        state=_state(board, states),
        verdict=verdict(board),
        lead=choice.text if choice else _frontier_text(board, axes, start, best, ratios, beside),
        lead_notes="; ".join(choice.notes).capitalize() if choice else "",
        problems=board.problems + _caution(board),
        facts=_facts(board),
        failures=[
            {
                "label": entry.title,
                "what": templates.WORDS.get(entry.state, entry.state),
                "where": entry.where,
                "reason": entry.reason,
                "href": run["report"],
            }
            for entry, run in failures
        ],
        sweeps=_sweeps(board.root) if not board.sweep else [],
        frontier=bool(start),
        baseline=any(entry.baseline for entry in board.entries),
        lines=len(board.axes) + len(axes) >= 2 and sum(board.measured) >= 2,
        clips=any("clip" in run for run in runs),
        embedded=shelf.inside,
        outside=bool(shelf.outside),
        css=templates.asset("base.css", "index.css"),
        script=templates.asset("page.js", *(f"index/{part}.js" for part in SCRIPTS)),
        plotly=templates.plotly_script() if start else Markup(""),
        board=templates.json_script(
            {
                "name": board.root.name,
                "columns": sweep_table.columns_of(board, axes),
                "runs": runs,
                "table": sweep_table.table_of(board),
                "ratios": ratios,
                "same": sweep_table.indistinguishable(board, beside),
                "axes": [column.name for column in axes],
                "pairs": pairs,
                "start": start,
                "selected": selected[:PLAYING],
                "playing": PLAYING,
                "reference": reference,
                "not_applied": NOT_APPLIED,
                "states": {state: templates.WORDS.get(state, state) for state in dict.fromkeys(states)},
                "layout": _layout(),
            }
        ),
    )
    return text, shelf.outside


def _run(entry: RunRow, beside: BesideBaseline, board: SweepTable, linked: Linked) -> dict[str, Any]:
    """One run for the page's script. Labels are text there, addresses were made by `href`."""
    folder = entry.folder
    files = {"report": folder and folder / "report.html", "notebook": folder and folder / "executed.ipynb"}
    return {
        "id": entry.run_id,
        "label": entry.label,
        "title": entry.title,
        "state": entry.state,
        "baseline": entry.baseline,
        "machine": entry.machine,
        "apart": ", ".join(name.replace("_", " ") for name in beside.other),
        **{name: href(path, board.root) if path and linked(path) else None for name, path in files.items()},
    }


def _reference(board: SweepTable, selected: list[int], shelf: ClipEmbedder) -> dict[str, Any] | None:
    """What the clips are read against: the ground truth, or else the original where no run is the baseline."""
    for i in selected or range(len(board.entries)):
        clips = board.entries[i].clips
        for name, words in (("truth", "ground truth"), ("original", "original")):
            if name in clips and not (name == "original" and any(entry.baseline for entry in board.entries)):
                return {"title": words, "clip": shelf.put(clips[name])}
    return None


def _frontiers(board: SweepTable, axes: list[Column]) -> dict[str, list[int]]:
    """For each pair of axes "i,j", i < j: the rows that no other row beats on both."""
    found = {}
    for (i, one), (j, two) in combinations(enumerate(axes), 2):
        part = board.frame[[one.name, two.name]].apply(
            lambda column: column.map(sweep_table.number).astype(float)
        )
        rows = np.flatnonzero(np.asarray(board.measured) & np.isfinite(part).all(axis=1).to_numpy())
        best = pareto(part.iloc[rows], {one.name: one.better, two.name: two.better})
        found[f"{i},{j}"] = [int(row) for row in rows[np.asarray(best, bool)]]
    return found


def _efficient(pairs: dict[str, list[int]], axes: list[Column], start: tuple[str, str] | None) -> list[int]:
    if not start:
        return []
    i, j = sorted([column.name for column in axes].index(name) for name in start)
    return pairs[f"{i},{j}"]


def _caution(board: SweepTable) -> list[str]:
    fields = sweep_table.mixed(board) if board.metrics else []
    if not fields:
        return []
    names = ", ".join(name.replace("_", " ") for name in fields)
    return [f"These runs differ in {names}: compare times and memory only between runs that agree."]


def _frontier_text(
    board: SweepTable,
    axes: list[Column],
    start: tuple[str, str] | None,
    best: list[int],
    ratios: dict[str, Any],
    beside: list[BesideBaseline],
) -> str | None:
    """How many runs are on the first frontier, and the best of them by its first metric."""
    if not start or not best:
        return None
    by = {column.name: column for column in axes}
    x, y = by[start[0]], by[start[1]]
    values = [sweep_table.number(value) for value in board.frame[x.name]]
    first = min(best, key=lambda i: values[i] if x.better == "min" else -values[i])
    ratio = (ratios.get(x.name) or [None] * len(values))[first]
    gain = f", {ratio:.2f}× better than its baseline" if ratio else ""
    if ratio and is_time(x.name) and beside[first].same:
        gain = ", which cannot be told from its baseline's"
    worth = "1 run is" if len(best) == 1 else f"{len(best)} runs are"
    return (
        f"{worth} on the frontier of {x.title} and {y.title}. Best {x.title}: {board.entries[first].title}, "
        f"{values[first]:,.4g} {x.unit}".rstrip()
        + f"{gain}."
    )


def _choice(board: SweepTable) -> Choice | None:
    """The answer of `60_sweep`, over all samples and repeats; None where no baseline or no quality loss was recorded."""
    if not board.sweep.get("baseline") or QUALITY not in board.frame.columns:
        return None
    try:
        return choose(compare(board.configurations))
    except WanlabError:  # a baseline that did not finish, or that fits several: the page says what it can
        return None


def _state(board: SweepTable, states: list[str]) -> tuple[str, str]:
    """Class and words of the pill in the head."""
    failed = sum(state not in ("finished", "pending", "running") for state in states)
    whole = board.sweep.get("state")
    if whole == "aborted":
        return "aborted", "aborted"
    if failed:
        return "failed", f"{failed} failed"
    if whole in ("running", "incomplete") or "running" in states or "pending" in states:
        return "running", str(whole or "running")
    return "finished", "finished"


def _facts(board: SweepTable) -> list[tuple[str, str]]:
    sweep = board.sweep
    executor = sweep.get("executor") if isinstance(sweep.get("executor"), dict) else {}
    slots = f"{executor.get('kind')}, {executor.get('slots')} at a time" if executor else None
    baseline = sweep.get("baseline") if isinstance(sweep.get("baseline"), dict) else {}
    versions = sorted({str(v) for v in board.frame["wanlab"] if not sweep_table.missing(v)})
    facts = [
        ("grid", sweep.get("grid_file")),
        ("varied", ", ".join(name.removeprefix("p.") for name in board.axes) if sweep else None),
        ("baseline", ", ".join(f"{name} = {templates.shown(value)}" for name, value in baseline.items())),
        ("started", templates.readable(sweep.get("started") or sweep.get("created")) if sweep else None),
        ("executor", slots),
        ("wanlab", ", ".join(versions)),
    ]
    return [(key, str(value)) for key, value in facts if value]


def _sweeps(root: Path) -> list[dict[str, Any]]:
    """Sweeps in this folder, for a page of all runs."""
    found = []
    for path in sorted(root.glob("*/sweep.json")):
        try:
            sweep = read_json(path)
            runs = sweep.get("runs") or []
            found.append(
                {
                    "title": sweep.get("title") or path.parent.name,
                    "state": sweep.get("state"),
                    "runs": len(runs),
                    "href": href(path.with_name("index.html"), root),
                }
            )
        except (WanlabError, AttributeError, TypeError):
            continue
    return found


def _layout() -> dict[str, Any]:
    """The theme of all figures, as plotly takes it."""
    return pio.templates[theme()].layout.to_plotly_json()
