"""Notebook cells and their outputs as HTML that is safe to open: nothing fetched, run or unescaped."""

from __future__ import annotations

import base64
import functools
import html
import json
import mimetypes
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mistune
import nh3
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
LONG_LINES = 24  # text outputs above this are folded
KEPT_LINES = 400  # and above this their middle is left out
KEPT_CHARS = 60_000
IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")
EMBEDDED = (*IMAGES, "image/svg+xml", "video/mp4", "video/webm")
EMBEDDED_BYTES = 16 * 2**20  # of one file

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
GONE_WITH_CONTENT = set(
    "script style iframe object embed link meta template noscript svg math".split()  # noqa: SIM905
)
DATA_MEDIA = re.compile(
    r"data:(image/(png|jpeg|gif|webp|svg\+xml)|video/(mp4|webm));base64,[A-Za-z0-9+/=\s]*\Z"
)
MARKDOWN = mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url", "task_lists"])
LINK = re.compile(r"(https?://|mailto:|#)", re.IGNORECASE)


@dataclass
class Page:
    """What the page needs beyond its body: figures to draw, and where relative pictures are found."""

    root: Path | None = None
    figures: list[dict[str, Any]] = field(default_factory=list)

    def figure(self, payload: dict[str, Any]) -> str:
        layout = payload.get("layout") or {}
        self.figures.append(
            {"data": payload.get("data", []), "layout": layout, "config": payload.get("config") or {}}
        )
        height = layout.get("height") or 420
        style = f' style="height:{int(height)}px"' if isinstance(height, int | float) else ""
        return f'<div class="figure" data-figure="{len(self.figures) - 1}"{style}></div>'


def markdown(source: str, page: Page) -> str:
    """Markdown as sanitised HTML, with tables and pictures from the notebook's folder inside."""
    return sanitise(str(MARKDOWN(source)), page)


def code(source: str) -> str:
    """Highlighted Python."""
    return highlight(source, PythonLexer(), HtmlFormatter(cssclass="code"))


@functools.cache
def code_css() -> str:
    """Colours of `code`, for a light and a dark page."""
    light, dark = (HtmlFormatter(style=s).get_style_defs(".code") for s in ("default", "github-dark"))
    return f"\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def output(item: Any, page: Page) -> str:
    """One notebook output: the richest form that a closed page can show."""
    kind = item.get("output_type")
    if kind == "stream":
        return text(item.get("text", ""), quiet=item.get("name") == "stderr")
    if kind == "error":
        return traceback("\n".join(item.get("traceback", [])) or f"{item.get('ename')}: {item.get('evalue')}")
    data = item.get("data") or {}
    if WIDGET in data:  # it needs a kernel, and a bar that has finished says nothing
        return ""
    if PLOTLY in data:
        return page.figure(data[PLOTLY] if isinstance(data[PLOTLY], dict) else json.loads(data[PLOTLY]))
    if "text/html" in data:
        return f'<div class="rich">{sanitise(_joined(data["text/html"]), page)}</div>'
    for kind in IMAGES:
        if kind in data:
            return _picture(f"data:{kind};base64,{''.join(_joined(data[kind]).split())}", page)
    if "image/svg+xml" in data:
        return _picture(_data_url("image/svg+xml", _joined(data["image/svg+xml"]).encode()), page)
    if "text/markdown" in data:
        return f'<div class="rich">{markdown(_joined(data["text/markdown"]), page)}</div>'
    return text(_joined(data["text/plain"])) if "text/plain" in data else ""


def _picture(url: str, page: Page) -> str:
    # What a notebook calls base64 may hold a quote that would end the attribute.
    image = sanitise(f'<img alt="" src="{url}">', page)
    return f"<p>{image}</p>"


def text(source: str, *, quiet: bool = False) -> str:
    """Printed text: progress bars at their last state, long text folded, the middle of a flood left out."""
    lines = [line.rsplit("\r", 1)[-1] for line in source.replace("\r\n", "\n").rstrip().split("\n")]
    if not any(line.strip() for line in lines):
        return ""
    count = len(lines)
    if count > KEPT_LINES:
        gap = f"... {count - KEPT_LINES} lines left out, see console.log ..."
        lines = [*lines[: KEPT_LINES // 2], gap, *lines[-KEPT_LINES // 2 :]]
    joined = "\n".join(lines)
    body = f'<pre class="text">{_ansi(_cut(joined))}</pre>'
    if count <= LONG_LINES and not quiet:
        return body
    label = "messages" if quiet else "output"
    return f"<details><summary>{label}, {count} line{'s' if count != 1 else ''}</summary>{body}</details>"


def traceback(source: str) -> str:
    """A traceback with its colours."""
    return f'<pre class="text traceback">{_ansi(_cut(source))}</pre>'


def sanitise(source: str, page: Page) -> str:
    """HTML from a notebook, with an allow-list of tags and attributes; media only as data inside the page."""
    return nh3.clean(
        source.encode("utf-8", "replace").decode(),  # nh3 refuses lone surrogates
        tags=TAGS,
        clean_content_tags=GONE_WITH_CONTENT,
        attributes=ATTRIBUTES,
        attribute_filter=functools.partial(_allowed, page.root),
        url_schemes={"http", "https", "mailto", "data"},
        link_rel=None,
    )


def _allowed(root: Path | None, tag: str, name: str, value: str) -> str | None:
    """The value that an attribute keeps, None for one that goes."""
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
    if len(source) <= KEPT_CHARS:
        return source
    half = KEPT_CHARS // 2
    gap = f"... {len(source) - KEPT_CHARS} characters left out, see console.log ..."
    return f"{source[:half]}\n{gap}\n{source[-half:]}"


def _ansi(source: str) -> str:
    # Here because the import takes half a second, longer than all else of a page, and few outputs have colours.
    from nbconvert.filters.ansi import ansi2html

    return str(ansi2html(source)) if "\x1b" in source else html.escape(source)


def _joined(value: Any) -> str:
    return "".join(value) if isinstance(value, list) else str(value)
