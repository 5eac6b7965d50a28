"""What is looked for on every page at the widths and colours that people use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.browser import drawn

VIEWS = (
    (1400, False),
    (390, True),
)  # width in pixels, dark; a wide dark page differs from a wide light one in colours
FAULTS = Path(__file__).with_name("page_faults.js").read_text("utf-8")
SIDE = 8  # pixels that a text of a figure may stand out of it, as the ends of tilted labels do


def faults(browser: Any, report: Path, views: tuple[tuple[int, bool], ...] = VIEWS) -> list[str]:
    """What is wrong with a page as it is seen, a line for each; figures are drawn before it is looked at.

    - an element that is wider than the page, or than a box that neither scrolls with a fading edge nor wraps
    - texts of a figure that lie over one another or leave it
    - cells of tables with a number that is not known as a number (NaN), a name from code, or a raw number
    - errors of the console
    """
    found: list[str] = []
    for width, dark in views:
        where = f"{report.parent.parent.name} at {width} px{', dark' if dark else ''}"
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        page = context.new_page()
        wrong: list[str] = []
        page.on(
            "console", lambda message, to=wrong: message.type == "error" and to.append(message.text[:200])
        )
        page.on("pageerror", lambda error, to=wrong: to.append(str(error)[:200]))
        page.goto(report.resolve().as_uri(), timeout=120_000)
        if not drawn(page):
            wrong.append("figures are not drawn within 30 s")
        found += [f"{where}: {line}" for line in [*wrong, *page.evaluate(FAULTS, SIDE)]]
        context.close()
    return found
