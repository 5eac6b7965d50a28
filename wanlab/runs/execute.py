"""`wanlab run`: a notebook through Papermill into a run folder, with a true status however it ends."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlab.runs import endings
from wanlab.runs.endings import EXIT_CODES
from wanlab.runs.files import why
from wanlab.runs.folder import Heartbeat, RunFolder
from wanlab.runs.guard.console import Console
from wanlab.runs.guard.watch import Limits, Watch
from wanlab.runs.inject import inject, upgraded
from wanlab.runs.prepared import prepare
from wanlab.runs.progress import Progress
from wanlab.runs.run import FOLDER_VARIABLE


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `reused` is true when an earlier finished run already held the answer."""

    state: str  # one of `folder.FINAL`
    folder: Path
    report: Path
    run_id: str
    seconds: float
    error: str | None = None
    reused: bool = False

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.state]


def execute(
    notebook: str | os.PathLike,
    parameters: Mapping[str, Any] | None = None,
    *,
    output: str | os.PathLike | None = None,
    name: str | None = None,
    force: bool = False,
    timeout_s: float | None = None,
    memory_limit_gib: float | None = None,
    output_limit_mib: float = 256.0,
    progress: bool = True,
    repeat: int = 1,
) -> Outcome:
    """Run a notebook headless, in this interpreter and working folder, and render its report.

    Args:
        parameters: overrides of the `parameters` cell, already typed.
        output: folder of all runs, by default the project's `outputs/`.
        name: folder of this notebook's runs, by default the notebook's file name.
        force: run again even where a finished run with the same id exists; that one is kept in `attempts/`. A notebook
            with `{"wanlab": {"always": true}}` in its metadata is always run again.
        timeout_s: limit for the whole notebook.
        memory_limit_gib: limit for what the kernel and its descendants hold in RAM.
        output_limit_mib: limit for what the notebook prints and shows.
        repeat: which of several equal runs this is, from 1; each has a folder of its own.

    Raises:
        WanlabError: unknown parameter, wrong type, unreadable notebook, a run that is being written by another process,
            or a folder that cannot be written. Nothing was started then. A notebook that fails raises nothing: its end
            is in `Outcome.state`.
    """
    ready = prepare(notebook, parameters, output=output, name=name, repeat=repeat)
    folder, nb = ready.folder, ready.notebook
    if not force and (earlier := ready.finished()):
        if not folder.report.is_file():
            _render(folder)
        return Outcome(
            "finished", folder.path, folder.report, ready.run_id, earlier.get("seconds", 0.0), reused=True
        )

    folder.open(reserve=True)
    try:
        folder.update(**ready.header())
    except OSError as error:
        raise folder.unwritable(error) from error
    inject(nb, {key: ready.values[key] for key in ready.overrides})
    limits = Limits(timeout_s, memory_limit_gib, output_limit_mib)
    return _supervised(nb, folder, ready.run_id, limits, progress)


def _supervised(nb: Any, folder: RunFolder, run_id: str, limits: Limits, progress: bool) -> Outcome:
    from wanlab.runs.supervise import KERNEL_LOG, titles

    nb = upgraded(nb)
    about = titles(nb)
    runs = [cell.cell_type == "code" and bool(cell.source.strip()) for cell in nb.cells]
    shown = Progress(folder.path.parent.name, about, runs, progress)
    heart = _heart(folder, {"cell": 0, "of": len(nb.cells), "title": about[0] if about else ""})
    watch = Watch(heart, limits, folder.path / KERNEL_LOG)
    console = Console(folder.path / "console.log", limits.output_mib, watch.end)
    heart.on_trouble = lambda error: watch.end("failed", why(error))

    def on_cell(index: int, cell: Any) -> None:
        shown.step(index, cell)
        if runs[index]:
            heart.write(progress={"cell": index + 1, "of": len(nb.cells), "title": about[index]})

    state, failure = "aborted", {"reason": "interrupted"}
    try:
        state, failure = _papermill(nb, folder, watch, console, on_cell)
    finally:
        shown.close(state == "finished")
        at = heart.fields["progress"]
        if state != "finished" and state != "aborted":
            failure = {"cell": at["cell"], "title": at["title"], **failure}
        if console.cut:
            failure |= {"output_cut_cells": [index + 1 for index in sorted(console.cut)]}
        seconds = _last_status(heart, state, failure)
        _render(folder)
    return Outcome(state, folder.path, folder.report, run_id, seconds, failure.get("reason"))


def _heart(folder: RunFolder, progress: dict[str, Any]) -> Heartbeat:
    try:
        return Heartbeat(folder, kernel=None, progress=progress)
    except OSError as error:
        folder.release()
        raise folder.unwritable(error) from error


def _last_status(heart: Heartbeat, state: str, fields: dict[str, Any]) -> float:
    """Seconds that the run took. On a full disk the space that was kept for it takes the status."""
    heart.folder.release()
    try:
        return heart.end(state, exit=EXIT_CODES[state], **fields)
    except OSError as error:
        print(f"wanlab: the end of the run could not be written: {why(error)}", file=sys.stderr)
        return time.monotonic() - heart.begun


def _papermill(
    nb: Any, folder: RunFolder, watch: Watch, console: Console, on_cell: Any
) -> tuple[str, dict[str, Any]]:
    """State and, unless finished, what went wrong."""
    import papermill

    from wanlab.runs import supervise

    environment = {**os.environ, FOLDER_VARIABLE: str(folder.path), "PLOTLY_RENDERER": "plotly_mimetype"}
    try:
        with _quiet(), _stoppable():
            done = papermill.execute_notebook(
                nb,
                None,  # the engine writes executed.ipynb itself, atomically
                engine_name=supervise.register(),
                kernel_name=supervise.ENGINE,
                progress_bar=False,
                path=folder.notebook,
                on_cell=on_cell,
                watch=watch,
                console=console,
                environment=environment,
            )
    except (Exception, KeyboardInterrupt) as error:
        return endings.raised(error, watch, folder.path / supervise.KERNEL_LOG)
    return endings.completed(done, folder, watch)


def _render(folder: RunFolder) -> None:
    from wanlab.runs.pages.report import render

    try:
        render(folder.path)
    except OSError as error:
        print(f"wanlab: the report could not be written: {why(error)}", file=sys.stderr)


@contextmanager
def _stoppable(insist_s: float = 10.0) -> Iterator[None]:
    """Ctrl-C and SIGTERM end a run alike, so that the kernel goes and the status is written.

    Where a library swallows the exception, as Python itself does in finalisers, it is raised again every `insist_s`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    left, reasons = threading.Event(), []

    def insist(number: int) -> None:
        while not left.wait(insist_s):
            signal.pthread_kill(threading.main_thread().ident, number)

    def stop(number: int, frame: Any) -> None:
        if not reasons:
            reasons.append("stopped by SIGTERM" if number == signal.SIGTERM else "interrupted by Ctrl-C")
            threading.Thread(target=insist, args=(number,), daemon=True).start()
        raise KeyboardInterrupt(reasons[0])

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        left.set()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Papermill logs what the status and the report say better."""
    logger = logging.getLogger("papermill")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
