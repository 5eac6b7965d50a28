"""What all pages share: templates and their files, words for the state of a run, JSON that is safe inside a page."""

from __future__ import annotations

import functools
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from wanlab.core.errors import clean, cleaned

TEMPLATE = Path(__file__).with_name("template")
SCRIPT, STYLE = (TEMPLATE.parents[1] / "plots" / f"explorer.{kind}" for kind in ("js", "css"))
GLOSSARY = Path(__file__).with_name("glossary.json")
WORDS = {
    "finished": "finished",
    "failed": "failed",
    "died": "kernel died",
    "timeout": "timed out",
    "memory": "ran out of memory",
    "flooded": "too much output",
    "aborted": "aborted",
    "running": "running",
    "pending": "not started",
    "unreadable": "unreadable",
    "changed": "changed after it ended",
}


def fill(name: str, **values: Any) -> str:
    """A template rendered as text; values that are not Markup are escaped."""
    return _environment().get_template(name).render(**values)


@functools.cache
def _environment() -> Any:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    environment.globals["terms"] = json_script(glossary())
    return environment


@functools.cache
def glossary() -> list[dict[str, Any]]:
    """Terms of the workbench: `term`, other words for it in `also`, and what it `means`."""
    return json.loads(GLOSSARY.read_text("utf-8"))


def glossary_markdown() -> str:
    """The terms in alphabetical order, as the page docs/glossary.md has them."""
    rows = [
        f"| {' / '.join([each['term'], *each['also']])} | {each['means']} |"
        for each in sorted(glossary(), key=lambda each: each["term"].lower())
    ]
    return "\n".join(["| term | meaning |", "|---|---|", *rows])


def asset(*names: str) -> Any:
    """Files of the template folder, joined, for a style or script element."""
    return Markup("\n".join((TEMPLATE / name).read_text("utf-8") for name in names))


@functools.cache
def plotly_script() -> Any:
    """plotly.js, 4.8 MB, for a script element."""
    return Markup(get_plotlyjs().replace("</script", "<\\/script"))


@functools.cache
def explorer_assets() -> dict[str, Any]:
    """Style and script of the live view of a trace, with the lines that open it in a page."""
    page = (TEMPLATE / "explorer.js").read_text("utf-8")
    return {"css": Markup(STYLE.read_text("utf-8")), "script": Markup(SCRIPT.read_text("utf-8") + page)}


def json_script(value: Any) -> Any:
    """JSON for a script element: no tag and no line separator can end it early."""
    text = json.dumps(cleaned(value), ensure_ascii=False, separators=(",", ":"))
    for character, escaped in (
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("&", "\\u0026"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        text = text.replace(character, escaped)
    return Markup(text)


def display_time(moment: Any) -> str | None:
    """An ISO 8601 time as text, in UTC."""
    try:
        return datetime.fromisoformat(str(moment)).strftime("%-d %B %Y, %H:%M UTC")
    except ValueError:
        return str(moment) if moment else None


def duration(seconds: Any) -> str | None:
    """Seconds as hours, minutes and seconds."""
    if not isinstance(seconds, int | float) or seconds != seconds:
        return None
    minutes, rest = divmod(float(seconds), 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest:.0f} s" if minutes else f"{rest:.1f} s"
