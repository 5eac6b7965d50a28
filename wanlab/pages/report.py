"""report.html: one file that opens offline, with the answer first and a failure before everything else."""

from __future__ import annotations

import html
import itertools
import shlex
import traceback as tracebacks
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup

from wanlab.core.errors import WanlabError
from wanlab.core.files import read_json, write_text
from wanlab.pages import markup, templates
from wanlab.pages.templates import WORDS, duration, readable, shown
from wanlab.runs.folder import RunFolder
from wanlab.runs.parameters import read_notebook

HIDDEN_TAGS = {"parameters", "injected-parameters", "papermill-error-cell-tag", "hide"}


def render(path: str | Path) -> Path:
    """Write report.html of a run folder, or `<name>.html` beside a notebook that was saved with its outputs.

    The page is always written: what cannot be read or drawn is said on it.

    Raises:
        WanlabError: `path` is neither.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".ipynb":
        text = page_of(read_notebook(path), {}, {}, path.parent, path.stem)
        return write_text(path.with_suffix(".html"), text)
    folder = RunFolder(path.resolve())
    if not folder.run_json.is_file() and not folder.notebook.is_file():
        raise WanlabError(f"{path} is not a run folder: it holds neither run.json nor executed.ipynb")
    problems: list[str] = []

    def tried(read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except WanlabError as error:
            problems.append(str(error))
            return otherwise

    record = tried(lambda: read_json(folder.run_json), {})
    status = tried(folder.status, {"state": "unreadable"})
    notebook = tried(lambda: read_notebook(folder.notebook), None)
    try:
        text = page_of(notebook, record, status, folder.path, folder.path.parent.name, problems)
    except Exception:
        # A page that cannot be drawn must not hide how the run ended.
        reason = html.escape(tracebacks.format_exc())
        state = html.escape(str(status.get("state")))
        head = f"<!doctype html><meta charset=utf-8><title>{state}</title>"
        text = f"{head}<h1>Run {state}</h1><pre>{reason}</pre>"
    return write_text(folder.report, text)


def page_of(
    notebook: Any, record: dict, status: dict, root: Path | None, name: str, problems: Iterable[str] = ()
) -> str:
    """The page as text.

    Args:
        notebook: executed notebook; None where it could not be read.
        record: run.json.
        status: status.json.
        root: folder in which the notebook's relative pictures lie.
        name: title of the page where the notebook has none.
        problems: said on the page, each a sentence.
    """
    page = markup.Page(root)
    cells = [cell for cell in notebook.cells if _is_shown(cell)] if notebook is not None else []
    title, lead, rest = _title(cells, name)
    environment = _environment(record.get("environment"))
    return templates.fill(
        "report.html",
        title=title,
        lead=Markup(markup.markdown(lead, page)),
        verdict=record.get("verdict"),
        state=status.get("state"),
        state_words=WORDS.get(status.get("state"), status.get("state")),
        failure=_failure(status, cells),
        problems=problems,
        facts=_facts(record, status, name),
        parameters=_parameters(record),
        environment=environment,
        environment_summary=_environment_summary(environment),
        command=_command(record),
        body=[Markup(_cell(cell, page)) for cell in rest],
        css=templates.asset("base.css", "report.css") + Markup(markup.code_css()),
        script=templates.asset("page.js", "report.js"),
        plotly=templates.plotly_script() if page.figures else None,
        figures=templates.json_script(page.figures),
    )


def _is_shown(cell: Any) -> bool:
    return (
        cell.cell_type in ("markdown", "code")
        and bool(cell.source.strip())
        and not HIDDEN_TAGS & set(cell.metadata.get("tags", []))
    )


def _title(cells: list[Any], fallback: str) -> tuple[str, str, list[Any]]:
    """The heading that the first text begins with, what stands below it, and the remaining cells."""
    first = next((cell for cell in cells if cell.cell_type == "markdown"), None)
    if first is None or not first.source.lstrip().startswith("#"):
        return fallback, "", cells
    heading, _, lead = first.source.strip().partition("\n")
    return heading.strip("# "), lead, [cell for cell in cells if cell is not first]


def _ended(cell: Any) -> str | None:
    """What papermill says of a cell: completed, failed or pending."""
    return cell.metadata.get("papermill", {}).get("status")


def _cell(cell: Any, page: markup.Page) -> str:
    if cell.cell_type == "markdown":
        return f'<div class="prose">{markup.markdown(cell.source, page)}</div>'
    failed = _ended(cell) == "failed"
    # The traceback of the failed cell stands at the top of the page.
    items = [item for item in cell.outputs if not (failed and item.output_type == "error")]
    outputs = "".join(markup.output(item, page) for item in _joined_streams(items))
    seconds = cell.metadata.get("papermill", {}).get("duration") or 0
    label = f"code · {seconds:.1f} s" if seconds >= 0.05 else "code"
    label += {"failed": " · failed here", "pending": " · not run"}.get(_ended(cell), "")
    fold = "<details class='source' open>" if failed else "<details class='source'>"
    source = f"{fold}<summary>{label}</summary>{markup.code(cell.source)}</details>"
    kind = 'class="cell failed" id="failed-cell"' if failed else 'class="cell"'
    return f"<section {kind}>{outputs}{source}</section>"


def _joined_streams(outputs: Iterable[Any]) -> Iterator[Any]:
    """Outputs with neighbouring pieces of one stream as one."""
    for (kind, name), group in itertools.groupby(outputs, lambda item: (item.output_type, item.get("name"))):
        if kind == "stream":
            yield {"output_type": kind, "name": name, "text": "".join(item.text for item in group)}
        else:
            yield from group


def _failure(status: dict, cells: list[Any]) -> dict[str, Any] | None:
    state = status.get("state")
    if state in (None, "finished", "running"):
        return None
    return {
        "what": WORDS.get(state, state),
        "where": status.get("title"),
        "reason": status.get("reason"),
        "traceback": Markup(markup.traceback(status["traceback"])) if status.get("traceback") else None,
        "link": any(_ended(cell) == "failed" for cell in cells),
        # A mistake that wanlab explains needs no stack; the explanation is above it.
        "open": not str(status.get("reason")).startswith("WanlabError"),
    }


def _facts(record: dict, status: dict, name: str) -> dict[str, str]:
    facts = {
        "notebook": record.get("notebook") or name,
        "run": record.get("run_id"),
        "started": readable(status.get("started") or record.get("created")),
        "took": duration(status.get("seconds")),
        "wanlab": record.get("wanlab"),
    }
    return {key: str(value) for key, value in facts.items() if value}


def _parameters(record: dict) -> list[dict[str, Any]]:
    rows = record.get("schema") or [
        {"name": k, "value": v} for k, v in (record.get("parameters") or {}).items()
    ]
    return [
        {
            "name": row["name"],
            "value": shown(row.get("value")),
            "default": shown(row.get("default")),
            "changed": "default" in row and row.get("default") != row.get("value"),
            "help": row.get("help", ""),
        }
        for row in rows
    ]


def _environment(environment: Any, prefix: str = "") -> dict[str, str]:
    """Nested facts of a machine, flat: {"gpu": {"name": "A"}} is "gpu name": "A"; what is not known is left out."""
    rows: dict[str, str] = {}
    for key, value in environment.items() if isinstance(environment, dict) else ():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            rows |= _environment(value, f"{name} ")
        elif value not in (None, "", []):
            rows[name] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return rows


def _environment_summary(environment: dict[str, str]) -> str:
    """GPU, CPU and the version that decides most, as far as they are known."""
    parts = [environment.get(key) for key in ("gpu name", "cpu")]
    torch = environment.get("packages torch")
    return " · ".join(filter(None, [*parts, torch and f"torch {torch}"]))


def _command(record: dict) -> str | None:
    if not record.get("notebook"):
        return None
    changed = [row for row in record.get("schema") or [] if row.get("default") != row.get("value")]
    pairs = ["-p " + shlex.quote(f"{row['name']}={shown(row['value'])}") for row in changed]
    return " ".join(["wanlab run", shlex.quote(str(record["notebook"])), *pairs])
