"""What a person sees while a notebook runs: a bar that names the current section, or plain lines in a log."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from typing import Any


class Progress:
    """Counts code cells. `step` is called as each cell starts, `close` at the end."""

    def __init__(self, label: str, titles: list[str], runs: list[bool], enabled: bool = True):
        self.titles, self.runs = titles, runs
        self.total = sum(runs)
        self.done = 0
        self.begun = time.monotonic()
        self.bar = None
        self.enabled = enabled
        self.label = label
        self._shown = None
        self._closed = threading.Event()
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.total,
                desc=label,
                file=sys.stderr,
                ncols=shutil.get_terminal_size().columns or None,
                bar_format="{bar:24} {n_fmt}/{total_fmt} {elapsed} {desc}",
            )

            threading.Thread(target=self._tick, name="wanlab-progress", daemon=True).start()

    def _tick(self) -> None:
        """Keeps the clock of the bar going while one cell takes long."""
        while not self._closed.wait(1.0):
            self.bar.refresh()

    def step(self, index: int, cell: Any) -> None:
        """Cell `index` starts."""
        if not self.enabled or not self.runs[index]:
            return
        title = self.titles[index]
        if self.bar is not None:
            self.bar.n = self.done
            self.bar.set_description_str(f"{self.label}: {title[:60]}")
        elif title != self._shown:
            seconds = time.monotonic() - self.begun
            print(
                f"{self.label} [{self.done + 1}/{self.total}] {seconds:6.1f} s  {title}",
                file=sys.stderr,
                flush=True,
            )
        self._shown = title
        self.done += 1

    def close(self, finished: bool) -> None:
        self._closed.set()
        if self.bar is not None:
            self.bar.n = self.total if finished else max(self.done - 1, 0)
            self.bar.set_description_str(self.label)
            self.bar.close()
