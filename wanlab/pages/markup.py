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

import bleach
import mistune
from bs4 import BeautifulSoup
from nbconvert.filters.ansi import ansi2html
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers.python import PythonLexer

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
LONG_LINES = 24  # text outputs above this are folded
KEPT_LINES = 400  # and above this their middle is left out
KEPT_CHARS = 60_000
IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")

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
    "video": {"src", "poster", "autoplay", "loop", "muted", "playsinline", "controls", "width", "height"},
    "td": {"colspan", "rowspan"},
    "th": {"colspan", "rowspan", "scope"},
    "ol": {"start"},
    "details": {"open"},
}
GONE_WITH_CONTENT = (
    "script",
    "style",
    "iframe",
    "object",
    "embed",
    "link",
    "meta",
    "template",
    "noscript",
    "svg",
    "math",
)
DATA_MEDIA = re.compile(
    r"data:(image/(png|jpeg|gif|webp|svg\+xml)|video/(mp4|webm));base64,[A-Za-z0-9+/=\s]*\Z"
)
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
    return sanitise(_markdown()(source), page)


@functools.cache
def _markdown() -> Any:
    return mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url", "task_lists"])


def code(source: str) -> str:
    """Highlighted Python."""
    return highlight(source, PythonLexer(), HtmlFormatter(nowrap=False, cssclass="code"))


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
    for image in IMAGES:
        if image in data:
            return f'<p><img alt="" src="data:{image};base64,{"".join(_joined(data[image]).split())}"></p>'
    if "image/svg+xml" in data:
        packed = base64.b64encode(_joined(data["image/svg+xml"]).encode()).decode()
        return f'<p><img alt="" src="data:image/svg+xml;base64,{packed}"></p>'
    if "text/markdown" in data:
        return f'<div class="rich">{markdown(_joined(data["text/markdown"]), page)}</div>'
    return text(_joined(data["text/plain"])) if "text/plain" in data else ""


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
    if len(joined) > KEPT_CHARS:
        half = KEPT_CHARS // 2
        gap = f"... {len(joined) - KEPT_CHARS} characters left out, see console.log ..."
        joined = f"{joined[:half]}\n{gap}\n{joined[-half:]}"
    body = f'<pre class="text">{_ansi(joined)}</pre>'
    if count <= LONG_LINES and not quiet:
        return body
    label = "messages" if quiet else "output"
    return f"<details><summary>{label}, {count} line{'s' if count != 1 else ''}</summary>{body}</details>"


def traceback(source: str) -> str:
    """A traceback with its colours."""
    if len(source) > KEPT_CHARS:
        source = f"{source[: KEPT_CHARS // 2]}\n...\n{source[-KEPT_CHARS // 2 :]}"
    return f'<pre class="text traceback">{_ansi(source)}</pre>'


def sanitise(source: str, page: Page) -> str:
    """HTML from a notebook, with an allow-list of tags; media only as data inside the page."""
    soup = BeautifulSoup(source, "html.parser")
    for tag in soup(GONE_WITH_CONTENT):
        tag.decompose()
    # Media are taken out before cleaning: parsing megabytes of base64 as an attribute is slow.
    media: dict[str, str] = {}
    for tag in soup(["img", "video"]):
        source_url = str(tag.get("src", ""))
        inside = source_url if DATA_MEDIA.match(source_url) else _embedded(source_url, page.root)
        if inside:
            tag["src"] = f"media-{len(media)}"
            media[tag["src"]] = inside
        elif "src" in tag.attrs:
            del tag["src"]
            if tag.name == "video":
                tag.decompose()
    cleaned = bleach.clean(
        str(soup), tags=TAGS, attributes=_allowed, protocols={"http", "https", "mailto"}, strip=True
    )
    return re.sub(r'src="(media-\d+)"', lambda match: f'src="{media.get(match[1], "")}"', cleaned)


def _allowed(tag: str, name: str, value: str) -> bool:
    if name in ATTRIBUTES["*"]:
        return True
    if name not in ATTRIBUTES.get(tag, ()):
        return False
    if name == "href":
        return bool(LINK.match(value))
    return name not in ("src", "poster") or bool(re.fullmatch(r"media-\d+", value))


def _embedded(source: str, root: Path | None) -> str | None:
    """A picture that lies beside the notebook, as data; anything else is left out."""
    if root is None or not source or re.match(r"[a-z][a-z0-9+.-]*:|//", source, re.IGNORECASE):
        return None
    path = (root / source).resolve()
    kind = mimetypes.guess_type(path.name)[0] or ""
    if kind not in (*IMAGES, "image/svg+xml", "video/mp4", "video/webm") or not path.is_file():
        return None
    if path.stat().st_size > 16 * 2**20:
        return None
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _ansi(source: str) -> str:
    return str(ansi2html(source)) if "\x1b" in source else html.escape(source)


def _joined(value: Any) -> str:
    return "".join(value) if isinstance(value, list) else str(value)
