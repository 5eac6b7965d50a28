"""What a notebook writes: console.log has all of it, the notebook file what can be read, and a flood an end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wanlab.runs.files import append_bytes, why

TEXT_LIMIT_CHARS = 200_000  # printed text of a cell that the notebook keeps; console.log has all of it
RICH_LIMIT_BYTES = (
    16 * 2**20
)  # figures, tables and clips of a cell that the notebook keeps, besides the last one kept
RICH_LIMIT = 200  # of them
LARGEST_BYTES = 64 * 2**20  # of one
ERROR_LIMIT_CHARS, ERROR_LIMIT_LINES = 20_000, 200  # message and lines of a traceback


class Console:
    """Takes the output messages of a run's cells.

    Attributes:
        cut: indices of cells whose output the notebook does not hold in full.
        total_bytes: written so far, printed and shown together, without what was cleared again.
    """

    def __init__(self, path: Path, limit_mib: float, end: Callable[[str, str], None]):
        """`end` is called once with state and reason, where the limit is passed or the disk is full."""
        self.path, self.limit_mib, self.end = path, limit_mib, end
        self.cut: set[int] = set()
        self.total_bytes = 0
        self._ended = False
        self._text: dict[int, int] = {}
        self._rich: dict[int, list[int]] = {}

    def keeps(self, message: dict[str, Any], index: int) -> bool:
        """Take an output of cell `index`; whether the notebook is to keep it, perhaps shortened in place."""
        if self._ended:
            return False
        kind = message["msg_type"]
        if kind == "error":
            _shorten(message["content"])
            return True
        return self._printed(message["content"], index) if kind == "stream" else self._shown(message, index)

    def cleared(self, index: int) -> None:
        """A cell takes back what it has shown, as live plots and progress displays do."""
        self._text.pop(index, None)
        self.total_bytes -= sum(self._rich.pop(index, []))

    def _printed(self, content: dict[str, Any], index: int) -> bool:
        text = content["text"]
        data = text.encode("utf-8", "replace")
        try:
            append_bytes(self.path, data)
        except OSError as error:
            self._end("failed", why(error))
            return False
        self._add(len(data), index)
        before = self._text.get(index, 0)
        self._text[index] = before + len(text)
        if before + len(text) > TEXT_LIMIT_CHARS:
            self.cut.add(index)
            kept = text[: max(0, TEXT_LIMIT_CHARS - before)]
            content["text"] = f"{kept}\n... output continues in {self.path.name}\n"
        return before <= TEXT_LIMIT_CHARS

    def _shown(self, message: dict[str, Any], index: int) -> bool:
        data = message["content"].get("data") or {}
        size = len(json.dumps(data, default=str))
        kept = self._rich.setdefault(index, [])
        full = sum(kept) >= RICH_LIMIT_BYTES or len(kept) >= RICH_LIMIT or size > LARGEST_BYTES
        self._add(size, index)
        if not full:
            kept.append(size)
        elif index not in self.cut:
            self.cut.add(index)
            message["content"]["data"] = {"text/plain": "... this cell shows more than the notebook keeps"}
            return True
        return not full

    def _add(self, size: int, index: int) -> None:
        self.total_bytes += size
        if self.total_bytes > self.limit_mib * 2**20:
            self._end("flooded", flood(self.total_bytes / 2**20, index + 1, self.limit_mib))

    def _end(self, state: str, reason: str) -> None:
        self._ended = True
        self.end(state, reason)


def flood(written_mib: float, cell: int, limit_mib: float) -> str:
    """The reason of a run that is ended for what it wrote."""
    return f"wrote {math.ceil(written_mib * 10) / 10:g} MiB of output by cell {cell}, over its limit of {limit_mib:g} MiB"


def _shorten(content: dict[str, Any]) -> None:
    """An exception can carry a flood too."""
    content["evalue"] = str(content.get("evalue", ""))[:ERROR_LIMIT_CHARS]
    lines = [str(line)[:ERROR_LIMIT_CHARS] for line in content.get("traceback", [])]
    half = ERROR_LIMIT_LINES // 2
    content["traceback"] = lines if len(lines) <= 2 * half else [*lines[:half], "...", *lines[-half:]]
