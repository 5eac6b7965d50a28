"""What pages of docs say about reports: pictures, times, the index of questions, examples of YAML files."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

from table_text import RESULTS, ROOT, machine, markdown

from wanlab.launch.schemas import KINDS, NOT_SAID
from wanlab.pages.templates import duration

QUESTIONS = ROOT / "docs" / "questions"
REPORTS = RESULTS / "reports_cpu.json"
TOUR = RESULTS / "tour_cpu.json"
BUSY_PERCENT = 5  # of the processors: less of it that other programs use is not mentioned


def recorded(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def took(seconds: float) -> str:
    return duration(seconds) if seconds >= 60 else f"{seconds:.0f} s"


def busy(row: dict) -> str:
    """What the machine did beside a run."""
    others = row.get("others_percent") or 0
    return f", while other programs used {others:.0f} % of the processors" if others >= BUSY_PERCENT else ""


def report(name: str) -> str:
    """The picture of a notebook's report, and what its run took."""
    row = recorded(REPORTS).get(name)
    if row is None:
        raise SystemExit(f"{name} has no picture yet: python benchmarks/report_pictures.py {name}")
    memory = f" and {row['peak_memory_gib']:.1f} GiB of memory" if row["peak_memory_gib"] else ""
    picture = f"![{row['verdict'].replace(']', ')').replace('[', '(')}](../pictures/{name}.webp)"
    on, threads = row["environment"]["cpu"], row["environment"]["threads"]
    return (
        f"{picture}\n\nThis run, with default parameters, took {took(row['seconds'])}{memory}"
        f" on {threads} thread{'s' * (threads > 1)} of {on}{busy(row)}."
    )


def questions() -> str:
    """The pages of questions, in order of their notebooks."""
    rows, reports = [], recorded(REPORTS)
    for path in sorted(QUESTIONS.glob("*.md")):
        title = path.read_text().partition("\n")[0].removeprefix("# ")
        spent = took(reports[path.stem]["seconds"]) if path.stem in reports else ""
        rows.append([f"[{title}](questions/{path.name})", f"`{path.stem}`", spent])
    on = machine(next(iter(reports.values()))["environment"])
    note = f"\n\nTook: with default parameters, on {on}. A page says what else the machine did."
    return markdown(["question", "notebook", "took"], rows) + note


def tour() -> str:
    """The commands of the tour with what they took."""
    record = recorded(TOUR)
    rows = [[f"`{row['command']}`", took(row["seconds"])] for row in record["steps"]]
    whole = sum(row["seconds"] for row in record["steps"])
    note = (
        f"\n\nTogether {took(whole)}, in an empty folder, on {machine(record['environment'])}{busy(record)}."
    )
    return markdown(["command", "took"], rows) + note


def example(kind: str) -> str:
    text = (ROOT / "recipes" / "examples" / f"{kind}.yaml").read_text()
    return f"```yaml\n{text}```"


def schema_gaps() -> str:
    rows = [[f"[{kind}](../recipes/schemas/{kind}.json)", text] for kind, text in NOT_SAID.items()]
    return markdown(["schema", "what the loader checks and the schema does not"], rows)


TABLES: dict[str, Callable[[], str]] = {"questions": questions, "tour": tour, "schema_gaps": schema_gaps}
TABLES |= {f"report_{path.stem}": functools.partial(report, path.stem) for path in QUESTIONS.glob("*.md")}
TABLES |= {f"example_{kind}": functools.partial(example, kind) for kind in KINDS}
