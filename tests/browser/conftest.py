"""Pages as people see them: Debian's Chromium, headless, driven by Playwright."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def open_page(browser):
    """Open a file or an address; the test fails on a console error, a page error, or a request to anywhere else."""
    contexts, wrong = [], []

    def go(
        target: Path | str,
        *,
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
        allowed: tuple[str, ...] = (),
    ):
        address = target.resolve().as_uri() if isinstance(target, Path) else target
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            accept_downloads=True,
        )
        contexts.append(context)
        context.set_default_timeout(120_000)  # another process may have the machine
        page = context.new_page()
        own = (address, "data:", "blob:", "about:", *allowed)
        page.on(
            "request",
            lambda request: request.url.startswith(own) or wrong.append(f"request to {request.url[:200]}"),
        )
        page.on(
            "console",
            lambda message: message.type == "error" and wrong.append(f"console: {message.text[:300]}"),
        )
        page.on("pageerror", lambda error: wrong.append(f"page error: {str(error)[:300]}"))
        page.goto(address)
        return page

    yield go
    for context in contexts:
        context.close()
    assert not wrong, wrong
