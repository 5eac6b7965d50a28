"""Chromium, as tests and pictures of pages use it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--force-color-profile=srgb",
    "--autoplay-policy=no-user-gesture-required",
]
DRAWN = """() => [...document.querySelectorAll("[data-figure]")].every(p => p._fullLayout && p.dataset.drawn)
  && [...document.querySelectorAll("[data-explorer]")].every(p => p.dataset.drawn)
  && new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"""
"""JavaScript: whether every figure and live view of a page is drawn."""


def chromium() -> str | None:
    """Path of the Chromium of this machine."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def launched(path: str) -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield running
        running.close()


def drawn(page: Any, seconds: float = 30.0) -> bool:
    """Wait until every figure of a page is drawn; False where that takes longer."""
    for _ in range(int(50 * seconds)):
        if page.evaluate(DRAWN):
            return True
        page.wait_for_timeout(20)
    return False
