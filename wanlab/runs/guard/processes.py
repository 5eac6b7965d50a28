"""Processes of a run: which descend from its kernel, and an end to those, and only those."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Iterable
from typing import Any

import psutil


def descendants(pids: Iterable[int], every_thread: bool = True) -> set[int]:
    """Process numbers of all that descend from `pids`, without these.

    Args:
        every_thread: ask each thread of a process for its children, not only the first.
    """
    found: set[int] = set()
    waiting = list(pids)
    while waiting:
        new = set(_children(waiting.pop(), every_thread)) - found
        found |= new
        waiting += new
    return found


def alive(process: psutil.Process) -> bool:
    """Whether this very process still runs: not a zombie, and not another one with its number."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def recorded(who: Any) -> psutil.Process | None:
    """The living process that `folder.process_id` described; None where number or start time differ."""
    try:
        process = psutil.Process(int(who["pid"]))
        same = abs(process.create_time() - float(who["started"])) < 1.0
    except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
        return None
    return process if same and alive(process) else None


def kill(processes: Iterable[psutil.Process], wait_s: float = 3.0) -> list[int]:
    """SIGKILL to processes and all that descends from them, until none is left or `wait_s` is over.

    Returns:
        The numbers of those that were killed.
    """
    mine = {process.pid: process for process in processes}
    killed: set[int] = set()
    deadline = time.monotonic() + wait_s
    while living := [process for process in mine.values() if alive(process)]:
        for pid in descendants(process.pid for process in living):
            with contextlib.suppress(psutil.Error):
                mine.setdefault(pid, psutil.Process(pid))
        for process in mine.values():
            with contextlib.suppress(psutil.Error):
                if alive(process):
                    process.kill()
                    killed.add(process.pid)
        # Never psutil's own wait: it would take the kernel's exit status away from who started the kernel.
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return sorted(killed)


def kill_group(pid: int) -> None:
    """SIGKILL to what is left of a kernel's process group (the kernel leads its own session)."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _children(pid: int, every_thread: bool) -> list[int]:
    """Direct children of a process; none where it is gone."""
    if not _listed():
        try:
            return [child.pid for child in psutil.Process(pid).children()]
        except psutil.Error:
            return []
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task") if every_thread else [pid]:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                found += map(int, file.read().split())
    return found


@functools.cache
def _listed() -> bool:
    """Whether this system lists children (most Linux kernels do): else each process is asked for its parent."""
    return os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
