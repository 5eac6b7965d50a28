"""A process that has imported what runs need, and forks a worker for each: `python -m wanlab.launch.prefork MODULE...`."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping

from wanlab.launch.grid import Task
from wanlab.launch.kernel import die_with_parent

# What the supervisor, a kernel and most notebooks import.
MODULES = (
    "wanlab.launch.execute",
    "wanlab.launch.execute",
    "wanlab.launch.worker",
    "wanlab.measure.environment",
    "papermill",
    "psutil",
    "ipykernel.debugger",
    "ipykernel.kernelapp",
    "IPython.core.completerlib",
    "IPython.extensions.storemagic",
    "tornado.platform.asyncio",
    "pandas.io.formats.html",
    "plotly.io",
    "torch",
)


def prime(more: Iterable[str] = ()) -> None:
    """Import `MODULES` and `more` as far as they are there; then draw a bar and a page, which fills caches."""
    for name in (*MODULES, *more):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import pandas as pd
    import plotly.graph_objects as go

    from wanlab.pages.report import page_of
    from wanlab.runs.parameters import nbformat

    v4 = nbformat.v4
    figure = go.Figure([go.Bar(x=[1], y=[1]), go.Scatter(x=[1], y=[1])])
    shown = {
        "application/vnd.plotly.v1+json": figure.to_plotly_json(),
        "text/html": pd.DataFrame({"a": [1.0]})._repr_html_(),
    }
    outputs = [v4.new_output("display_data", data={kind: data}) for kind, data in shown.items()]
    outputs.append(v4.new_output("stream", text="\x1b[1mtext"))
    cells = [v4.new_markdown_cell("# Title\n\n- text"), v4.new_code_cell("x = 1", outputs=outputs)]
    page_of(v4.new_notebook(cells=cells), {}, {}, None, "page")


class WarmStart:
    """The sweep's end of it: starts workers, and knows how each ended.

    Args:
        modules: imported once, before the first worker starts; see `prime`.
        environment: what the process has beside this one's, such as OMP_NUM_THREADS, which libraries read once.
    """

    def __init__(self, modules: Iterable[str], environment: Mapping[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "wanlab.launch.prefork", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYDEVD_DISABLE_FILE_VALIDATION": "1",
                **environment,
            },  # a warning of IPython's debugger
            start_new_session=True,
        )
        os.set_blocking(self._process.stdout.fileno(), False)
        self._heard = b""
        self._workers: dict[str, Worker] = {}

    def start(self, task: Task) -> Worker:
        worker = self._workers[task.run_id] = Worker(self)
        try:
            self._process.stdin.write(task.to_json().encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            worker.code = -signal.SIGKILL  # it is gone, and whoever asks for the end learns it
        return worker

    def hear(self) -> None:
        """Read what it has said so far."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._process.stdout.fileno(), 65_536):
                self._heard += piece
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            said = json.loads(line)
            worker = self._workers[said["run_id"]]
            worker.pid = said.get("pid", worker.pid)
            worker.code = said.get("code", worker.code)
        if self._process.poll() is not None:
            for worker in self._workers.values():
                worker.code = -signal.SIGKILL if worker.code is None else worker.code

    def close(self) -> None:
        """No worker is started any more; those that run are told to end."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Worker:
    """A forked worker as `subprocess.Popen` shows a process: `pid`, `poll`."""

    def __init__(self, starter: WarmStart):
        self._starter = starter
        self.pid: int | None = None
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            self._starter.hear()
        return self.code


def main(modules: list[str]) -> int:
    """Serve until the sweep closes its end, or is gone."""
    die_with_parent(signal.SIGTERM)
    answers = os.dup(1)
    os.dup2(2, 1)
    prime(modules)
    wake, woken = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # so that the descriptor wakes the loop
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(wake, selectors.EVENT_READ)
    running: dict[int, str] = {}
    rest = b""

    def say(**fields: str | int) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(answers, (json.dumps(fields) + "\n").encode())

    while True:
        ready = [key.fd for key, _ in selector.select()]
        if wake in ready:
            os.read(wake, 4096)
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    say(run_id=running.pop(pid), code=os.waitstatus_to_exitcode(status))
        if 0 in ready:
            piece = os.read(0, 65_536)
            if not piece:
                return 0  # workers get a SIGTERM as their parent goes
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                task = Task.from_json(line.decode())
                pid = os.fork()
                if not pid:
                    selector.close()
                    for descriptor in (answers, wake, woken):
                        os.close(descriptor)
                    _become_worker(task)
                running[pid] = task.run_id
                say(run_id=task.run_id, pid=pid)


def _become_worker(task: Task) -> None:
    from wanlab.launch.worker import run_warm

    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        status = run_warm(task)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
