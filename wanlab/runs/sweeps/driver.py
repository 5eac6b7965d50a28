"""`wanlab sweep`: starts what is missing, tells the truth about each end, loses nothing when something dies."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlab.errors import WanlabError
from wanlab.runs.files import write_json
from wanlab.runs.folder import FINAL
from wanlab.runs.reap import reap
from wanlab.runs.sweeps.executor import End, Executor
from wanlab.runs.sweeps.grid import GridFile
from wanlab.runs.sweeps.record import FILE, SweepRecord, refuse_second_driver
from wanlab.runs.sweeps.task import Task
from wanlab.runs.sweeps.view import View
from wanlab.runs.sweeps.worker import MISTAKE, last_line

POLL_S = 0.25
STOP_S = 20.0  # for runs that are told to end
LOST_LIMIT = 2  # a run whose worker is lost is started once more, whatever the notebook; a failed one never


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended. `counts`: state -> number of runs; `reused` of the finished ones were finished before."""

    state: str  # finished, incomplete or aborted
    folder: Path
    index: Path
    counts: dict[str, int]
    reused: int
    seconds: float

    @property
    def exit_code(self) -> int:
        return {"finished": 0, "incomplete": 1, "aborted": 130}[self.state]


def sweep(file: GridFile, tasks: list[Task], executor: Executor, *, progress: bool = True) -> SweepOutcome:
    """Run what is missing of a grid, and write its page.

    Runs that finished before with the same notebook, parameters, files, weights and package are not run again. Those that
    share the machine come first, then those that need it alone. Ctrl-C or SIGTERM ends everything that was started; the
    next sweep takes it up. What a killed sweep left behind is cleaned up first, by what its own records name.

    Args:
        tasks: of the grid, from `expand`.

    Raises:
        WanlabError: another process runs this sweep.
    """
    folder = tasks[0].folder.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    refuse_second_driver(folder / FILE)
    reap(folder)
    done = {task.run_id for task in tasks if not task.force and is_done(task)}
    states = {task.run_id: "finished" if task.run_id in done else "pending" for task in tasks}
    about = {"kind": executor.kind, "slots": executor.slots}
    record = SweepRecord(folder / FILE, file, tasks, about, states, frozenset(done))
    record.write()
    missing = sorted((t for t in tasks if t.run_id not in done), key=lambda task: task.alone)
    with View(file.grid.name, tasks, missing, executor.slots, progress) as view, _stop_asked() as asked:
        _drive(executor, record, missing, view, asked)
        if asked:
            view.say(f"{asked[0]}: ending what runs")
    return _end(record, folder, aborted=bool(asked))


def is_done(task: Task) -> bool:
    """Whether an earlier run holds the answer."""
    from wanlab.runs.prepared import prepare

    ready = prepare(task.notebook, task.overrides, output=task.output, name=task.name, repeat=task.repeat)
    return bool(ready.finished())


def _drive(
    executor: Executor, record: SweepRecord, missing: list[Task], view: View, asked: list[str]
) -> None:
    waiting = {task.run_id: task for task in missing}
    for task in missing:
        record.attempts[task.run_id] = 1
        executor.submit(task)
    try:
        while waiting and not asked:
            for end in executor.poll(POLL_S):
                if _again(end, record):
                    view.say(f"{end.task.label}: {end.reason}; started again")
                    record.attempts[end.task.run_id] += 1
                    executor.submit(end.task)
                    continue
                del waiting[end.task.run_id]
                status = _settle(end)
                record.states[end.task.run_id] = status["state"]
                record.write()
                view.ended(end.task, status)
            for task in waiting.values():
                status = _status(task)
                if status.get("state") == "running":
                    record.states[task.run_id] = "running"
                    view.running(task, status)
            record.beat()
    finally:
        executor.stop(STOP_S)
        for task in waiting.values():
            status = _status(task)
            record.states[task.run_id] = status["state"] if status.get("state") in FINAL else "pending"


def _again(end: End, record: SweepRecord) -> bool:
    """A worker that was lost says nothing of the notebook; it gets one more try, and both attempts are kept."""
    if not end.lost or _status(end.task).get("state") == "finished":
        return False
    return record.attempts[end.task.run_id] < LOST_LIMIT


def _settle(end: End) -> dict[str, Any]:
    """The run's status with a final state; what its worker could not write is written here."""
    folder = end.task.folder
    status = _status(end.task)
    said = last_line(end.task.log)
    if end.code == MISTAKE and not end.lost:
        status = {"state": "failed", "reason": said or "it did not start"}
    elif status.get("state") not in FINAL or end.lost:
        if status.get("state") != "finished":
            status = {**status, "state": "died", "reason": end.reason or said or "its worker left no end"}
    else:
        return status
    folder.path.mkdir(parents=True, exist_ok=True)
    if not folder.run_json.is_file():
        task = end.task
        write_json(folder.run_json, {"run_id": task.run_id, "name": task.name, "parameters": task.overrides})
    write_json(folder.status_json, status)
    from wanlab.runs.pages.report import render

    render(folder.path)
    return status


def _status(task: Task) -> dict[str, Any]:
    try:
        return task.folder.status()
    except WanlabError:  # being written on a slow file system, or broken: asked again, or settled at the end
        return {}


def _end(record: SweepRecord, folder: Path, *, aborted: bool) -> SweepOutcome:
    from wanlab.runs.pages.index import render_index

    counts = dict(Counter(record.states.values()))
    state = "aborted" if aborted else "finished" if set(counts) == {"finished"} else "incomplete"
    record.write(state)
    seconds = time.monotonic() - record.begun
    return SweepOutcome(state, folder, render_index(folder), counts, len(record.reused), seconds)


@contextlib.contextmanager
def _stop_asked() -> Iterator[list[str]]:
    """A list that Ctrl-C and SIGTERM put their name into; a second Ctrl-C is Python's own."""
    asked: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: Any) -> None:
        asked.append("stopped by SIGTERM" if number == signal.SIGTERM else "interrupted by Ctrl-C")
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
