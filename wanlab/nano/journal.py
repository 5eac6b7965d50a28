"""What a long examination has finished, kept as it goes, so that an interrupted one loses nothing."""

from __future__ import annotations

import json
from pathlib import Path


class Journal:
    """Rows of finished cases beside the results they will become: JSON lines, the first one a key.

    Rows that were made under another key (other weights, engine, backbones or code) do not count and are dropped.

    Args:
        path: of the results; the journal is `<path>.journal`. None keeps nothing on disk.
        key: what must be equal for the rows to count.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path = None if path is None else path.with_name(path.name + ".journal")
        self.cases: list[list[dict]] = []
        if self.path is None:
            return
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        if lines and json.loads(lines[0]) == {"key": key}:
            # A line that was cut off in the middle has no case to give.
            self.cases = [json.loads(line) for line in lines[1:] if line.endswith("]")]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in ({"key": key}, *self.cases)))

    def add(self, rows: list[dict]) -> None:
        """Keep the rows of one more case."""
        self.cases.append(rows)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(rows) + "\n")

    def done(self) -> None:
        """The results are written: the journal has served."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
