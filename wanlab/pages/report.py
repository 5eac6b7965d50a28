"""report.html: one file that opens offline, with the answer first and a failure before everything else.

Cells and outputs of a notebook become HTML that is safe to open: nothing is fetched, run or left unescaped.
"""

from __future__ import annotations

import base64
import functools
import html
import itertools
import json
import mimetypes
import re
import traceback as tracebacks
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mistune
import nh3
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from wanlab.core.answer import MOST_TILES
from wanlab.core.errors import WanlabError, clean
from wanlab.core.files import write_text
from wanlab.core.stats import interval_text
from wanlab.core.words import SMALLEST_PERCENT, UNITS, heading, shown, typed_value
from wanlab.pages import templates
from wanlab.pages.templates import WORDS, display_time, duration
from wanlab.runs.compare import SAME, THRESHOLD_PERCENT, ratio_to, times_better
from wanlab.runs.folder import RunFolder
from wanlab.runs.next_step import changed_parameters, next_html, run_command
from wanlab.runs.parameters import read_notebook
from wanlab.runs.result import Result
from wanlab.runs.results import CHANGED, is_time, read_results
from wanlab.runs.seal import broken, seal_report

MAIN_TAG = "main"  # of the cell whose output stands at the top of the page
HIDDEN_TAGS = {"parameters", "injected-parameters", "papermill-error-cell-tag", "hide"}
PLOTLY = "application/vnd.plotly.v1+json"
EXPLORER = "application/vnd.wanlab.explorer+json"  # of plots.explorer: the file of its data, and what is selected first
WIDGET = "application/vnd.jupyter.widget-view+json"
LONG_LINES = 24  # text outputs above this are folded
MOST_LINES = 400  # and above this their middle is left out
MOST_CHARS = 60_000
IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")
EMBEDDED = (*IMAGES, "image/svg+xml", "video/mp4", "video/webm")
EXPLORER_BYTES = 32 * 2**20  # of the data of a live view
EMBEDDED_BYTES = 16 * 2**20  # of one file
CSV_BYTES = 2**20  # of a table's file that lies in the page

TAGS = set(
    """
    a abbr b blockquote br caption code col colgroup dd del details div dl dt em figcaption figure
    h1 h2 h3 h4 h5 h6 hr i img kbd li mark ol p pre s samp small span strong sub summary sup
    table tbody td tfoot th thead tr u ul var video
    """.split()  # noqa: SIM905
)
ATTRIBUTES = {
    "*": {"class", "title", "lang", "dir"},
    "a": {"href"},
    "img": {"src", "alt", "width", "height"},
    "video": {"src", "autoplay", "loop", "muted", "playsinline", "controls", "width", "height"},
    "td": {"colspan", "rowspan"},
    "th": {"colspan", "rowspan", "scope"},
    "ol": {"start"},
    "details": {"open"},
}
REMOVED_WITH_CONTENT = set(
    "script style iframe object embed link meta template noscript svg math".split()  # noqa: SIM905
)
DATA_MEDIA = re.compile(
    r"data:(image/(png|jpeg|gif|webp|svg\+xml)|video/(mp4|webm));base64,[A-Za-z0-9+/=\s]*\Z"
)
MARKDOWN = mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url", "task_lists"])
LINK = re.compile(r"(https?://|mailto:|#)", re.IGNORECASE)


def render(path: str | Path) -> Path:
    """Write report.html of a run folder, or `<name>.html` beside a notebook that was saved with its outputs.

    The page is always written: what cannot be read or drawn is reported on it.

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

    record = tried(folder.record, {})
    status = tried(folder.status, {"state": "unreadable"})
    notebook = tried(lambda: read_notebook(folder.notebook), None)
    damage = broken(folder, record, report=False) if status.get("state") == "finished" else ""
    if damage:
        status = {**status, "state": CHANGED, "reason": damage}
    try:
        results = tried(lambda: read_results(folder), ())
        text = page_of(notebook, record, status, folder.path, folder.path.parent.name, problems, results)
    except Exception:
        # A page that cannot be drawn must not hide how the run ended.
        reason = html.escape(tracebacks.format_exc())
        state = html.escape(str(status.get("state")))
        head = f"<!doctype html><meta charset=utf-8><title>{state}</title>"
        text = f"{head}<h1>Run {state}</h1><pre>{reason}</pre>"
    write_text(folder.report, text)
    if not damage:
        seal_report(folder)
    return folder.report


def page_of(
    notebook: Any,
    record: dict,
    status: dict,
    root: Path | None,
    name: str,
    problems: Iterable[str] = (),
    results: Sequence[Result] = (),
) -> str:
    """The page as text.

    Args:
        notebook: executed notebook; None where it could not be read.
        record: run.json.
        status: status.json.
        root: folder of the notebook's relative pictures.
        name: title of the page where the notebook has none.
        problems: sentences shown on the page.
        results: rows that the run recorded; the first is what the run is about.
    """
    page = Page(root)
    cells = [cell for cell in notebook.cells if _is_shown(cell)] if notebook is not None else []
    title, lead, rest = _title(cells, name)
    environment, parameters = _environment(record.get("environment")), _parameters(record)
    main = [cell for cell in rest if MAIN_TAG in cell.metadata.get("tags", []) and cell.get("outputs")]
    return templates.fill(
        "report.html",
        title=title,
        lead=Markup(markdown_html(lead, page)),
        verdict=record.get("verdict"),
        next=Markup(next_html(record["next"])) if isinstance(record.get("next"), dict) else None,
        notes=[str(note) for note in record.get("notes") or ()],
        details=[str(detail) for detail in record.get("details") or ()],
        tiles=_key_figures(record, results),
        main=[Markup(_outputs(cell, page) + _files(cell, page)) for cell in main],
        state=status.get("state"),
        state_words=WORDS.get(status.get("state"), status.get("state")),
        failure=_failure(status, cells),
        problems=problems,
        facts=_facts(record, status, name),
        parameters=parameters,
        changed=", ".join(f"{row['name']}={row['value']}" for row in parameters if row["changed"]),
        environment=environment,
        environment_summary=_environment_summary(environment),
        command=_command(record),
        body=[Markup(_cell(cell, page, at_top=any(cell is each for each in main))) for cell in rest],
        css=templates.asset("base.css", "report.css") + Markup(code_css()),
        script=templates.asset("page.js", "report.js"),
        plotly=templates.plotly_script() if page.figures else None,
        figures=templates.json_script(page.figures),
        explorers=page.explorers,
        explorer=templates.explorer_assets() if page.explorers else None,
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


def _cell_state(cell: Any) -> str | None:
    """State of a cell by papermill: completed, failed or pending."""
    return cell.metadata.get("papermill", {}).get("status")


def _outputs(cell: Any, page: Page) -> str:
    # The traceback of the failed cell stands at the top of the page.
    items = [
        item
        for item in cell.outputs
        if not (_cell_state(cell) == "failed" and item.get("output_type") == "error")
    ]
    return "".join(output_html(item, page) for item in _joined_streams(items))


def _cell(cell: Any, page: Page, *, at_top: bool = False) -> str:
    if cell.cell_type == "markdown":
        return f'<div class="prose">{markdown_html(cell.source, page)}</div>'
    failed = _cell_state(cell) == "failed"
    shown = _outputs(cell, page) + _files(cell, page)
    outputs = '<p class="aside">Shown at the top of the page.</p>' if at_top else shown
    seconds = cell.metadata.get("papermill", {}).get("duration") or 0
    label = f"code · {seconds:.1f} s" if seconds >= 0.05 else "code"
    label += {"failed": " · failed here", "pending": " · not run"}.get(_cell_state(cell), "")
    fold = "<details class='source' open>" if failed else "<details class='source'>"
    source = f"{fold}<summary>{label}</summary>{code_html(cell.source)}</details>"
    kind = 'class="cell failed" id="failed-cell"' if failed else 'class="cell"'
    return f"<section {kind}>{outputs}{source}</section>"


SAVED = re.compile(r"""\brun\.(?:save_)?table\(\s*["']([\w. -]+)["']""")


def _files(cell: Any, page: Page) -> str:
    """Links to the tables that a cell saved, which lie in the page as data: all columns, in their own units."""
    links = []
    for name in dict.fromkeys(SAVED.findall(cell.source) if page.root is not None else ()):
        name = f"{name.removesuffix('.csv')}.csv"
        path = page.root / "artifacts" / name
        try:
            if path.stat().st_size <= CSV_BYTES:
                address = _data_url("text/csv;charset=utf-8", path.read_bytes())
                links.append(f'<a class="quiet" download="{name}" href="{address}">{name}</a>')
        except OSError:
            pass  # a table without rows is not saved
    return f'<p class="under">{" ".join(links)}</p>' if links else ""


def _joined_streams(outputs: Iterable[Any]) -> Iterator[Any]:
    """Outputs with neighbouring pieces of one stream as one."""
    # Outputs may lack any field: other programs write notebooks too.
    kinds = itertools.groupby(outputs, lambda item: (item.get("output_type"), item.get("name")))
    for (kind, name), group in kinds:
        if kind == "stream":
            yield {
                "output_type": kind,
                "name": name,
                "text": "".join(_joined(item.get("text", "")) for item in group),
            }
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
        "traceback": Markup(traceback_html(status["traceback"])) if status.get("traceback") else None,
        "link": any(_cell_state(cell) == "failed" for cell in cells),
        # A mistake that wanlab explains needs no stack; the explanation is above it.
        "open": not str(status.get("reason")).startswith("WanlabError"),
    }


# Figures of a result that can be a tile, the most important first: name, title, words for better and worse.
TILES = (
    ("time_per_video_ms", "time per video", "faster", "slower"),
    ("time_per_call_ms", "time of a call", "faster", "slower"),
    ("peak_memory_gib", "peak memory", "less", "more"),
    ("quality_loss_percent", "quality loss", "", ""),
    ("divergence_lpips", "LPIPS to the original", "", ""),
    ("psnr_db", "PSNR to the original", "", ""),
    ("load_ms", "load time", "shorter", "longer"),
    ("weights_gib", "weights", "less", "more"),
    ("size_bytes", "size of the engine", "less", "more"),
    ("build_ms", "build time", "shorter", "longer"),
    ("time_per_frame_ms", "time per frame", "faster", "slower"),
)


def _tiles(results: Sequence[Result]) -> list[dict[str, str]]:
    """Key figures of the first result with their units, and their change against eager PyTorch in the same run."""
    if not results:
        return []
    first, row = results[0], results[0].row()
    eager = [each for each in results[1:] if each.engine == "eager" and each.work == first.work]
    base = eager[0] if eager and first.engine != "eager" else None
    tiles = [
        {"title": title, "value": _figure(name, row[name]), "change": _change(name, row, base, first, words)}
        for name, title, *words in TILES
        if isinstance(row.get(name), int | float)
    ]
    return tiles


def _key_figures(record: dict, results: Sequence[Result]) -> list[dict[str, str]]:
    """The tiles that the notebook chose, and behind them those of its first result that it did not."""
    chosen = list(record.get("tiles") or ())
    titles = {tile.get("title") for tile in chosen}
    return [*chosen, *(tile for tile in _tiles(results) if tile["title"] not in titles)][:MOST_TILES]


def _change(name: str, row: dict[str, Any], base: Result | None, first: Result, words: list[str]) -> str:
    """What stands below a figure: its ratio to the baseline, its interval, or the noise it is read against."""
    if name == "quality_loss_percent" and "quality_loss_low_percent" in row:
        low, high = (row[f"quality_loss_{end}_percent"] for end in ("low", "high"))
        if max(abs(low), abs(high)) < SMALLEST_PERCENT:
            return f"95 % interval within ±{SMALLEST_PERCENT} %"
        return interval_text(low, high, "+.2f")
    if name == "quality_loss_percent":
        return interval_text(None, None)
    if name == "divergence_lpips" and "divergence_floor_lpips" in row:
        return f"exact attention kernels alone: {shown(row['divergence_floor_lpips'])}"
    if base is None or not words[0] or name not in base.row():
        noisy = name in ("time_per_video_ms", "time_per_call_ms") and "noise_percent" in row
        return f"noise {row['noise_percent']:.1f} %" if noisy else ""
    before = base.row()[name]
    if is_time(name) and ratio_to(base, first, name, THRESHOLD_PERCENT).verdict == SAME:
        return f"no difference from eager's {_figure(name, before)} can be told from noise"
    ratio = times_better(name, row[name], before)
    if not 0 < ratio < float("inf"):
        return ""
    if abs(ratio - 1) < 0.005:
        return "as eager"
    word, ratio = (words[0], ratio) if ratio > 1 else (words[1], 1 / ratio)
    return f"{ratio:,.2f}× {word} than eager's {_figure(name, before)}"


def _figure(name: str, value: float) -> str:
    """A figure with its unit in three significant digits."""
    if name == "quality_loss_percent":
        return f"{value:+.2f} %" if abs(value) >= SMALLEST_PERCENT else f"< {SMALLEST_PERCENT} %"
    if name == "psnr_db" and value == float("inf"):
        return "identical"
    unit = name.rsplit("_", 1)[-1]
    return shown(value, unit if unit in ("ms", "bytes") else UNITS.get(unit, ""))


def _facts(record: dict, status: dict, name: str) -> dict[str, str]:
    facts = {
        "notebook": record.get("notebook") or name,
        "run": record.get("run_id"),
        "started": display_time(status.get("started") or record.get("created")),
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
            "value": typed_value(row.get("value")),
            "default": typed_value(row.get("default")),
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
    notebook = record.get("notebook")
    return run_command(str(notebook), changed_parameters(record)) if notebook else None


@dataclass
class Page:
    """What the page needs beside its body: figures to draw, and the folder of relative pictures."""

    root: Path | None = None
    figures: list[dict[str, Any]] = field(default_factory=list)
    explorers: list[dict[str, Any]] = field(default_factory=list)

    def explorer(self, payload: Any) -> str:
        """A place for a live view, whose data lie in the page; "" where its file is missing or too large."""
        file = payload.get("file") if isinstance(payload, dict) else None
        if self.root is None or not isinstance(file, str):
            return ""
        try:
            path = (self.root / file).resolve()
            if not path.is_relative_to(self.root.resolve()) or path.stat().st_size > EXPLORER_BYTES:
                return ""
            data = base64.b64encode(path.read_bytes()).decode()
        except (OSError, ValueError):
            return ""
        state = payload.get("state") if isinstance(payload.get("state"), dict) else {}
        self.explorers.append({"data": data, "state": templates.json_script(state)})
        return f'<div class="figure" data-explorer="{len(self.explorers) - 1}"></div>'

    def figure(self, payload: dict[str, Any]) -> str:
        layout = payload.get("layout") or {}
        self.figures.append(
            {"data": payload.get("data", []), "layout": layout, "config": payload.get("config") or {}}
        )
        height = layout.get("height") or 420
        style = f' style="height:{int(height)}px"' if isinstance(height, int | float) else ""
        return f'<div class="figure" data-figure="{len(self.figures) - 1}"{style}></div>'


def markdown_html(source: str, page: Page) -> str:
    """Markdown as sanitised HTML, with tables and pictures from the notebook's folder inside."""
    return sanitise(str(MARKDOWN(clean(source))), page)


def code_html(source: str) -> str:
    """Highlighted Python."""
    return highlight(clean(source), PythonLexer(), HtmlFormatter(cssclass="code"))


@functools.cache
def code_css() -> str:
    """Colours of `code_html`, for a light and a dark page."""
    light, dark = (HtmlFormatter(style=s).get_style_defs(".code") for s in ("default", "github-dark"))
    return f"\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def output_html(item: Any, page: Page) -> str:
    """One notebook output, in the richest form that a page without a kernel can show."""
    kind = item.get("output_type")
    if kind == "stream":
        return text_html(item.get("text", ""), quiet=item.get("name") == "stderr")
    if kind == "error":
        lines = item.get("traceback") or []
        lines = map(_joined, lines) if isinstance(lines, list) else [str(lines)]
        return traceback_html("\n".join(lines) or f"{item.get('ename')}: {item.get('evalue')}")
    data = item.get("data") or {}
    if EXPLORER in data and (shown := page.explorer(data[EXPLORER])):
        return shown
    if WIDGET in data:  # it needs a kernel, and the bar of finished work has no information
        return ""
    if PLOTLY in data:
        return page.figure(data[PLOTLY] if isinstance(data[PLOTLY], dict) else json.loads(data[PLOTLY]))
    if "text/html" in data:
        return f'<div class="rich">{sanitise(_with_words(_joined(data["text/html"])), page)}</div>'
    for kind in IMAGES:
        if kind in data:
            return _picture(f"data:{kind};base64,{''.join(_joined(data[kind]).split())}", page)
    if "image/svg+xml" in data:
        return _picture(_data_url("image/svg+xml", _joined(data["image/svg+xml"]).encode()), page)
    if "text/markdown" in data:
        return f'<div class="rich">{markdown_html(_joined(data["text/markdown"]), page)}</div>'
    return text_html(_joined(data["text/plain"])) if "text/plain" in data else ""


BAR = re.compile(r"\d+%\|.*\|\s*[\d.,]+\S*/|\d+\S*it \[\d+:\d\d")
"""A line of a progress bar of tqdm."""
COLUMN = re.compile(r"<th>([a-z][a-z0-9]*(?:_[a-z0-9]+)*)</th>")


def _with_words(source: str) -> str:
    """Column names of a table of pandas as words with their unit: "peak_memory_gib" as "peak memory, GiB"."""
    if 'class="dataframe"' not in source:
        return source
    return COLUMN.sub(lambda match: f"<th>{heading(match[1])}</th>", source)


def _picture(url: str, page: Page) -> str:
    # Data that a notebook calls base64 may contain a quote, which would end the attribute.
    image = sanitise(f'<img alt="" src="{url}">', page)
    return f"<p>{image}</p>"


def text_html(source: str, *, quiet: bool = False) -> str:
    """Printed text: progress bars at their last state, long text folded, the middle of very long text left out."""
    lines = [line.rsplit("\r", 1)[-1] for line in source.replace("\r\n", "\n").rstrip().split("\n")]
    if quiet:  # a bar says nothing once its work is done
        lines = [line for line in lines if not BAR.search(line)]
    if not any(line.strip() for line in lines):
        return ""
    count = len(lines)
    if count > MOST_LINES:
        gap = f"... {count - MOST_LINES} lines left out, see console.log ..."
        lines = [*lines[: MOST_LINES // 2], gap, *lines[-MOST_LINES // 2 :]]
    joined = "\n".join(lines)
    body = f'<pre class="text">{_ansi(_cut(joined))}</pre>'
    if count <= LONG_LINES and not quiet:
        return body
    label = "messages" if quiet else "output"
    kind = ' class="messages"' if quiet else ""
    return (
        f"<details{kind}><summary>{label}, {count} line{'s' if count != 1 else ''}</summary>{body}</details>"
    )


def traceback_html(source: str) -> str:
    """A traceback with its colours."""
    return f'<pre class="text traceback">{_ansi(_cut(source))}</pre>'


def sanitise(source: str, page: Page) -> str:
    """HTML from a notebook, with an allow-list of tags and attributes; media only as data inside the page."""
    return nh3.clean(
        clean(source),  # nh3 refuses lone surrogates, too
        tags=TAGS,
        clean_content_tags=REMOVED_WITH_CONTENT,
        attributes=ATTRIBUTES,
        attribute_filter=functools.partial(_allowed, page.root),
        url_schemes={"http", "https", "mailto", "data"},
        link_rel=None,
    )


def _allowed(root: Path | None, tag: str, name: str, value: str) -> str | None:
    """The value of an attribute; None for an attribute that is removed."""
    if name == "href":
        return value if LINK.match(value) else None
    if name == "src":
        return value if DATA_MEDIA.match(value) else _embedded(value, root)
    return value


def _embedded(source: str, root: Path | None) -> str | None:
    """A picture or clip in the notebook's folder, as data; anything else is left out."""
    if root is None or not source or re.match(r"[a-z][a-z0-9+.-]*:|//", source, re.IGNORECASE):
        return None
    try:  # a name with a NUL is a ValueError, one that is too long an OSError
        path = (root / source).resolve()
        kind = mimetypes.guess_type(path.name)[0]
        inside = kind in EMBEDDED and path.is_relative_to(root.resolve())
        if inside and path.stat().st_size <= EMBEDDED_BYTES:
            return _data_url(kind, path.read_bytes())
    except (OSError, ValueError):
        pass
    return None


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _cut(source: str) -> str:
    if len(source) <= MOST_CHARS:
        return source
    half = MOST_CHARS // 2
    gap = f"... {len(source) - MOST_CHARS} characters left out, see console.log ..."
    return f"{source[:half]}\n{gap}\n{source[-half:]}"


def _ansi(source: str) -> str:
    # Here because the import takes half a second, longer than all else of a page, and few outputs have colours.
    from nbconvert.filters.ansi import ansi2html

    source = clean(source, colours=True)
    return str(ansi2html(source)) if "\x1b" in source else html.escape(source)


def _joined(value: Any) -> str:
    return "".join(map(str, value)) if isinstance(value, list) else str(value)
