"""The executor of a cluster: Ray tasks, each of which runs its notebook in a separate process.

Ray chooses the node. A run that needs its machine alone takes all of a custom resource that every node offers, and a shared
run takes a part of it. A Ray that the sweep starts on this machine ends with the sweep.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import subprocess
import tempfile
from typing import Any

from wanlab.core.errors import WanlabError, first_line, require
from wanlab.launch.grid import Task
from wanlab.launch.slots import THREADS, available_cores, default_slots, visible_gpus
from wanlab.launch.sweep import End, start_process

MACHINE = "wanlab_machine"  # ray start --resources='{"wanlab_machine": 1}'
STEP = 1e-4  # smallest share of a resource in Ray


class RaySlots:
    """Runs tasks on Ray.

    All nodes need wanlab, and `outputs/` on a file system that all of them see.

    Args:
        address: address of a cluster, such as `"auto"` or `"ray://host:10001"`; None starts one on this machine.
        slots: runs at a time on each node; by default as in `LocalSlots` on this machine, and on a cluster as many as `cpus`
            and `gpus` of the grid allow.

    Raises:
        WanlabError: Ray is not installed, or there is no cluster at the address.
    """

    kind = "ray"

    def __init__(self, address: str | None = None, *, slots: int | None = None):
        self._ray = ray = require("ray", "'wanlab[ray]'")
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        gpus, cores = visible_gpus(), available_cores()
        self.embedded = address is None
        self._folder: str | None = None
        try:
            if self.embedded:
                slots = slots or default_slots(gpus)
                resources = {MACHINE: 1.0}
                self._folder = short_folder()
                where = {"_temp_dir": self._folder} if self._folder else {}
                here = {"num_cpus": slots, "num_gpus": len(gpus), "resources": resources, **where}
                ray.init(include_dashboard=False, **here, **quiet)
            else:
                ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            self._clear()
            raise WanlabError(f"no Ray at {address or 'this machine'}: {first_line(error)}") from error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.per_node = slots or max(int(node.get("CPU", 1)) for node in nodes)
        self.slots = self.per_node * len(nodes)
        self._machines = sum(node.get(MACHINE, 0.0) >= 1.0 for node in nodes)
        self._gpus = any(node.get("GPU", 0) >= 1 for node in nodes)
        self._threads = max(1, cores // self.per_node) if self.embedded else None
        self._running: dict[Any, Task] = {}
        self._start = ray.remote(max_retries=0)(run_task)

    def submit(self, task: Task) -> None:
        resources = {}
        if self._machines:
            resources[MACHINE] = 1.0 if task.alone else math.floor(1 / self.per_node / STEP) * STEP
        elif task.alone:
            raise WanlabError(
                f"{task.label} needs a machine alone, and no node of the cluster offers {MACHINE!r}; start nodes with: "
                f"ray start --resources='{{\"{MACHINE}\": 1}}'"
            )
        gpus = task.gpus if task.gpus is not None else float(self._gpus)
        environment = {}
        if self._threads and not task.alone:
            environment = dict.fromkeys(THREADS, str(self._threads))
        options = {"num_cpus": task.cpus, "num_gpus": gpus, "resources": resources, "name": task.label}
        self._running[self._start.options(**options).remote(task.to_json(), environment)] = task

    def poll(self, timeout_s: float) -> list[End]:
        if not self._running:
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        return [self._end(reference) for reference in ready]

    def stop(self, timeout_s: float) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=False)  # raises KeyboardInterrupt in `run_task`
        if self._running:
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=timeout_s)
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()

    def close(self) -> None:
        self._ray.shutdown()
        self._clear()

    def _clear(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self, reference: Any) -> End:
        task = self._running.pop(reference)
        errors = self._ray.exceptions
        try:
            return End(task, self._ray.get(reference))
        except errors.OutOfMemoryError:
            return End(task, None, lost=True, reason="Ray ended its worker, as the node ran out of memory")
        except errors.WorkerCrashedError:
            return End(task, None, lost=True, reason="its Ray worker was killed")
        except errors.NodeDiedError:
            return End(task, None, lost=True, reason="its Ray node went away")
        except (errors.TaskCancelledError, errors.RayTaskError) as error:
            return End(task, None, reason=str(error).strip().splitlines()[-1])
        except errors.RayError as error:
            return End(task, None, lost=True, reason=first_line(error))


def short_folder() -> str | None:
    """A new folder for Ray's sockets where the usual one has too long a path for them; None where it is short enough.

    A path of a Unix socket holds 107 bytes, and Ray adds about 65 to its folder.
    """
    usual = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="wanlab-ray-", dir="/tmp") if len(os.fsencode(usual)) > 40 else None


def run_task(text: str, environment: dict[str, str]) -> int:
    """Run a task as a process of a Ray worker, where Ray has set CUDA_VISIBLE_DEVICES; returns the exit status."""
    process = start_process(Task.from_json(text), environment)
    try:
        return process.wait()
    except BaseException:  # the task was cancelled
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
