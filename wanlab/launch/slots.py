"""The executor of one machine: a slot for each GPU, or some for the processor's cores."""

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
from wanlab.launch.prefork import WarmStart, Worker
from wanlab.launch.sweep import End, start_cold

POLL_S = 0.05
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class _Running:
    task: Task
    process: subprocess.Popen | Worker
    places: list[int]

    def send(self, number: int) -> None:
        if self.process.poll() is None and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


class LocalSlots:
    """Runs tasks as processes of this machine.

    Shared tasks take a slot each; a task that needs the machine alone waits until all are free and takes all. On a machine
    without a GPU shared tasks start warm (see `seed`), and the cores are divided among the slots; a task that is alone
    always starts cold, with all cores.

    Args:
        slots: how many shared tasks at a time; by default the GPUs, or else the cores up to 4, half of them above.
        preload: modules that the warm start imports beside those of `prime`.
        warm: start shared tasks warm; by default where there is no GPU.
    """

    kind = "local"

    def __init__(self, slots: int | None = None, *, preload: Iterable[str] = (), warm: bool | None = None):
        self.gpus = visible_gpus()
        cores = available_cores()
        self.slots = slots or default_slots(self.gpus)
        self.warm = sys.platform == "linux" and (not self.gpus if warm is None else warm)
        self.preload = list(preload)
        self.threads = max(1, cores // self.slots)
        self._queue: deque[Task] = deque()
        self._running: list[_Running] = []
        self._warm_start: WarmStart | None = None

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
        if self._warm_start is not None:
            self._warm_start.close()
            self._warm_start = None

    def _start(self) -> None:
        while self._queue:
            taken = {place for run in self._running for place in run.places}
            free = [place for place in range(self.slots) if place not in taken]
            task = self._queue[0]
            wanted = self.slots if task.alone else 1
            if len(free) < wanted:
                return
            self._queue.popleft()
            places = free[:wanted]
            cold = task.alone or not self.warm
            process = self._cold(task, places) if cold else self._forked(task)
            self._running.append(_Running(task, process, places))

    def _cold(self, task: Task, places: list[int]) -> subprocess.Popen:
        environment = {} if task.alone else dict.fromkeys(THREADS, str(self.threads))
        if self.gpus and not task.alone:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[places[0] % len(self.gpus)]
        return start_cold(task, environment)

    def _forked(self, task: Task) -> Worker:
        if self._warm_start is None:
            self._warm_start = WarmStart(self.preload, dict.fromkeys(THREADS, str(self.threads)))
        return self._warm_start.start(task)


def default_slots(gpus: list[str]) -> int:
    """One for each GPU; without one the cores up to 4, and half of them above."""
    cores = available_cores()
    return len(gpus) or (cores if cores <= 4 else cores // 2)


def visible_gpus() -> list[str]:
    """Ids of the NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [each.strip() for each in given.split(",") if each.strip() not in ("", "-1")]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [
        str(i) for i, line in enumerate(x for x in done.stdout.splitlines() if x.startswith("GPU ")) if line
    ]


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
