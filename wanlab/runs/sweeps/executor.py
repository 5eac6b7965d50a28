"""What a sweep asks of whatever runs its tasks, here or on a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from wanlab.runs.sweeps.task import Task


@dataclass(frozen=True)
class End:
    """A task that is no longer running.

    Attributes:
        code: exit status of its worker, negative for a signal; None when the worker was lost with its machine.
        lost: the worker did not come to its end, which says nothing against the notebook.
        reason: why, in words, where something is known.
    """

    task: Task
    code: int | None
    lost: bool = False
    reason: str = ""


class Executor(Protocol):
    """Runs tasks, as many at a time as there is room; a task that needs the machine alone gets it alone."""

    kind: str
    slots: int

    def submit(self, task: Task) -> None:
        """Queue a task. Tasks start in the order they were given, as far as there is room."""

    def poll(self, timeout_s: float) -> list[End]:
        """Tasks that ended since the last call; waits up to `timeout_s` for the first."""

    def stop(self, timeout_s: float) -> None:
        """Ask what runs to end, wait, then kill; what is queued never starts."""

    def close(self) -> None:
        """Give back what the executor holds."""


def start_cold(task: Task, environment: Mapping[str, str]) -> subprocess.Popen:
    """A worker from nothing, in a session of its own; it ends when the calling thread's process does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "wanlab.runs.sweeps.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    with process.stdin as pipe:
        pipe.write(task.to_json().encode())
    return process
