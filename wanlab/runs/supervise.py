"""Papermill's engine, supervised: this interpreter as kernel, one deadline, a true notebook, no orphan."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wanlab.runs.notebook_format import nbformat  # isort: skip  # before anything else imports it
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, NotebookExecutionManager, papermill_engines

from wanlab.runs import seed
from wanlab.runs.files import why, write_text
from wanlab.runs.guard.console import Console
from wanlab.runs.guard.watch import Watch

ENGINE = "wanlab"
KERNEL_LOG = "kernel.log"
IPC_PATH_LIMIT = 90  # a Unix socket path holds 107 bytes, and a suffix is added


class ThisInterpreter(AsyncKernelManager):
    """A kernel of `sys.executable`, whatever kernelspecs are installed, on sockets no other run can meet."""

    @property
    def kernel_spec(self) -> KernelSpec:
        if self._kernel_spec is None:
            entry = str(Path(__file__).with_name("kernel.py"))
            argv = [sys.executable, entry, "-f", "{connection_file}", "--HistoryManager.enabled=False"]
            self._kernel_spec = KernelSpec(argv=argv, display_name="Python 3 (wanlab)", language="python")
            if seed.planted():
                self._kernel_spec.metadata = {"kernel_provisioner": {"provisioner_name": seed.PROVISIONER}}
        return self._kernel_spec


class Manager(NotebookExecutionManager):
    """Keeps executed.ipynb: saved atomically, and a cell that did not complete never says that it did."""

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
        except OSError as error:  # raised here, where messages are read, it would only stop the reading
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
    """Papermill's client with a deadline for the whole notebook, a watch over the kernel, and every output logged."""

    def __init__(
        self, nb_man: Manager, *, console: Console, watch: Watch, socket_folder: str, **options: Any
    ):
        self.console, self.watch, self.socket_folder = console, watch, socket_folder
        super().__init__(nb_man, timeout_func=self._remaining, **options)

    def _remaining(self, cell: Any) -> float | None:
        deadline = self.watch.deadline
        return None if deadline is None else max(0.1, deadline - time.monotonic())

    def create_kernel_manager(self) -> AsyncKernelManager:
        # ipc: TCP ports picked by runs that start together can collide.
        file = os.path.join(self.socket_folder, "kernel.json")
        ipc = sys.platform != "win32" and len(file) < IPC_PATH_LIMIT
        self.km = ThisInterpreter(connection_file=file, transport="ipc" if ipc else "tcp", config=self.config)
        return self.km

    async def async_start_new_kernel(self, **kwargs: Any) -> None:
        await super().async_start_new_kernel(**kwargs)
        self.watch.begin(self.km.provisioner.pid)

    start_new_kernel = run_sync(async_start_new_kernel)

    def papermill_execute_cells(self) -> None:
        try:
            self._execute_cells()
        finally:
            self.watch.look()  # once the kernel is gone, nobody knows its children any more

    def _execute_cells(self) -> None:
        for index, cell in enumerate(self.nb.cells):
            try:
                self.nb_man.cell_start(cell, index)
                self.execute_cell(cell, index)
            except CellExecutionError as error:
                self.nb_man.cell_exception(self.nb.cells[index], cell_index=index, exception=error)
                break
            except BaseException as error:
                # A dead kernel, the deadline or Ctrl-C: Papermill's own loop would say "completed".
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
    """What `papermill.execute_notebook(engine_name="wanlab")` runs."""

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
            # What the process itself says, such as the stack of a crash, is not for the user's terminal.
            log = path.with_name(KERNEL_LOG)
            try:
                with log.open("ab") as raw:
                    client.execute(env=environment, stdout=raw, stderr=raw)
            finally:
                watch.close()
                if log.is_file() and not log.stat().st_size:
                    log.unlink()
                manager.notebook_complete()
        return manager.nb

    @classmethod
    def nb_kernel_name(cls, nb: Any, name: str | None = None) -> str:
        return name or ENGINE


def how_it_died(manager: AsyncKernelManager | None) -> str:
    """The kernel's exit in words."""
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
    """Make the engine known to Papermill; returns its name."""
    papermill_engines.register(ENGINE, SupervisedEngine)
    return ENGINE


def titles(nb: Any) -> list[str]:
    """For each cell what it is about: its heading, or the last heading above it."""
    current, found = "start", []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            heading = re.search(r"^#{1,6}\s+(.+?)\s*#*$", cell.source, re.MULTILINE)
            current = heading.group(1) if heading else current
        found.append(current)
    return found
