"""The executor of one machine: a slot for each GPU, or several slots that share the cores of the CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from wanlab.launch.grid import Task
from wanlab.launch.prefork import ForkedWorker, ForkServer
from wanlab.launch.sweep import End, start_process

POLL_S = 0.05
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class _Running:
    task: Task
    process: subprocess.Popen | ForkedWorker
    places: list[int]

    def send(self, number: int) -> None:
        if self.process.poll() is None and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


class LocalSlots:
    """Runs tasks as processes of this machine.

    A shared task takes one slot; a task that needs the machine alone waits until all slots are free and takes them all. On a
    machine without a GPU shared tasks are forked from a process with its imports done (see `prefork`), and the cores are
    divided among the slots; a task that is alone always starts as a fresh process, with all cores.

    Args:
        slots: shared tasks that run at a time; by default one for each GPU, or else one for each core up to 4 cores, and one
            for two above.
        preload: modules that are imported before the first fork, beside those of `prefork`.
        fork: fork shared tasks; by default where there is no GPU.
    """

    kind = "local"

    def __init__(self, slots: int | None = None, *, preload: Iterable[str] = (), fork: bool | None = None):
        self.gpus = visible_gpus()
        cores = available_cores()
        self.slots = slots or default_slots(self.gpus)
        self.fork = sys.platform == "linux" and (not self.gpus if fork is None else fork)
        self.preload = list(preload)
        self.threads = max(1, cores // self.slots)
        self._queue: deque[Task] = deque()
        self._running: list[_Running] = []
        self._server: ForkServer | None = None

    def submit(self, task: Task) -> None:
        self._queue.append(task)

    def poll(self, timeout_s: float) -> list[End]:
        deadline = time.monotonic() + timeout_s
        while True:
            self._start()
            ended = [run for run in self._running if run.process.poll() is not None]
            if ended or time.monotonic() >= deadline:
                break
            time.sleep(POLL_S)
        self._running = [run for run in self._running if run not in ended]
        self._start()
        return [_end(run.task, run.process.poll()) for run in ended]

    def stop(self, timeout_s: float) -> None:
        self._queue.clear()
        for run in self._running:
            run.send(signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while any(run.process.poll() is None for run in self._running) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for run in self._running:
            run.send(signal.SIGKILL)

    def close(self) -> None:
        self.stop(0.0)
        if self._server is not None:
            self._server.close()
            self._server = None

    def _start(self) -> None:
        while self._queue:
            taken = {place for run in self._running for place in run.places}
            free = [place for place in range(self.slots) if place not in taken]
            task = self._queue[0]
            count = self.slots if task.alone else 1
            if len(free) < count:
                return
            self._queue.popleft()
            places = free[:count]
            fork = self.fork and not task.alone
            process = self._forked(task) if fork else self._fresh(task, places)
            self._running.append(_Running(task, process, places))

    def _fresh(self, task: Task, places: list[int]) -> subprocess.Popen:
        environment = {} if task.alone else dict.fromkeys(THREADS, str(self.threads))
        if self.gpus and not task.alone:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[places[0] % len(self.gpus)]
        return start_process(task, environment)

    def _forked(self, task: Task) -> ForkedWorker:
        if self._server is None:
            self._server = ForkServer(self.preload, dict.fromkeys(THREADS, str(self.threads)))
        return self._server.start(task)


def default_slots(gpus: list[str]) -> int:
    """One for each GPU; without a GPU one for each core up to 4 cores, and one for two above."""
    cores = available_cores()
    return len(gpus) or (cores if cores <= 4 else cores // 2)


def visible_gpus() -> list[str]:
    """Ids of the NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    if setting is not None:
        return [each.strip() for each in setting.split(",") if each.strip() not in ("", "-1")]
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    count = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    return [str(number) for number in range(count)]


def available_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _end(task: Task, code: int) -> End:
    if code >= 0:
        return End(task, code)
    try:
        name = f" ({signal.Signals(-code).name})"
    except ValueError:
        name = ""
    return End(task, code, lost=True, reason=f"its process was killed by signal {-code}{name}")
