"""What a runner that was killed has left behind: processes still running, and a status that says "running"."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wanlab.errors import WanlabError
from wanlab.runs.endings import EXIT_CODES
from wanlab.runs.files import now, read_json, write_json
from wanlab.runs.folder import RunFolder, host_id, process_alive
from wanlab.runs.guard import processes


def reap(folder: str | os.PathLike) -> list[Path]:
    """End the runs below `folder` whose runner is gone: kill what they record, and say that they died.

    Only runs of this machine since it was started, and only processes that a run's status.json names by number and
    start time (and what descends from them).

    Returns:
        The folders of those runs.
    """
    return [run.path for run in _running(Path(folder)) if _reaped(run)]


def _running(root: Path) -> Iterator[RunFolder]:
    for path, below, files in os.walk(root):
        below.sort()
        if "status.json" in files:
            below.clear()  # attempts and artifacts of this run
            yield RunFolder(Path(path))


def _reaped(run: RunFolder) -> bool:
    status = _left(run)
    if status is None:
        return False
    named = [status.get("kernel"), *(status.get("processes") or [])]
    processes.kill(process for who in named if (process := processes.recorded(who)))
    if _left(run) != status:  # somebody else has just done it, or has started the run again
        return False
    run.release()
    reason = "the process that ran it is gone"
    write_json(
        run.status_json,
        {**status, "state": "died", "exit": EXIT_CODES["died"], "reason": reason, "ended": now()}
        | {
            key: status["progress"][key] for key in ("cell", "title") if key in (status.get("progress") or {})
        },
    )
    from wanlab.runs.pages.report import render

    render(run.path)
    return True


def _left(run: RunFolder) -> dict[str, Any] | None:
    """The status of a run that says it is running on this machine, and is not."""
    try:
        status = read_json(run.status_json)
    except WanlabError:
        return None
    if not isinstance(status, dict) or status.get("state") != "running" or status.get("host") != host_id():
        return None
    return None if process_alive(status.get("writer") or {}) else status
