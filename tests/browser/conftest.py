"""Pages as people see them: Debian's Chromium, headless, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--force-color-profile=srgb",
    "--autoplay-policy=no-user-gesture-required",
]


@pytest.fixture(scope="session")
def browser():
    """One Chromium for all tests of a process."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.fail("no Chromium: `make chromium` installs Debian's, or set CHROMIUM to the path of one")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield running
        running.close()


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
