"""The kernel process of a run: IPython's own, which ends when the runner ends. Started by path, so it imports little."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
OOM_SCORE = 300  # added to the process's own: where memory runs out, Linux kills the kernel before the runner


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent ends; on other systems ipykernel polls its parent."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call took effect
        os.kill(os.getpid(), number)


def prepare_process() -> None:
    """Raise this process's score of the out-of-memory killer, and adopt descendants whose parent ends."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, ValueError):
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(min(1000, int(score.read_text()) + OOM_SCORE)))
    # An orphan becomes the kernel's child and not the system's, so the runner can still find it.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def serve(options: list[str]) -> None:
    """Be a kernel until the client stops it; then run the registered exit functions.

    IPython's closing of its sockets is left out: it joins a thread that sometimes takes seconds, and the end of the process
    closes them anyway. The caller ends the process with `os._exit`, which waits for no thread either.

    Args:
        options: options of the command line, such as `["-f", "kernel.json"]`.
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
    prepare_process()
    # The folder of this file stands first in the path; put the package's there, so that the kernel imports the wanlab that
    # started it.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    serve(sys.argv[1:])
    os._exit(0)
