"""The workers of a service as replicas of one deployment of Ray Serve, each a process with a model on a device.

Without an address a Ray is started on this machine and ends with the service; with one, the replicas run on its nodes.
Ray Serve places, watches and restarts them; requests go to one that has room, and its progress comes back as a stream.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import msgspec
import psutil

from wanlab.core.errors import WanlabError, first_line, require
from wanlab.launch.ray_slots import short_folder
from wanlab.launch.slots import available_cores, visible_gpus
from wanlab.serve.service import WorkerDied
from wanlab.serve.settings import ModelFacts, ServiceSettings, settings_of

NAME = "wanlab"
EXTRA = "'wanlab[serve]'"
WORKER_FAULTS = 2
"""Times that Ray starts a worker that fails while it loads, before the service gives up."""
HEALTH_S = 2.0
"""Time between two looks at a worker: so long may a death stay unnoticed where no request is running."""
END_S = 10.0
"""Time that the processes of a Ray of this machine have to end."""
QUIET = {"log_level": "ERROR", "enable_access_log": False}


class WorkerReplica:
    """A worker in a process of Ray; see `wanlab.serve.worker.Worker`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from wanlab.serve.worker import Worker  # loads torch, which the process of the queue does without

        self._worker = Worker(settings_of(settings))

    async def facts(self) -> dict[str, Any]:
        """Facts of the model, as JSON values."""
        return msgspec.to_builtins(self._worker.facts())

    async def make(self, order: dict[str, Any], picture: bytes | None) -> AsyncGenerator[dict[str, Any]]:
        """Events of one video, as `Worker.run`."""
        events = self._worker.run(order, picture)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()


class RayWorkers:
    """The workers of a service on Ray.

    Args:
        settings: settings of the service.
        address: address of a cluster, such as `"auto"`; None starts a Ray on this machine.
    """

    def __init__(self, settings: ServiceSettings, address: str | None = None) -> None:
        self.capacity = settings.max_batch * settings.replicas
        self._settings, self._address = settings, address
        self._handle: Future[Any] = Future()
        self._folder: str | None = None
        self._ray = require("ray", EXTRA)
        self._serve = require("ray.serve", EXTRA)

    def open(self) -> None:
        """Start the workers, and return when all of them are warmed up. Called in the main thread.

        Raises:
            WanlabError: there is no cluster at the address, or a worker could not be started.
        """
        ray, serve, settings = self._ray, self._serve, self._settings
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            if self._address is None:
                self._folder = short_folder() or tempfile.mkdtemp(prefix="wanlab-ray-")
                cpus = max(available_cores(), int(settings.cpus * settings.replicas) + 1)
                here = {"num_cpus": cpus, "num_gpus": len(visible_gpus())}
                ray.init(include_dashboard=False, _temp_dir=self._folder, **here, **quiet)
            else:
                ray.init(address=self._address, **quiet)
            for number, handler in handlers.items():  # Ray has set its own, which end the process at once
                signal.signal(number, handler)
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            serve.start(proxy_location="Disabled", logging_config=QUIET)  # HTTP is the service's own
            handle = serve.run(self._deployment(), name=NAME, route_prefix=None, logging_config=QUIET)
        except Exception as error:  # Ray raises its bare class where its processes start too slowly
            fault = WanlabError(f"the workers could not be started: {self._reason(error)}")
            self._handle.set_exception(fault)
            raise fault from error
        self._handle.set_result(handle)

    def shut(self) -> None:
        """End the workers, and the Ray that was started for them. Called after the service has ended."""
        if self._address is not None:  # a cluster goes on without them
            with suppress(Exception):
                self._serve.delete(NAME)
        processes = _processes(self._folder) if self._folder else []
        self._ray.shutdown()
        _, left = psutil.wait_procs(processes, timeout=END_S)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def facts(self) -> ModelFacts:
        """The facts of the model, when the workers are ready."""
        handle = await asyncio.wrap_future(self._handle)
        facts = msgspec.convert(await handle.facts.remote(), ModelFacts)
        self.capacity = facts.max_batch * self._settings.replicas
        return facts

    async def run(self, order: dict[str, Any], picture: bytes | None) -> AsyncGenerator[dict[str, Any]]:
        """Events of a video; raises WorkerDied where its process went away."""
        errors = self._ray.exceptions
        stream = self._handle.result().options(stream=True).make.remote(order, picture)
        ended = False
        try:
            async for event in stream:
                yield event
            ended = True
        except (errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError) as error:
            ended = True
            raise WorkerDied("its process ended") from error
        finally:
            if not ended:
                stream.cancel()

    async def close(self) -> None:
        """Ray ends the workers in `shut`."""

    def _deployment(self) -> Any:
        settings = self._settings
        replica = self._serve.deployment(
            name="Worker",
            num_replicas=settings.replicas,
            max_ongoing_requests=settings.max_batch + 1,  # one for `facts`
            ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
            max_constructor_retry_count=WORKER_FAULTS,
            health_check_period_s=HEALTH_S,
            graceful_shutdown_timeout_s=5,
        )(WorkerReplica)
        return replica.bind(settings.to_dict() | {"token": ""})

    def _reason(self, error: Exception) -> str:
        """The last error of a worker that did not start, without Ray's frames around it."""
        with suppress(Exception):
            deployments = self._serve.status().applications[NAME].deployments
            lines = [line for each in deployments.values() for line in each.message.splitlines()]
            raised = [line for line in lines if line[:1].isalpha() and "Error: " in line]
            if raised:
                return first_line(raised[-1].partition("Error: ")[2])
        return first_line(error)


def _processes(folder: str) -> list[psutil.Process]:
    """Processes of the Ray that was started here with a folder, and those which they started."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any(folder in argument for argument in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found
