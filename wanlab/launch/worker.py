"""Runs one task in this process; as a fresh process: `python -m wanlab.launch.worker < task.json`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wanlab.core.errors import WanlabError
from wanlab.launch.execute import execute
from wanlab.launch.grid import Task
from wanlab.launch.kernel import die_with_parent
from wanlab.runs.prepare import prepare

MISTAKE = 2  # exit status of a mistake that the user can mend; the last line of the log describes it
WAIT_S = 30.0  # longest wait until an earlier attempt has written its end
WAIT_EVERY_S = 0.2


def run(task: Task) -> int:
    """Execute the task's notebook in this process; returns its exit status."""
    try:
        os.chdir(task.cwd)
        place: dict[str, Any] = {"output": task.output, "name": task.name, "repeat": task.repeat}
        run_id = prepare(task.notebook, task.overrides, **place).run_id
        if run_id != task.run_id:
            raise WanlabError(
                f"{task.notebook}, a file it names, or wanlab was changed while the sweep ran: this run would be {run_id}; "
                "start the sweep again"
            )
        _wait_for_earlier_attempt(task)
        return execute(
            task.notebook,
            task.overrides,
            force=task.force,
            timeout_s=task.limit_s,
            memory_limit_gib=task.memory_limit_gib,
            output_limit_mib=task.output_limit_mib,
            progress=False,
            **place,
        ).exit_code
    except (WanlabError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        return MISTAKE
    except KeyboardInterrupt:
        return 130


def _wait_for_earlier_attempt(task: Task) -> None:
    """An earlier attempt that was stopped may still be writing its end."""
    deadline = time.monotonic() + WAIT_S
    while task.folder.status().get("state") == "running" and time.monotonic() < deadline:
        time.sleep(WAIT_EVERY_S)


@contextlib.contextmanager
def log_to_file(task: Task) -> Iterator[None]:
    """Send everything that this process prints to the task's log."""
    task.log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def last_line(log: Path) -> str:
    """The last line of a worker's log, or an empty string."""
    try:
        lines = log.read_text("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:500] if lines else ""


def main() -> int:
    die_with_parent(signal.SIGTERM)
    task = Task.from_json(sys.stdin.read())
    with log_to_file(task):
        return run(task)


if __name__ == "__main__":
    sys.exit(main())
