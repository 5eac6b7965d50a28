"""A thread beside a run: samples the kernel's processes, and ends what passes a limit."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from wanlab.runs.folder import Heartbeat, process_id
from wanlab.runs.guard import memory, processes
from wanlab.runs.guard.console import flood

EVERY_S = 0.25
THOROUGH = (
    4  # each so-manieth sample looks at every thread for children, at the log and at the count of kills
)
GRACE_S = 3.0  # past its deadline, a run that nothing else has ended is ended here
KILLS_S = 10  # so long a large process can take to go once the system has killed it
GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """What a run may take. `timeout_s` for the whole notebook, `memory_gib` resident in the kernel and its descendants,
    `output_mib` printed and shown."""

    timeout_s: float | None = None
    memory_gib: float | None = None
    output_mib: float = 256.0

    @property
    def late(self) -> str:
        return f"not done after {self.timeout_s:g} s" if self.timeout_s else "a cell gave no answer"


@dataclass(frozen=True)
class Ending:
    """Why a run was ended from outside."""

    state: str
    reason: str


class Watch:
    """Guards one run from the moment its kernel is there.

    Attributes:
        ending: set once, by whoever ends the run first; the kernel is killed then, and the client sees it die.
        peak_bytes: largest resident memory of the kernel and its descendants in one sample. Pages that processes share
            count in each of them.
    """

    def __init__(self, heart: Heartbeat, limits: Limits, log: Path | None = None):
        """
        Args:
            heart: its status gets `kernel`, `processes` (descendants that live) and `peak_memory_gib`.
            log: what the kernel's process itself writes; it can be a flood too.
        """
        self.heart, self.limits, self.log = heart, limits, log
        self.deadline = None if limits.timeout_s is None else time.monotonic() + limits.timeout_s
        self.ending: Ending | None = None
        self.peak_bytes = 0
        self._kernel: psutil.Process | None = None
        self._others: dict[int, psutil.Process] = {}
        self._told: set[int] = set()
        self._told_at = 0.0
        self._counter: Path | None = None
        self._kills: deque[int | None] = deque(maxlen=KILLS_S)  # one a second, oldest first
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wanlab-watch", daemon=True)

    def begin(self, pid: int) -> None:
        """The kernel is process `pid`."""
        with contextlib.suppress(psutil.NoSuchProcess):  # gone already: the client finds that out
            self._kernel = psutil.Process(pid)
        self._counter = memory.counter(pid)
        self._kills.append(memory.count(self._counter))
        self.heart.write(kernel=process_id(pid))
        if not self._thread.is_alive():
            self._thread.start()

    def end(self, state: str, reason: str) -> None:
        """End the run with this state, unless it is being ended already."""
        with self._lock:
            if self.ending is None:
                self.ending = Ending(state, reason)
                self._kill()

    def close(self) -> None:
        """Stop watching; nothing that the kernel started stays."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        with self._lock:
            self._kill()
            self.heart.note(processes=self._records())

    def look(self, thorough: bool = True) -> None:
        """Take one sample: what descends from the kernel, and how much memory all of them hold."""
        with self._lock:
            if self._kernel is None or self._stop.is_set() or not self._kernel.is_running():
                return
            if thorough:
                self._kills.append(memory.count(self._counter))
            self._find(thorough)
            held = {process: _resident(process) for process in (self._kernel, *self._others.values())}
            self.peak_bytes = max(self.peak_bytes, sum(held.values()))
            self.heart.note(peak_memory_gib=round(self.peak_bytes / GIB, 3))
            self._tell()
            self._judge(sum(held.values()), thorough)

    def killed_by_system(self) -> bool | None:
        """Whether the system has just killed something for want of memory; None where it does not say."""
        before, after = next(iter(self._kills), None), memory.count(self._counter)
        return None if before is None or after is None else after > before

    def _find(self, thorough: bool) -> None:
        if thorough:
            self._others = {pid: process for pid, process in self._others.items() if processes.alive(process)}
        # Those whose parent went are asked as well: they are nobody's descendants now.
        asked = (
            [self._kernel.pid, *(self._others if thorough else ())]
            if processes.alive(self._kernel)
            else self._others
        )
        for pid in processes.descendants(asked, thorough) - {self._kernel.pid, *self._others}:
            with contextlib.suppress(psutil.Error):
                self._others[pid] = psutil.Process(pid)

    def _tell(self) -> None:
        """Keep the living in status.json, at most once a second: they are found there if this process is killed."""
        if self._told != set(self._others) and time.monotonic() - self._told_at > 1.0:
            self._told, self._told_at = set(self._others), time.monotonic()
            try:
                self.heart.write(processes=self._records())
            except OSError as error:
                self.heart.on_trouble(error)

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"pid": p.pid, "started": p.create_time()} for p in self._others.values() if processes.alive(p)
        ]

    def _judge(self, held_bytes: int, thorough: bool) -> None:
        limit = self.limits.memory_gib
        if (
            limit is not None
            and held_bytes > limit * GIB
            and (held := self._unshared(held_bytes)) > limit * GIB
        ):
            cell = self.heart.fields["progress"]["cell"]
            taken = math.ceil(held / GIB * 10) / 10  # never less than the limit
            self.end("memory", f"took {taken:g} GiB in cell {cell}, over its limit of {limit:g} GiB")
        if self.deadline is not None and time.monotonic() > self.deadline + GRACE_S:
            self.end("timeout", self.limits.late)
        if thorough and self.log is not None and self.log.is_file():
            written, limit = self.log.stat().st_size / 2**20, self.limits.output_mib
            if written > limit:
                self.end("flooded", flood(written, self.heart.fields["progress"]["cell"], limit))

    def _unshared(self, held_bytes: int) -> int:
        """`held_bytes`, with pages that forked processes share counted once: too slow for every sample."""
        if not self._others:
            return held_bytes
        total = 0
        for process in (self._kernel, *self._others.values()):
            try:
                total += process.memory_full_info().pss
            except (psutil.Error, AttributeError):
                total += _resident(process)
        return total

    def _kill(self) -> None:
        if self._kernel is not None:
            self._find(True)
            processes.kill([self._kernel, *self._others.values()])
            processes.kill_group(self._kernel.pid)

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(EVERY_S):
            with contextlib.suppress(psutil.Error, OSError):  # a sample is lost, not the guard
                self.look(number % THOROUGH == 0)
            number += 1


def _resident(process: psutil.Process) -> int:
    """Bytes in RAM; 0 for a process that is gone or a zombie."""
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0
