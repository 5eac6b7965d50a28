"""`wanlab sweep`: runs what is missing of a grid and records the end of each run, also where a process was killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from wanlab.core.errors import WanlabError
from wanlab.core.files import now, plain, write_json
from wanlab.launch.grid import GridFile, Task, varied
from wanlab.launch.guard import reap
from wanlab.launch.worker import MISTAKE, last_line
from wanlab.pages.report import render
from wanlab.pages.sweep_page import render_index
from wanlab.runs.folder import FINAL, host_id, process_id, writer_alive
from wanlab.runs.prepare import prepare, shown_path
from wanlab.runs.results import read_sweep


@dataclass(frozen=True)
class End:
    """A task that has ended.

    Attributes:
        code: exit status of its worker, negative for a signal; None where the worker was lost with its machine.
        lost: the worker was killed from outside, so the notebook itself may be without fault.
        reason: reason in words, where it is known.
    """

    task: Task
    code: int | None
    lost: bool = False
    reason: str = ""


class Executor(Protocol):
    """Runs tasks, as many at a time as it has slots; a task that needs the machine alone runs alone."""

    kind: str
    slots: int

    def submit(self, task: Task) -> None:
        """Queue a task. Tasks start in this order, as soon as slots are free."""

    def poll(self, timeout_s: float) -> list[End]:
        """Tasks that have ended since the last call; waits up to `timeout_s` for the first."""

    def stop(self, timeout_s: float) -> None:
        """Ask running tasks to end, wait, then kill them; drop the queue."""

    def close(self) -> None:
        """Release the resources of the executor."""


def start_process(task: Task, environment: Mapping[str, str]) -> subprocess.Popen:
    """Start a worker as a fresh process in a session of its own; it ends when the calling process ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "wanlab.launch.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    with process.stdin as pipe:
        pipe.write(task.to_json().encode())
    return process


FILE = "sweep.json"
HEARTBEAT_S = 5.0


@dataclass
class SweepRecord:
    """sweep.json of a running sweep.

    Attributes:
        states: run_id -> state of the run; `pending` until it starts.
        reused: ids of the runs that an earlier sweep had finished.
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
        """Write the whole file."""
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
        """Write the file again if the last write is older than `HEARTBEAT_S`."""
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
    """Refuse to run a sweep that another process runs: each run would start twice.

    Raises:
        WanlabError: another living process runs this sweep.
    """
    try:
        record = read_sweep(path.parent)
    except WanlabError:
        return  # the file is broken; this sweep writes it again
    if record.get("state") == "running" and writer_alive(record):
        pid = (record.get("writer") or {}).get("pid")
        if pid != os.getpid():
            raise WanlabError(f"sweep {path.parent} is being run by process {pid}; wait for it or stop it")


class View:
    """Progress of a sweep in the terminal, with an estimate of the time that is left.

    Args:
        tasks: all tasks of the sweep.
        missing: tasks that are to run.
        slots: number of tasks that run at a time.
    """

    def __init__(self, name: str, tasks: list[Task], missing: list[Task], slots: int, enabled: bool = True):
        self.total, self.slots, self.enabled = len(missing), slots, enabled
        self.left = {task.run_id: task for task in missing}
        self.took_s: dict[bool, list[float]] = {False: [], True: []}
        self.begun = time.monotonic()
        self.bar = None
        self.lines: dict[str, Any] = {}
        self.shown: dict[str, Any] = {}
        self.ended_count = 0
        reused = len(tasks) - len(missing)
        if enabled:
            before = f", {reused} finished before" if reused else ""
            print(f"{name}: {self.total} run{'s' * (self.total != 1)}{before}", file=sys.stderr, flush=True)
        if enabled and sys.stderr.isatty() and self.total:
            columns = shutil.get_terminal_size().columns or None
            self.bar = tqdm(
                total=self.total,
                file=sys.stderr,
                ncols=columns,
                bar_format="{bar:24} {n_fmt}/{total_fmt} {elapsed} {desc}",
            )

    def __enter__(self) -> View:
        return self

    def __exit__(self, *error: object) -> None:
        for line in self.lines.values():
            line.close()
        if self.bar is not None:
            self.bar.close()

    def print(self, text: str) -> None:
        """Print a line above the bars."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def running(self, task: Task, status: dict[str, Any]) -> None:
        """Show the cell that a run is at."""
        at = status.get("progress") or {}
        where = f"{at.get('title', 'starting')} ({at.get('cell', 0)}/{at.get('of', 0)})"
        if self.bar is None:
            if self.enabled and task.run_id not in self.shown:
                self.shown[task.run_id] = where
                print(f"  started  {task.label}", file=sys.stderr, flush=True)
            return
        line = self.lines.get(task.run_id)
        if line is None:
            used = {other.pos for other in self.lines.values()}
            position = next(p for p in range(1, 10_000) if -p not in used)
            line = self.lines[task.run_id] = tqdm(
                total=None,
                position=position,
                leave=False,
                file=sys.stderr,
                ncols=self.bar.ncols,
                bar_format="  {elapsed} {desc}",
            )
        line.set_description_str(f"{task.label}: {where}")
        self.bar.set_description_str(self.rest())

    def ended(self, task: Task, status: dict[str, Any]) -> None:
        """Show the end of a run: always in a log, beside bars only where the run did not finish."""
        self.left.pop(task.run_id, None)
        self.ended_count += 1
        seconds = float(status.get("seconds") or 0.0)
        self.took_s[task.alone].append(seconds)
        if line := self.lines.pop(task.run_id, None):
            line.close()
        state = status["state"]
        reason = f": {status.get('reason')}" if state != "finished" and status.get("reason") else ""
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_description_str(self.rest())
            if state != "finished":
                self.print(f"{state}  {task.label}{reason}")
        else:
            text = f"[{self.ended_count}/{self.total}] {state} in {seconds:.1f} s  {task.label}{reason}"
            rest = self.rest()
            self.print(f"{text}  ({rest})" if rest else text)

    def rest(self) -> str:
        """`"about 3 min left"`, from the mean time of the runs that have ended; "" before the first."""
        all_s = [*self.took_s[False], *self.took_s[True]]
        if not all_s or not self.left:
            return ""
        mean = {alone: sum(times or all_s) / len(times or all_s) for alone, times in self.took_s.items()}
        shared = sum(not task.alone for task in self.left.values())
        seconds = mean[False] * shared / self.slots + mean[True] * (len(self.left) - shared)
        return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"


POLL_S = 0.25
STOP_S = 20.0  # for running tasks to end when the sweep is stopped
LOST_LIMIT = 2  # attempts of a run whose worker is lost; a run that failed is not started again


@dataclass(frozen=True)
class SweepOutcome:
    """The end of a sweep.

    Attributes:
        state: `"finished"`, `"incomplete"` or `"aborted"`.
        index: path of its page.
        counts: state -> number of runs.
        reused: number of the finished runs that had finished before.
    """

    state: str
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

    Runs that finished before with the same notebook, parameters, files, weights and package are not run again. Tasks that
    share the machine come first, then those that need it alone. Ctrl-C or SIGTERM ends everything that was started; the
    next start of the sweep continues. Processes that a killed sweep left are ended first (see `reap`).

    Args:
        tasks: tasks of the grid, from `expand`.

    Raises:
        WanlabError: another process runs this sweep.
    """
    folder = tasks[0].folder.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    refuse_second_driver(folder / FILE)
    reap(folder)
    done = {task.run_id for task in tasks if not task.force and is_done(task)}
    states = {task.run_id: "finished" if task.run_id in done else "pending" for task in tasks}
    executor_facts = {"kind": executor.kind, "slots": executor.slots}
    record = SweepRecord(folder / FILE, file, tasks, executor_facts, states, frozenset(done))
    record.write()
    missing = sorted((t for t in tasks if t.run_id not in done), key=lambda task: task.alone)
    with View(file.grid.name, tasks, missing, executor.slots, progress) as view, _stop_signals() as signals:
        _drive(executor, record, missing, view, signals)
        if signals:
            view.print(f"{signals[0]}: ending what runs")
    return _end(record, folder, aborted=bool(signals))


def is_done(task: Task) -> bool:
    """Whether an earlier run of the same identity has finished."""
    ready = prepare(task.notebook, task.overrides, output=task.output, name=task.name, repeat=task.repeat)
    return bool(ready.finished())


def _drive(
    executor: Executor, record: SweepRecord, missing: list[Task], view: View, signals: list[str]
) -> None:
    waiting = {task.run_id: task for task in missing}
    for task in missing:
        record.attempts[task.run_id] = 1
        executor.submit(task)
    try:
        while waiting and not signals:
            for end in executor.poll(POLL_S):
                if _again(end, record):
                    view.print(f"{end.task.label}: {end.reason}; started again")
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
    """Whether a run whose worker was lost is started again; both attempts are kept."""
    if not end.lost or _status(end.task).get("state") == "finished":
        return False
    return record.attempts[end.task.run_id] < LOST_LIMIT


def _settle(end: End) -> dict[str, Any]:
    """The run's status with a final state. Files that its worker could not write are written here."""
    folder = end.task.folder
    status = _status(end.task)
    message = last_line(end.task.log)
    if end.code == MISTAKE and not end.lost:
        status = {"state": "failed", "reason": message or "it did not start"}
    elif status.get("state") not in FINAL or end.lost:
        if status.get("state") != "finished":
            status = {**status, "state": "died", "reason": end.reason or message or "its worker left no end"}
    else:
        return status
    folder.path.mkdir(parents=True, exist_ok=True)
    if not folder.run_json.is_file():
        task = end.task
        write_json(folder.run_json, {"run_id": task.run_id, "name": task.name, "parameters": task.overrides})
    write_json(folder.status_json, status)
    render(folder.path)
    return status


def _status(task: Task) -> dict[str, Any]:
    try:
        return task.folder.status()
    except WanlabError:  # broken, or being written on a slow file system; it is read again later
        return {}


def _end(record: SweepRecord, folder: Path, *, aborted: bool) -> SweepOutcome:
    counts = dict(Counter(record.states.values()))
    state = "aborted" if aborted else "finished" if set(counts) == {"finished"} else "incomplete"
    record.write(state)
    seconds = time.monotonic() - record.begun
    return SweepOutcome(state, folder, render_index(folder), counts, len(record.reused), seconds)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """A list to which Ctrl-C and SIGTERM add a line each; a second Ctrl-C raises `KeyboardInterrupt`."""
    signals: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def note(number: int, frame: Any) -> None:
        signals.append("stopped by SIGTERM" if number == signal.SIGTERM else "interrupted by Ctrl-C")
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
