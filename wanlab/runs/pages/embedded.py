"""Clips inside a page, once each and within a budget; beyond it they are played from their files."""

from __future__ import annotations

import base64
from pathlib import Path

from wanlab.runs.files import digest
from wanlab.runs.pages.board import href

BUDGET_CHARS = 8 * 2**20  # of base64, in one page


class Shelf:
    """Clips by the hash of their bytes. `inside` goes into the page, `outside` stays where it is.

    Attributes:
        inside: hash -> base64.
        outside: files that the page plays from their relative address.
    """

    def __init__(self, root: Path, budget_chars: int = BUDGET_CHARS):
        self.root, self.left = root, budget_chars
        self.inside: dict[str, str] = {}
        self.outside: list[Path] = []

    def put(self, path: Path) -> dict[str, str]:
        """Where the page finds a clip: `{"clip": hash}` or `{"href": "./..."}`."""
        if 4 * path.stat().st_size / 3 <= self.left:
            data = path.read_bytes()
            name = digest([data], 16)
            if name not in self.inside:
                self.inside[name] = base64.b64encode(data).decode()
                self.left -= len(self.inside[name])
            return {"clip": name}
        self.outside.append(path)
        return {"href": href(path, self.root) or ""}
