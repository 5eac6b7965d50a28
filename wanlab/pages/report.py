"""report.html: one file that opens offline, with the answer first and a failure before everything else."""

from __future__ import annotations

import html
import shlex
import traceback as tracebacks
from pathlib import Path
from typing import Any

from markupsafe import Markup
from pygments.formatters import HtmlFormatter

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
        return write_text(
            path.with_suffix(".html"), page_of(read_notebook(path), {}, {}, path.parent, path.stem)
        )
    folder = RunFolder(path.resolve())
    if not folder.run_json.is_file() and not folder.notebook.is_file():
        raise WanlabError(f"{path} is not a run folder: it holds neither run.json nor executed.ipynb")
    problems: list[str] = []
    record = _tried(lambda: read_json(folder.run_json), {}, problems)
    status = _tried(folder.status, {"state": "unreadable"}, problems)
    notebook = _tried(lambda: _notebook(folder.notebook), None, problems)
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
    notebook: Any, record: dict, status: dict, root: Path, name: str, problems: list[str] | None = None
) -> str:
    """The page as text."""
    page = markup.Page(root)
    cells = list(notebook.cells) if notebook is not None else []
    title, lead, rest = _title(cells, name)
    body = [_cell(cell, page) for cell in rest]
    lead_html = markup.markdown(lead, page) if lead.strip() else ""
    colours = HtmlFormatter(style="default", cssclass="code").get_style_defs(".code")
    dark = HtmlFormatter(style="github-dark", cssclass="code").get_style_defs(".code")
    return templates.fill(
        "report.html",
        title=title,
        lead=Markup(lead_html),
        verdict=record.get("verdict"),
        state=status.get("state"),
        state_words=WORDS.get(status.get("state"), status.get("state")),
        failure=_failure(status, cells),
        problems=problems or [],
        facts=_facts(record, status, name),
        parameters=_parameters(record),
        environment=_environment(record.get("environment")),
        environment_summary=_environment_summary(record.get("environment")),
        command=_command(record),
        body=[Markup(part) for part in body if part],
        css=templates.asset("base.css", "report.css") + Markup(_pygments(colours, dark)),
        script=templates.asset("page.js", "report.js"),
        plotly=templates.plotly_script() if page.figures else None,
        figures=templates.json_script(page.figures),
    )


def _cell(cell: Any, page: markup.Page) -> str:
    if HIDDEN_TAGS & set(cell.metadata.get("tags", [])) or not str(cell.source).strip():
        return ""
    if cell.cell_type == "markdown":
        return f'<div class="prose">{markup.markdown(cell.source, page)}</div>'
    if cell.cell_type != "code":
        return ""
    timing = cell.metadata.get("papermill", {})
    failed = timing.get("status") == "failed"
    errors = failed and any(item.get("output_type") == "error" for item in cell.get("outputs", []))
    # The traceback of the failed cell stands at the top of the page.
    shown = [item for item in cell.get("outputs", []) if not (errors and item.get("output_type") == "error")]
    outputs = "".join(markup.output(item, page) for item in _merged(shown))
    seconds = f" · {timing['duration']:.1f} s" if (timing.get("duration") or 0) >= 0.05 else ""
    note = {"failed": " · failed here", "pending": " · not run"}.get(timing.get("status"), "")
    fold = "<details class='source' open>" if failed else "<details class='source'>"
    source = f"{fold}<summary>code{seconds}{note}</summary>{markup.code(cell.source)}</details>"
    anchor = ' id="failed-cell"' if failed else ""
    return f'<section class="cell{" failed" if failed else ""}"{anchor}>{outputs}{source}</section>'


def _merged(outputs: list[Any]) -> list[Any]:
    """Outputs with neighbouring pieces of one stream joined."""
    merged: list[Any] = []
    for item in outputs:
        last = merged[-1] if merged else {}
        if (
            item.get("output_type") == "stream"
            and last.get("output_type") == "stream"
            and last["name"] == item["name"]
        ):
            merged[-1] = {**last, "text": last["text"] + item["text"]}
        else:
            merged.append(item)
    return merged


def _title(cells: list[Any], fallback: str) -> tuple[str, str, list[Any]]:
    """The first heading, the text below it, and the remaining cells."""
    for index, cell in enumerate(cells):
        if cell.cell_type == "markdown" and "papermill-error-cell-tag" not in cell.metadata.get("tags", []):
            first, _, more = cell.source.strip().partition("\n")
            if first.startswith("#"):
                return first.strip("# "), more, cells[:index] + cells[index + 1 :]
            break
    return fallback, "", cells


def _failure(status: dict, cells: list[Any]) -> dict[str, Any] | None:
    state = status.get("state")
    if state in (None, "finished", "running"):
        return None
    has_cell = any(c.metadata.get("papermill", {}).get("status") == "failed" for c in cells)
    return {
        "what": WORDS.get(state, state),
        "where": status.get("title"),
        "cell": status.get("cell"),
        "reason": status.get("reason"),
        "traceback": Markup(markup.traceback(status["traceback"])) if status.get("traceback") else None,
        "link": has_cell,
        # A mistake that wanlab explains needs no stack; the explanation is above it.
        "open": not str(status.get("reason")).startswith("WanlabError"),
    }


def _facts(record: dict, status: dict, name: str) -> list[tuple[str, str]]:
    started = status.get("started") or record.get("created")
    facts = [
        ("notebook", record.get("notebook") or name),
        ("run", record.get("run_id")),
        ("started", readable(started)),
        ("took", duration(status.get("seconds"))),
        ("wanlab", record.get("wanlab")),
    ]
    return [(key, str(value)) for key, value in facts if value]


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


def _environment(environment: Any, prefix: str = "") -> list[tuple[str, str]]:
    if not isinstance(environment, dict):
        return []
    rows: list[tuple[str, str]] = []
    for key, value in environment.items():
        if isinstance(value, dict):
            rows += _environment(value, f"{prefix}{key} ")
        elif value not in (None, "", []):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((f"{prefix}{key}".replace("_", " "), shown))
    return rows


def _environment_summary(environment: Any) -> str:
    """GPU or CPU, and the versions that decide most, when they are known."""
    rows = dict(_environment(environment))
    wanted = ("gpu name", "gpu", "cpu model", "cpu", "cpu name", "packages torch", "torch")
    found = [f"torch {rows[key]}" if "torch" in key else rows[key] for key in wanted if key in rows]
    return " · ".join(dict.fromkeys(found))


def _command(record: dict) -> str | None:
    if not record.get("notebook"):
        return None
    changed = [row for row in record.get("schema") or [] if row.get("default") != row.get("value")]
    pairs = ["-p " + shlex.quote(f"{row['name']}={shown(row['value'])}") for row in changed]
    return " ".join(["wanlab run", shlex.quote(str(record["notebook"])), *pairs])


def _pygments(light: str, dark: str) -> str:
    plain = ".code pre { background: none; }"
    return f"\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{plain}\n"


def _notebook(path: Path) -> Any:
    return read_notebook(path)


def _tried(read: Any, otherwise: Any, problems: list[str]) -> Any:
    try:
        return read()
    except WanlabError as error:
        problems.append(str(error))
        return otherwise
