"""Kernels that start warm: forked from a process that has imported what notebooks import, instead of from nothing.

A worker plants a seed before it has any thread: a child that waits. When the run wants its kernel, the seed gets the
command line and environment and becomes it. To the notebook it is a process like any other; what it saves is the import
of IPython, pandas and torch, which is most of a short run. Linux only; timings that must not be disturbed start cold.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from wanlab.launch.kernel import die_with_parent, serve, settle

PROVISIONER, PROVISIONERS = "wanlab-seed", "jupyter_client.kernel_provisioners"

_planted: Seed | None = None


class Seed:
    """A child process that is not yet a kernel. Looks like a `subprocess.Popen` to who watches it."""

    stdin = stdout = stderr = None

    def __init__(self) -> None:
        take, self._give = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._give)
            _wait_and_become(take)
        os.close(take)
        self.args: list[str] = []
        self.returncode: int | None = None

    def grow(self, argv: list[str], environment: dict[str, str], folder: str | None, log: str | None) -> Seed:
        """Become the kernel of this command line; its own output goes to the file `log`."""
        self.args = argv
        order = {"argv": argv, "environment": environment, "folder": folder, "log": log}
        with os.fdopen(self._give, "w") as pipe:
            json.dump(order, pipe)
        return self

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


class SeedProvisioner(LocalProvisioner):
    """Jupyter's local provisioner, except that the process is a seed that was planted."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        global _planted
        seed, _planted = _planted, None
        if seed is None:
            return await super().launch_kernel(cmd, **kwargs)
        log = getattr(kwargs.get("stdout"), "name", None)
        environment = {**kwargs["env"], "JPY_PARENT_PID": str(os.getpid())}
        self.process: Any = seed.grow(cmd, environment, kwargs.get("cwd"), log)
        self.pid = self.pgid = seed.pid  # it leads its own session
        return self.connection_info


def plant() -> None:
    """Plant the seed of this process's next kernel. The process must have one thread."""
    global _planted
    _planted = Seed()
    known = KernelProvisionerFactory.instance().provisioners
    known[PROVISIONER] = EntryPoint(PROVISIONER, f"{__name__}:{SeedProvisioner.__name__}", PROVISIONERS)


def planted() -> bool:
    return _planted is not None


def _wait_and_become(take: int) -> None:
    """The child: waits for its order, and never returns."""
    status = 1
    try:
        os.setsid()
        die_with_parent()
        settle()
        with os.fdopen(take) as pipe:
            text = pipe.read()
        if text:
            status = _become(json.loads(text))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _become(order: dict[str, Any]) -> int:
    os.environ.clear()
    os.environ.update(order["environment"])
    if order["folder"]:
        os.chdir(order["folder"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if order["log"]:
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    _fresh_randomness()
    # The command line is "python kernel.py -f FILE ...", of which a process that is there already needs the options.
    sys.argv = order["argv"][1:]
    serve(order["argv"][2:])
    return 0


def _fresh_randomness() -> None:
    """A process of its own would not share NumPy's random state with its siblings."""
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
