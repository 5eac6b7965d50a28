"""index.html: all runs of a folder on one page that opens offline: failures, the choice, the frontier, all runs."""

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
from wanlab.core.files import write_text
from wanlab.core.words import capital, typed_value
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
from wanlab.runs.compare import cautions, compare
from wanlab.runs.next_step import next_html, next_step
from wanlab.runs.results import is_time, read_sweep

QUALITY = "m.quality_loss_percent"
PLAYING = 12  # clips that play at once
SCRIPTS = ("state", "filters", "table", "clips", "frontier", "lines", "start")

Linked = Callable[[Path], bool]


def render_index(folder: str | Path) -> Path:
    """Write index.html of a sweep's folder, or of any folder of runs.

    Raises:
        WanlabError: no such folder, or no run in it.
    """
    table = gather(folder)
    text, _ = page_of(table)
    return write_text(table.root / "index.html", text)


def page_of(table: SweepTable, linked: Linked = lambda path: True) -> tuple[str, list[Path]]:
    """The page as text, and the clips that it plays from files. `linked` selects the reports and notebooks it links to."""
    axes = sweep_table.axes(table.frame[table.measured], table.metrics)
    start = sweep_table.default_axes(axes)
    frontiers = _frontiers(table, axes)
    best = _efficient(frontiers, axes, start)
    beside = sweep_table.beside_baselines(table)
    ratios = sweep_table.ratios(table, beside)
    embedder = ClipEmbedder(table.root)
    runs = [_run(*each, table, linked) for each in zip(table.entries, beside, strict=True)]
    baselines = [i for i, entry in enumerate(table.entries) if entry.baseline]
    selected = [i for i in dict.fromkeys(baselines + best) if table.measured[i]]
    reference = _reference(table, selected, embedder)
    for i in dict.fromkeys(selected + list(range(len(runs)))):
        if "video" in table.entries[i].clips:
            runs[i]["clip"] = embedder.put(table.entries[i].clips["video"])
    if not start:
        selected = [i for i, run in enumerate(runs) if "clip" in run][:PLAYING]
    choice = _choice(table) if start and best else None
    failures = [(entry, run) for entry, run in zip(table.entries, runs, strict=True) if entry.failed]
    states = [entry.state for entry in table.entries]
    answer = choice.answer.headline if choice else _frontier_text(table, axes, start, best, ratios, beside)
    # A sweep that lacks runs says so first.
    complete = bool(choice) and set(states) == {"finished"}
    first, second = (answer, verdict(table)) if complete else (verdict(table), answer)
    text = templates.fill(
        "index.html",
        title=table.title,
        state=_state(table, states),
        verdict=first,
        next=Markup(next_html(next_step(choice.answer.next, {}))) if choice and choice.answer.next else "",
        lead=second,
        lead_notes="; ".join(choice.notes).capitalize() if choice else "",
        problems=table.problems + _caution(table),
        facts=_facts(table),
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
        sweeps=_sweeps(table.root) if not table.sweep else [],
        frontier=bool(start),
        baseline=any(entry.baseline for entry in table.entries),
        lines=len(table.axes) + len(axes) >= 2 and sum(table.measured) >= 2,
        clips=any("clip" in run for run in runs),
        embedded=embedder.inside,
        outside=bool(embedder.outside),
        css=templates.asset("base.css", "index.css"),
        script=templates.asset("page.js", *(f"index/{part}.js" for part in SCRIPTS)),
        plotly=templates.plotly_script() if start else Markup(""),
        data=templates.json_script(
            {
                "name": table.root.name,
                "columns": sweep_table.columns_of(table, axes),
                "runs": runs,
                "table": sweep_table.table_of(table),
                "ratios": ratios,
                "same": sweep_table.indistinguishable(table, beside),
                "axes": [column.name for column in axes],
                "pairs": frontiers,
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
    return text, embedder.outside


def _run(entry: RunRow, beside: BesideBaseline, table: SweepTable, linked: Linked) -> dict[str, Any]:
    """One run as data for the page's script; addresses are from `href`."""
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
        **{name: href(path, table.root) if path and linked(path) else None for name, path in files.items()},
    }


def _reference(table: SweepTable, selected: list[int], embedder: ClipEmbedder) -> dict[str, Any] | None:
    """The reference clip: the ground truth, or else the original where no run is the baseline."""
    for i in selected or range(len(table.entries)):
        clips = table.entries[i].clips
        for name, words in (("truth", "ground truth"), ("original", "original")):
            if name in clips and not (name == "original" and any(entry.baseline for entry in table.entries)):
                return {"title": words, "clip": embedder.put(clips[name])}
    return None


def _frontiers(table: SweepTable, axes: list[Column]) -> dict[str, list[int]]:
    """For each pair of axes "i,j", i < j: the rows that no other row beats on both."""
    frontiers = {}
    for (i, one), (j, two) in combinations(enumerate(axes), 2):
        part = table.frame[[one.name, two.name]].apply(
            lambda column: column.map(sweep_table.number).astype(float)
        )
        rows = np.flatnonzero(np.asarray(table.measured) & np.isfinite(part).all(axis=1).to_numpy())
        best = pareto(part.iloc[rows], {one.name: one.better, two.name: two.better})
        frontiers[f"{i},{j}"] = [int(row) for row in rows[np.asarray(best, bool)]]
    return frontiers


def _efficient(
    frontiers: dict[str, list[int]], axes: list[Column], start: tuple[str, str] | None
) -> list[int]:
    if not start:
        return []
    i, j = sorted([column.name for column in axes].index(name) for name in start)
    return frontiers[f"{i},{j}"]


def _caution(table: SweepTable) -> list[str]:
    if not table.metrics:
        return []
    found = cautions(table.configurations.rows, table.sweep)
    texts = [f"{capital('; '.join(found))}."] if found else []
    if fields := sweep_table.mixed(table):
        names = ", ".join(name.replace("_", " ") for name in fields)
        texts += [f"These runs differ in {names}: compare times and memory only between runs that agree."]
    return texts


def _frontier_text(
    table: SweepTable,
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
    values = [sweep_table.number(value) for value in table.frame[x.name]]
    first = min(best, key=lambda i: values[i] if x.better == "min" else -values[i])
    ratio = (ratios.get(x.name) or [None] * len(values))[first]
    gain = f", {ratio:.2f}× better than its baseline" if ratio else ""
    if ratio and is_time(x.name) and beside[first].same:
        gain = ", which cannot be told from its baseline's"
    worth = "1 run is" if len(best) == 1 else f"{len(best)} runs are"
    return (
        f"{worth} on the frontier of {x.title} and {y.title}. Best {x.title}: {table.entries[first].title}, "
        f"{values[first]:,.4g} {x.unit}".rstrip()
        + f"{gain}."
    )


def _choice(table: SweepTable) -> Choice | None:
    """The answer of `60_sweep`, from all samples and repeats; None where no baseline or no quality loss was recorded."""
    if not table.sweep.get("baseline") or QUALITY not in table.frame.columns:
        return None
    try:
        return choose(compare(table.configurations))
    except WanlabError:  # a baseline that did not finish, or several configurations that match it
        return None


def _state(table: SweepTable, states: list[str]) -> tuple[str, str]:
    """CSS class and words of the state in the head."""
    failed = sum(state not in ("finished", "pending", "running") for state in states)
    sweep_state = table.sweep.get("state")
    if sweep_state == "aborted":
        return "aborted", "aborted"
    if failed:
        return "failed", f"{failed} failed"
    if sweep_state in ("running", "incomplete") or "running" in states or "pending" in states:
        return "running", str(sweep_state or "running")
    return "finished", "finished"


def _facts(table: SweepTable) -> list[tuple[str, str]]:
    sweep = table.sweep
    executor = sweep.get("executor") if isinstance(sweep.get("executor"), dict) else {}
    places = {entry.machine for entry in table.entries if entry.machine}
    count = executor.get("slots", 1)
    together = "one run at a time" if places == {"alone"} or count == 1 else f"{count} runs at a time"
    slots = f"{executor.get('kind')}, {together}" if executor else None
    baseline = sweep.get("baseline") if isinstance(sweep.get("baseline"), dict) else {}
    versions = sorted({str(v) for v in table.frame["wanlab"] if not sweep_table.missing(v)})
    facts = [
        ("grid", sweep.get("grid_file")),
        ("varied", ", ".join(name.removeprefix("p.") for name in table.axes) if sweep else None),
        (
            "baseline",
            ", ".join(f"{name} = {typed_value(value)}" for name, value in baseline.items()),
        ),
        ("started", templates.display_time(sweep.get("started") or sweep.get("created")) if sweep else None),
        ("executor", slots),
        ("wanlab", ", ".join(versions)),
    ]
    return [(key, str(value)) for key, value in facts if value]


def _sweeps(root: Path) -> list[dict[str, Any]]:
    """Sweeps in this folder, for a page of all runs."""
    sweeps = []
    for path in sorted(root.glob("*/sweep.json")):
        try:
            sweep = read_sweep(path.parent)
            runs = sweep.get("runs") or []
            sweeps.append(
                {
                    "title": sweep.get("title") or path.parent.name,
                    "state": sweep.get("state"),
                    "runs": len(runs),
                    "href": href(path.with_name("index.html"), root),
                }
            )
        except WanlabError:
            continue
    return sweeps


def _layout() -> dict[str, Any]:
    """The theme of all figures, as plotly takes it."""
    return pio.templates[theme()].layout.to_plotly_json()
