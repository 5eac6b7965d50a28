"""The kernel process that `wanlab run` starts: IPython's own, and it never outlives the runner."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent goes; elsewhere ipykernel polls its parent."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it went while we asked
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent()
    # Started by path: put the package's own folder where this file's folder was, so that the kernel
    # imports the wanlab that started it.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from ipykernel import kernelapp

    kernelapp.launch_new_instance()
