"""sweep.json: what a sweep is made of and how far it is. Written by its driver alone, read by everyone."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanlab.errors import WanlabError
from wanlab.runs.files import now, plain, read_json, write_json
from wanlab.runs.folder import host_id, process_id, writer_alive
from wanlab.runs.header import shown_path
from wanlab.runs.sweeps.expand import varied
from wanlab.runs.sweeps.grid import GridFile
from wanlab.runs.sweeps.task import Task

FILE = "sweep.json"
HEARTBEAT_S = 5.0


@dataclass
class SweepRecord:
    """The record while its sweep is going.

    Attributes:
        states: run_id -> state of each run; `pending` until it starts.
        reused: runs that an earlier sweep had finished.
    """

    path: Path
    file: GridFile
    tasks: list[Task]
    executor: dict[str, Any]
    states: dict[str, str]
    reused: frozenset[str]
    attempts: dict[str, int] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)
    started: str = field(default_factory=now)
    _written: float = 0.0

    def write(self, state: str = "running") -> None:
        """Write the file, whole."""
        grid = self.file.grid
        write_json(
            self.path,
            {
                "name": grid.name,
                "title": grid.title,
                "grid_file": shown_path(self.file.path),
                "state": state,
                "started": self.started,
                "ended": None if state == "running" else now(),
                "heartbeat": now(),
                "seconds": round(time.monotonic() - self.begun, 3),
                "host": host_id(),
                "writer": process_id(os.getpid()),
                "executor": self.executor,
                "axes": varied(self.tasks),
                "baseline": plain(grid.baseline) or None,
                "show": grid.show or None,
                "runs": [self._run(task) for task in self.tasks],
            },
        )
        self._written = time.monotonic()

    def beat(self) -> None:
        """Write again if it is time to."""
        if time.monotonic() - self._written > HEARTBEAT_S:
            self.write()

    def _run(self, task: Task) -> dict[str, Any]:
        return {
            "label": task.label,
            "run_id": task.run_id,
            "notebook": shown_path(Path(task.notebook)),
            "parameters": task.axes,
            "repeat": task.repeat,
            "machine": task.machine,
            "state": self.states[task.run_id],
            "reused": task.run_id in self.reused,
            "attempts": self.attempts.get(task.run_id, 0),
        }


def refuse_second_driver(path: Path) -> None:
    """Two drivers of one sweep would start every run twice.

    Raises:
        WanlabError: the sweep is being run by another living process.
    """
    try:
        record = read_json(path) if path.is_file() else {}
    except WanlabError:
        return  # broken: written again by this sweep
    if isinstance(record, dict) and record.get("state") == "running" and writer_alive(record):
        pid = (record.get("writer") or {}).get("pid")
        if pid != os.getpid():
            raise WanlabError(f"sweep {path.parent} is being run by process {pid}; wait for it or stop it")
