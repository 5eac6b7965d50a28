"""The two tables of the index notebook: all notebooks, and the last runs."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd

from wanlab.core.errors import WanlabError
from wanlab.core.files import digest, read_json
from wanlab.core.paths import notebooks
from wanlab.measure.environment import cpu_model
from wanlab.runs.clips import Html
from wanlab.runs.results import load_runs

GROUPS = {  # by the first digit of a notebook's name
    "0": "start here",
    "1": "diagnose",
    "2": "convert",
    "3": "precision",
    "4": "quality",
    "5": "compare",
    "6": "compare",
    "7": "serve",
}
NUMBERED = re.compile(r"(\d)\d_\w")
STYLE = """<style>
.wl-table table { border-collapse: collapse; }
.wl-table th, .wl-table td { text-align: left !important; vertical-align: top; padding: 4px 16px 4px 0; }
.wl-table td { white-space: normal; }
.wl-table td.number, .wl-table th.number { text-align: right !important; font-variant-numeric: tabular-nums; }
.wl-table td.short, .wl-table th { white-space: nowrap; }
.wl-table td.wide { max-width: 46rem; }
.wl-table tr.group { background: none !important; }
.wl-table tr.group th { padding-top: 14px; }
</style>"""
# JupyterLab shows an HTML file without its scripts, or trusted with all the rights of the page. In its own browser tab the
# server sandboxes it: its scripts draw figures and can reach nothing else.
OWN_TAB = """<script>
document.getElementById(ID).addEventListener("click", event => {
  const link = event.target.closest("a");
  if (!link || !link.pathname.endsWith(".html")) return;
  event.preventDefault();
  event.stopPropagation();
  window.open(link.href, "_blank", "noopener");
}, true);
</script>"""


def catalogue(folder: str | os.PathLike | None = None, runs: Any = None) -> Any:
    """Numbered notebooks of a folder with the question of each, in order of their names.

    Columns: group (diagnose, convert, ...), notebook, question, minutes_here (median of the finished runs on this kind of
    processor; NaN without any), path.

    Args:
        folder: folder of notebooks; None takes the first with numbered notebooks of `notebooks/` in the working folder, the
            working folder, and the notebooks that come with wanlab.
        runs: a table of `load_runs`; None reads the project's `outputs/`.

    Raises:
        WanlabError: `folder` is not a folder.
    """
    if folder is None:
        places = (Path("notebooks"), Path(), notebooks())
        folder = next((place for place in places if any(map(NUMBERED.match, _names(place)))), places[-1])
    folder = Path(folder)
    if not folder.is_dir():
        raise WanlabError(f"no folder of notebooks at {folder}")
    spent = _minutes(load_runs() if runs is None else runs)
    rows = [
        (row.group, row.notebook, row.question, spent.get(row.notebook, float("nan")), row.path)
        for row in questions(folder)
    ]
    return pd.DataFrame(rows, columns=["group", "notebook", "question", "minutes_here", "path"])


class Question(NamedTuple):
    """A numbered notebook: its group (diagnose, convert, ...), name, question and path."""

    group: str
    notebook: str
    question: str
    path: str


def questions(folder: Path) -> list[Question]:
    """The numbered notebooks of a folder, in order of their names."""
    return [
        Question(GROUPS.get(number[1], "other"), path.stem, _question(path), str(path))
        for path in sorted(folder.glob("*.ipynb"))
        if (number := NUMBERED.match(path.stem))
    ]


def last_runs(path: str | os.PathLike | None = None, n: int = 10, runs: Any = None) -> Any:
    """The last `n` runs below a folder, newest first.

    Columns: notebook, state, verdict (the reason where a run did not finish), started (UTC), minutes, path (of report.html;
    None without one).

    Args:
        path: folder of runs; None takes the project's `outputs/`.
        runs: table of `load_runs` in place of `path`.

    Raises:
        WanlabError: `path` does not exist.
    """
    runs = load_runs(path) if runs is None else runs
    last = runs.tail(n).iloc[::-1].reset_index(drop=True)
    texts = last["verdict"].where(last["state"].isin(["finished", "running"]), last["reason"])
    reports = [Path(folder) / "report.html" for folder in last["folder"]]
    return last[["state", "started"]].assign(
        notebook=last["notebook"].map(_stem).fillna(last["name"]),
        verdict=texts.map(lambda text: text if isinstance(text, str) else ""),
        minutes=last["seconds"] / 60,
        path=[str(report) if report.is_file() else None for report in reports],
    )[["notebook", "state", "verdict", "started", "minutes", "path"]]


def linked(table: Any, here: str | os.PathLike = ".") -> Html:
    """A table of `catalogue` or `last_runs` as HTML, in which a notebook's name links to `path`, relative to `here`."""
    if table.empty:
        return Html("<p>none yet</p>", "none yet")
    shown = [name for name in table.columns if name not in ("group", "path")]
    head = "".join(f"<th{_kind(name)}>{html.escape(_title(name))}</th>" for name in shown)
    body, group = [], None
    for row in table.to_dict(orient="records"):
        if "group" in row and row["group"] != group:
            group = row["group"]
            body.append(f'<tr class="group"><th colspan="{len(shown)}">{html.escape(group)}</th></tr>')
        cells = (f"<td{_kind(name)}>{_cell(name, row, Path(here))}</td>" for name in shown)
        body.append(f"<tr>{''.join(cells)}</tr>")
    text = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    name = f"table-{digest([text], 10)}"
    page = f'{STYLE}<div class="wl-table" id="{name}">{text}</div>{OWN_TAB.replace("ID", repr(name))}'
    return Html(page, table[shown].to_string(index=False))


def _names(folder: Path) -> list[str]:
    """Names of the notebooks in a folder; empty without such a folder."""
    return [path.stem for path in folder.glob("*.ipynb")]


def _minutes(runs: Any) -> dict[str, float]:
    """Notebook -> median minutes of the finished runs on this kind of processor."""
    finished = runs[(runs["state"] == "finished") & (runs["cpu"] == cpu_model())]
    return (finished["seconds"] / 60).groupby(finished["notebook"].map(_stem)).median().to_dict()


def _stem(notebook: Any) -> str | None:
    return Path(notebook).stem if isinstance(notebook, str) else None


def _question(path: Path) -> str:
    """The question in the title, without the part before the colon: `what is ...?` of `# Memory: what is ...?`.

    Read as JSON, which is faster than nbformat: this is the first table that a user waits for.
    """
    try:
        sources = ["".join(c["source"]) for c in read_json(path)["cells"] if c["cell_type"] == "markdown"]
    except (WanlabError, KeyError, TypeError) as error:
        return f"cannot be read: {error}"
    titles = (re.search(r"^#\s+(.+)$", source, re.MULTILINE) for source in sources)
    title = next((match[1].strip() for match in titles if match), "")
    return re.sub(r"^[^:?]+:\s+", "", title)


def _title(name: str) -> str:
    return {"minutes_here": "minutes here", "started": "started (UTC)"}.get(name, name)


def _kind(name: str) -> str:
    kinds = {"minutes": "number", "minutes_here": "number", "verdict": "wide", "question": "wide"}
    return f' class="{kinds.get(name, "short")}"'


def _cell(name: str, row: dict[str, Any], here: Path) -> str:
    value = row[name]
    if name.startswith("minutes"):
        return "" if pd.isna(value) else f"{value:.1f}"
    if name == "started":
        return "" if pd.isna(value) else f"{value:%Y-%m-%d %H:%M}"
    text = html.escape(str(value))
    path = row.get("path")
    if name != "notebook" or not isinstance(path, str):  # pandas keeps a None as NaN
        return text
    link = quote(Path(os.path.relpath(path, here)).as_posix())
    return f'<a href="{html.escape(link)}">{text}</a>'
