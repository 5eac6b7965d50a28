"""Workers and kernels forked from a process that has done their imports: `python -m wanlab.launch.prefork MODULE...`.

Importing IPython, pandas and torch takes most of a short run. A sweep starts one process that imports them once (the fork
server) and forks a worker for each run. A worker that has no thread yet forks a child that waits; when the run needs its
kernel, the child gets the kernel's command line and environment and becomes it. To the notebook it is a process like any
other. Linux only; runs whose timings must not be disturbed start as fresh processes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from wanlab.launch.execute import ThisInterpreter
from wanlab.launch.grid import Task
from wanlab.launch.kernel import die_with_parent, prepare_process, serve
from wanlab.launch.worker import log_to_file, run
from wanlab.pages.report import page_of
from wanlab.runs.parameters import nbformat

# What a kernel and most notebooks import, beside what a worker has imported with this module.
MODULES = (
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
PROVISIONER, PROVISIONERS = "wanlab-prefork", "jupyter_client.kernel_provisioners"


def preload(more: Iterable[str] = ()) -> None:
    """Import `MODULES` and `more` as far as they are installed; then render a small page, which fills caches."""
    for name in (*MODULES, *more):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    v4 = nbformat.v4
    figure = go.Figure([go.Bar(x=[1], y=[1]), go.Scatter(x=[1], y=[1])])
    data = {
        "application/vnd.plotly.v1+json": figure.to_plotly_json(),
        "text/html": pd.DataFrame({"a": [1.0]})._repr_html_(),
    }
    outputs = [v4.new_output("display_data", data={kind: content}) for kind, content in data.items()]
    outputs.append(v4.new_output("stream", text="\x1b[1mtext"))
    cells = [v4.new_markdown_cell("# Title\n\n- text"), v4.new_code_cell("x = 1", outputs=outputs)]
    page_of(v4.new_notebook(cells=cells), {}, {}, None, "page")
    gc.collect()
    gc.freeze()  # collections in forks would visit what is here, and so copy its memory


# ---- the sweep's side


class ForkServer:
    """Starts the fork server; asks it for workers and for their exit statuses.

    Args:
        modules: imported once, before the first worker starts; see `preload`.
        environment: variables added to this process's own, such as OMP_NUM_THREADS, which libraries read once.
    """

    def __init__(self, modules: Iterable[str], environment: Mapping[str, str]):
        quiet_debugger = {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}  # no warning of IPython's debugger
        self._process = subprocess.Popen(
            [sys.executable, "-m", "wanlab.launch.prefork", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **quiet_debugger, **environment},
            start_new_session=True,
        )
        os.set_blocking(self._process.stdout.fileno(), False)
        self._unread = b""
        self._workers: dict[str, ForkedWorker] = {}

    def start(self, task: Task) -> ForkedWorker:
        worker = self._workers[task.run_id] = ForkedWorker(self)
        try:
            self._process.stdin.write(task.to_json().encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            worker.code = -signal.SIGKILL  # the server has died, and the worker never started
        return worker

    def read_answers(self) -> None:
        """Read process ids and exit statuses that the server has written since the last call."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._process.stdout.fileno(), 65_536):
                self._unread += piece
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            answer = json.loads(line)
            worker = self._workers[answer["run_id"]]
            worker.pid = answer.get("pid", worker.pid)
            worker.code = answer.get("code", worker.code)
        if self._process.poll() is not None:
            for worker in self._workers.values():
                worker.code = -signal.SIGKILL if worker.code is None else worker.code

    def close(self) -> None:
        """Start no more workers; those that run get a SIGTERM."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class ForkedWorker:
    """A worker of the fork server, with the part of `subprocess.Popen` that an executor needs: `pid`, `poll`."""

    def __init__(self, server: ForkServer):
        self._server = server
        self.pid: int | None = None
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            self._server.read_answers()
        return self.code


# ---- the server and its workers


def main(modules: list[str]) -> int:
    """Fork a worker for each task on standard input until the sweep closes it or ends."""
    die_with_parent(signal.SIGTERM)
    answers = os.dup(1)
    os.dup2(2, 1)
    preload(modules)
    child_ended, wakeup = os.pipe()
    os.set_blocking(child_ended, False)
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # a handler, so that Python writes to `wakeup`
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(child_ended, selectors.EVENT_READ)
    running: dict[int, str] = {}
    rest = b""

    def answer(**fields: str | int) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(answers, (json.dumps(fields) + "\n").encode())

    while True:
        ready = [key.fd for key, _ in selector.select()]
        if child_ended in ready:
            os.read(child_ended, 4096)
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    answer(run_id=running.pop(pid), code=os.waitstatus_to_exitcode(status))
        if 0 in ready:
            piece = os.read(0, 65_536)
            if not piece:
                return 0  # workers get a SIGTERM when their parent ends
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                task = Task.from_json(line.decode())
                pid = os.fork()
                if not pid:
                    selector.close()
                    for descriptor in (answers, child_ended, wakeup):
                        os.close(descriptor)
                    _become_worker(task)
                running[pid] = task.run_id
                answer(run_id=task.run_id, pid=pid)


def _become_worker(task: Task) -> None:
    """The forked child: runs the task, and never returns."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        die_with_parent(signal.SIGTERM)
        with log_to_file(task):
            fork_kernel()
            status = run(task)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


# ---- the kernel of a forked worker

_waiting: WaitingKernel | None = None


class WaitingKernel:
    """A forked child that waits for its command line and then becomes a kernel.

    It has the part of `subprocess.Popen` that Jupyter's local provisioner uses.
    """

    stdin = stdout = stderr = None

    def __init__(self) -> None:
        order, self._order = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._order)
            _wait_and_become_kernel(order)
        os.close(order)
        self.args: list[str] = []
        self.returncode: int | None = None

    def start(
        self, argv: list[str], environment: dict[str, str], folder: str | None, log: str | None
    ) -> None:
        """Become the kernel of this command line; what the process prints goes to the file `log`."""
        self.args = argv
        order = {"argv": argv, "environment": environment, "folder": folder, "log": log}
        with os.fdopen(self._order, "w") as pipe:
            json.dump(order, pipe)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkedKernelProvisioner(LocalProvisioner):
    """Jupyter's local provisioner, except that the first kernel is the child that `fork_kernel` has forked."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        global _waiting
        kernel, _waiting = _waiting, None
        if kernel is None:
            return await super().launch_kernel(cmd, **kwargs)
        log = getattr(kwargs.get("stdout"), "name", None)
        environment = {**kwargs["env"], "JPY_PARENT_PID": str(os.getpid())}
        kernel.start(cmd, environment, kwargs.get("cwd"), log)
        self.process: Any = kernel
        self.pid = self.pgid = kernel.pid  # it leads its own session
        return self.connection_info


def fork_kernel() -> None:
    """Fork the process of the next kernel that `execute` starts here. The calling process must have one thread."""
    global _waiting
    _waiting = WaitingKernel()
    provisioners = KernelProvisionerFactory.instance().provisioners
    value = f"{ForkedKernelProvisioner.__module__}:{ForkedKernelProvisioner.__name__}"
    provisioners[PROVISIONER] = EntryPoint(PROVISIONER, value, PROVISIONERS)
    ThisInterpreter.provisioner_name = PROVISIONER


def _wait_and_become_kernel(order: int) -> None:
    """The child: waits for its order, and never returns.

    Args:
        order: descriptor of the pipe that the order comes through.
    """
    status = 1
    try:
        os.setsid()
        die_with_parent()
        prepare_process()
        with os.fdopen(order) as pipe:
            text = pipe.read()
        if text:
            status = _become_kernel(json.loads(text))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _become_kernel(order: dict[str, Any]) -> int:
    os.environ.clear()
    os.environ.update(order["environment"])
    if order["folder"]:
        os.chdir(order["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if order["log"]:
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # or all forked kernels would draw the same numbers
    # The command line is "python kernel.py -f FILE ...", of which a forked process needs the options only.
    sys.argv = order["argv"][1:]
    serve(order["argv"][2:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
