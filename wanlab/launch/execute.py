"""`wanlab run`: executes a notebook through Papermill into a run folder; the status is true however the run ends."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import papermill
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, NotebookExecutionManager, papermill_engines
from tqdm import tqdm

from wanlab.core.errors import clean
from wanlab.core.files import why, write_text
from wanlab.launch import guard
from wanlab.launch.guard import EXIT_CODES, Console, Limits, Watch
from wanlab.pages.report import render
from wanlab.runs.estimate import EarlierRuns
from wanlab.runs.folder import Heartbeat, RunFolder
from wanlab.runs.parameters import is_tagged, nbformat
from wanlab.runs.prepare import inject, prepare, upgraded
from wanlab.runs.run import FOLDER_VARIABLE
from wanlab.runs.seal import seal


class Progress:
    """Progress in the terminal, by code cells. `step` is called when a cell starts, `close` at the end."""

    def __init__(self, label: str, titles: list[str], runs: list[bool], enabled: bool = True):
        self.titles, self.runs = titles, runs
        self.total = sum(runs)
        self.done = 0
        self.begun = time.monotonic()
        self.bar = None
        self.enabled = enabled
        self.label = label
        self._shown: str | None = None
        self._closed = threading.Event()
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(
                total=self.total,
                desc=label,
                file=sys.stderr,
                ncols=shutil.get_terminal_size().columns or None,
                bar_format="{bar:24} {n_fmt}/{total_fmt} {elapsed} {desc}",
            )

            threading.Thread(target=self._tick, name="wanlab-progress", daemon=True).start()

    def _tick(self) -> None:
        """Refresh the clock of the bar while one cell runs long."""
        while not self._closed.wait(1.0):
            self.bar.refresh()

    def step(self, index: int, cell: Any) -> None:
        """Show that cell `index` starts."""
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


ENGINE = "wanlab"
KERNEL_LOG = "kernel.log"
IPC_PATH_LIMIT = 90  # a Unix socket path holds 107 bytes, and a suffix is added


class ThisInterpreter(AsyncKernelManager):
    """A kernel of `sys.executable`, whatever kernelspecs are installed, on sockets of this run alone.

    Attributes:
        provisioner_name: Jupyter's name of what starts the kernel's process; None starts a fresh process.
    """

    provisioner_name: str | None = None

    @property
    def kernel_spec(self) -> KernelSpec:
        if self._kernel_spec is None:
            entry = str(Path(__file__).with_name("kernel.py"))
            argv = [sys.executable, entry, "-f", "{connection_file}", "--HistoryManager.enabled=False"]
            self._kernel_spec = KernelSpec(argv=argv, display_name="Python 3 (wanlab)", language="python")
            if self.provisioner_name:
                self._kernel_spec.metadata = {
                    "kernel_provisioner": {"provisioner_name": self.provisioner_name}
                }
        return self._kernel_spec


class Manager(NotebookExecutionManager):
    """Saves executed.ipynb atomically, and marks only cells that completed as completed."""

    def __init__(
        self,
        nb: Any,
        path: Path,
        on_cell: Callable[[int, Any], None],
        on_trouble: Callable[[OSError], None],
        **options: Any,
    ):
        super().__init__(nb, output_path=str(path), progress_bar=False, **options)
        self.path, self.on_cell, self.on_trouble = path, on_cell, on_trouble
        self.current: int | None = None

    def save(self, **kwargs: Any) -> None:
        write_text(self.path, nbformat.writes(kwargs.get("nb") or self.nb))
        self.last_save_time = self.now()

    def autosave_cell(self) -> None:
        try:
            super().autosave_cell()
        except OSError as error:  # an exception here would only stop the reading of messages
            self.on_trouble(error)

    def cell_start(self, cell: Any, cell_index: int | None = None, **kwargs: Any) -> None:
        self.current = cell_index
        self.on_cell(cell_index, cell)
        super().cell_start(cell, cell_index, **kwargs)

    def notebook_complete(self, **kwargs: Any) -> None:
        # The parent turns every pending cell into a completed one unless some cell failed before it.
        pending = [cell for cell in self.nb.cells if cell.metadata.papermill["status"] == self.PENDING]
        super().notebook_complete(**kwargs)
        failed = any(cell.metadata.papermill["status"] == self.FAILED for cell in self.nb.cells)
        for cell in pending if failed or self.current is None else []:
            cell.metadata.papermill["status"] = self.PENDING
        self.save()


class Client(PapermillNotebookClient):
    """Papermill's client with a deadline for the whole notebook, limits on the kernel, and a log of all output."""

    def __init__(
        self, nb_man: Manager, *, console: Console, watch: Watch, socket_folder: str, **options: Any
    ):
        self.console, self.watch, self.socket_folder = console, watch, socket_folder
        super().__init__(nb_man, timeout_func=self._remaining, **options)

    def _remaining(self, cell: Any) -> float | None:
        deadline = self.watch.deadline
        return None if deadline is None else max(0.1, deadline - time.monotonic())

    def create_kernel_manager(self) -> AsyncKernelManager:
        # ipc, because TCP ports of runs that start together can collide.
        file = os.path.join(self.socket_folder, "kernel.json")
        ipc = sys.platform != "win32" and len(file) < IPC_PATH_LIMIT
        self.km = ThisInterpreter(connection_file=file, transport="ipc" if ipc else "tcp", config=self.config)
        return self.km

    async def async_start_new_kernel(self, **kwargs: Any) -> None:
        await super().async_start_new_kernel(**kwargs)
        provisioner: Any = self.km.provisioner  # a local one, which has a process id
        self.watch.begin(provisioner.pid)

    start_new_kernel = run_sync(async_start_new_kernel)

    def papermill_execute_cells(self) -> None:
        try:
            self._execute_cells()
        finally:
            self.watch.look()  # before the kernel ends: after that its children cannot be found

    def _execute_cells(self) -> None:
        for index, cell in enumerate(self.nb.cells):
            try:
                self.nb_man.cell_start(cell, index)
                self.execute_cell(cell, index)
            except CellExecutionError as error:
                _keep_words(self.nb.cells[index], error)
                self.nb_man.cell_exception(self.nb.cells[index], cell_index=index, exception=error)
                break
            except BaseException as error:
                # A dead kernel, the deadline or Ctrl-C: Papermill's own loop would mark the cell as completed.
                self.nb_man.cell_exception(self.nb.cells[index], cell_index=index, exception=error)
                self.shutdown_kernel = "immediate"
                if isinstance(error, DeadKernelError):
                    raise DeadKernelError(how_it_died(self.km)) from error
                raise
            finally:
                self.nb_man.cell_complete(self.nb.cells[index], cell_index=index)

    def output(self, outs: Any, msg: Any, display_id: Any, cell_index: int) -> Any:
        if not self.console.keeps(msg, cell_index):
            return None
        return super().output(outs, msg, display_id, cell_index)

    def clear_output(self, outs: Any, msg: Any, cell_index: int) -> None:
        self.console.cleared(cell_index)
        super().clear_output(outs, msg, cell_index)


class SupervisedEngine(Engine):
    """Papermill's engine `"wanlab"`: executes a notebook under the limits of a `Watch`."""

    @classmethod
    def execute_notebook(
        cls,
        nb: Any,
        kernel_name: str,
        *,
        path: Path,
        on_cell: Callable[[int, Any], None],
        watch: Watch,
        console: Console,
        environment: dict[str, str],
        start_timeout: float = 60,
        **ignored: Any,
    ) -> Any:
        manager = Manager(nb, path, on_cell, lambda error: watch.end("failed", why(error)))
        manager.notebook_start()
        with tempfile.TemporaryDirectory(prefix="wanlab-", ignore_cleanup_errors=True) as sockets:
            client = Client(
                manager,
                console=console,
                watch=watch,
                socket_folder=sockets,
                kernel_name=kernel_name,
                startup_timeout=start_timeout,
                iopub_timeout=30,
            )
            # The process's own output, such as the stack of a crash, goes to a file and not to the terminal.
            log = path.with_name(KERNEL_LOG)
            try:
                with log.open("ab") as raw:
                    client.execute(env=environment, stdout=raw, stderr=raw)
            finally:
                watch.close()
                if log.is_file() and not log.stat().st_size:
                    log.unlink()
                manager.notebook_complete()
        for (
            cell
        ) in manager.nb.cells:  # saved already; Papermill would take an error that is meant for a failure
            if is_tagged(cell, "raises-exception"):
                cell.outputs = []
        return manager.nb

    @classmethod
    def nb_kernel_name(cls, nb: Any, name: str | None = None) -> str:
        return name or ENGINE


def _keep_words(cell: Any, error: CellExecutionError) -> None:
    """Add the error of a failed cell to its outputs where IPython only printed it, as of groups and unknown magics."""
    if not any(output.output_type == "error" for output in cell.outputs):
        printed = [output.text for output in cell.outputs if output.output_type == "stream"]
        words = {"ename": error.ename, "evalue": error.evalue, "traceback": printed[-1:]}
        cell.outputs.append(nbformat.v4.new_output("error", **words))


def how_it_died(manager: AsyncKernelManager | None) -> str:
    """The end of the kernel's process in words."""
    process = getattr(getattr(manager, "provisioner", None), "process", None)
    code = process.poll() if process is not None else None
    if code is None:
        return "the kernel is gone"
    if code >= 0:
        return f"the kernel exited with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    return f"the kernel was killed by signal {-code} ({name})"


def register() -> str:
    """Register the engine with Papermill; returns its name."""
    papermill_engines.register(ENGINE, SupervisedEngine)
    return ENGINE


def titles(nb: Any) -> list[str]:
    """The title of each cell: its own heading, or the last heading above it."""
    current, names = "start", []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            heading = re.search(r"^#{1,6}\s+(.+?)\s*#*$", cell.source, re.MULTILINE)
            current = heading.group(1) if heading else current
        names.append(clean(current))
    return names


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Attributes:
        state: one of `folder.FINAL`.
        reused: whether an earlier finished run with the same identity was taken.
    """

    state: str
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
        parameters: overrides of the `parameters` cell, with the right types.
        output: folder of all runs, by default the project's `outputs/`.
        name: folder of this notebook's runs, by default the notebook's file name.
        force: run again even where a finished run with the same id exists; the earlier one is kept in `attempts/`. A
            notebook with `{"wanlab": {"always": true}}` in its metadata is always run again.
        timeout_s: time limit of the whole notebook.
        memory_limit_gib: limit of the resident memory of the kernel and its descendants.
        output_limit_mib: limit of what the notebook prints and shows.
        progress: show progress in the terminal.
        repeat: number of this run among equal runs, from 1; each has its own folder.

    Raises:
        WanlabError: unknown parameter, wrong type, unreadable notebook, a run that another process is writing, or a folder
            that cannot be written; nothing was started then. A notebook that fails raises nothing: its end is in
            `Outcome.state`.
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
    if progress:
        expected = EarlierRuns(folder.path.parents[1]).estimate(ready, force=True, counted=False)
        print(f"{folder.path.parent.name}: {expected.sentence}", file=sys.stderr, flush=True)
    inject(nb, {key: ready.values[key] for key in ready.overrides})
    limits = Limits(timeout_s, memory_limit_gib, output_limit_mib)
    return _supervised(nb, folder, ready.run_id, limits, progress)


def _supervised(nb: Any, folder: RunFolder, run_id: str, limits: Limits, progress: bool) -> Outcome:
    nb = upgraded(nb)
    names = titles(nb)
    runs = [cell.cell_type == "code" and bool(cell.source.strip()) for cell in nb.cells]
    bar = Progress(folder.path.parent.name, names, runs, progress)
    heartbeat = _heartbeat(folder, {"cell": 0, "of": len(nb.cells), "title": names[0] if names else ""})
    watch = Watch(heartbeat, limits, folder.path / KERNEL_LOG)
    console = Console(folder.path / "console.log", limits.output_mib, watch.end)
    heartbeat.on_trouble = lambda error: watch.end("failed", why(error))

    def on_cell(index: int, cell: Any) -> None:
        bar.step(index, cell)
        if runs[index]:
            heartbeat.write(progress={"cell": index + 1, "of": len(nb.cells), "title": names[index]})

    state = "aborted"
    failure: dict[str, Any] = {"reason": "interrupted"}
    try:
        state, failure = _papermill(nb, folder, watch, console, on_cell)
    finally:
        bar.close(state == "finished")
        at = heartbeat.fields["progress"]
        if state != "finished" and state != "aborted":
            failure = {"cell": at["cell"], "title": at["title"], **failure}
        if console.cut:
            failure |= {"output_cut_cells": [index + 1 for index in sorted(console.cut)]}
        seconds = _last_status(heartbeat, state, failure)
        _render(folder)
    return Outcome(state, folder.path, folder.report, run_id, seconds, failure.get("reason"))


def _heartbeat(folder: RunFolder, progress: dict[str, Any]) -> Heartbeat:
    try:
        return Heartbeat(folder, kernel=None, progress=progress)
    except OSError as error:
        folder.release()
        raise folder.unwritable(error) from error


def _last_status(heartbeat: Heartbeat, state: str, fields: dict[str, Any]) -> float:
    """Write the final status, on a full disk into the reserved space; returns the seconds that the run took."""
    heartbeat.folder.release()
    try:
        if state == "finished":
            seal(heartbeat.folder)
        return heartbeat.end(state, exit=EXIT_CODES[state], **fields)
    except OSError as error:
        print(f"wanlab: the end of the run could not be written: {why(error)}", file=sys.stderr)
        return time.monotonic() - heartbeat.begun


def _papermill(
    nb: Any, folder: RunFolder, watch: Watch, console: Console, on_cell: Any
) -> tuple[str, dict[str, Any]]:
    """The final state, and the fields of its status.json: empty where the run finished, else the reason."""
    environment = {**os.environ, FOLDER_VARIABLE: str(folder.path), "PLOTLY_RENDERER": "plotly_mimetype"}
    try:
        with _quiet(), _stoppable():
            done = papermill.execute_notebook(
                nb,
                None,  # the engine writes executed.ipynb itself, atomically
                engine_name=register(),
                kernel_name=ENGINE,
                progress_bar=False,
                path=folder.notebook,
                on_cell=on_cell,
                watch=watch,
                console=console,
                environment=environment,
            )
    except (Exception, KeyboardInterrupt) as error:
        return guard.raised(error, watch, folder.path / KERNEL_LOG)
    return guard.completed(done, folder, watch)


def _render(folder: RunFolder) -> None:
    try:
        render(folder.path)
    except OSError as error:
        print(f"wanlab: the report could not be written: {why(error)}", file=sys.stderr)


@contextmanager
def _stoppable(insist_s: float = 10.0) -> Iterator[None]:
    """Make Ctrl-C and SIGTERM raise `KeyboardInterrupt`, so that the kernel ends and the status is written.

    Some code ignores the exception, as Python itself does in finalisers: it is raised again every `insist_s`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended = threading.Event()
    reasons: list[str] = []

    def insist(number: int) -> None:
        while not ended.wait(insist_s):
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
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Papermill's log: the status and the report have the same in better words."""
    logger = logging.getLogger("papermill")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
