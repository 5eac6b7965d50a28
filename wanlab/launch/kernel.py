"""The kernel process that `wanlab run` starts: IPython's own, and it never outlives the runner."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
OOM_SCORE = (
    300  # added to its own score: where memory runs out, the system takes the kernel before the runner
)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent goes; elsewhere ipykernel polls its parent."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it went while we asked
        os.kill(os.getpid(), number)


def settle() -> None:
    """What a kernel does first: it offers itself where memory runs out, and keeps what its children leave behind."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, ValueError):
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(min(1000, int(score.read_text()) + OOM_SCORE)))
    # A process whose parent goes becomes the kernel's child and not the system's: the runner can still find it.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def serve(options: list[str]) -> None:
    """Be a kernel until the client says stop; then run what was registered for the end.

    Except IPython's own closing of its sockets: it joins a thread that sometimes sits there for seconds, and a process that
    ends closes them anyway. The caller ends the process with `os._exit`, which waits for no thread either.

    Args:
        options: of the command line, such as `["-f", "kernel.json"]`.
    """
    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance(argv=options)
    atexit.unregister(IPKernelApp.instance().close)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


if __name__ == "__main__":
    die_with_parent()
    settle()
    # Started by path: put the package's own folder where this file's folder was, so that the kernel
    # imports the wanlab that started it.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    serve(sys.argv[1:])
    os._exit(0)
