"""The service on Ray Serve: one deployment for HTTP and the jobs, one for the workers, each of them a model on a device.

Without an address a Ray is started on this machine and ends with the service; with one, the same deployments run on its nodes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from wanlab.core.errors import WanlabError, first_line, require
from wanlab.launch.ray_slots import short_folder
from wanlab.launch.slots import available_cores, visible_gpus
from wanlab.serve.app import make_app
from wanlab.serve.service import Service, WorkerDied
from wanlab.serve.settings import ModelFacts, ServiceSettings, settings_of

NAME = "wanlab"
WORKER_FAULTS = 3
"""Times that Ray starts a worker that fails while it loads, before the service gives up."""


@dataclass(frozen=True)
class Served:
    """A running service: its address, and the token to give as `Authorization: Bearer` (empty where none is asked for)."""

    url: str
    token: str


@contextmanager
def served(
    settings: ServiceSettings, *, address: str | None = None, host: str = "127.0.0.1", port: int = 8000
) -> Iterator[Served]:
    """A service inside the block; it is ready when the block begins, and has ended when the block is left.

    Args:
        settings: settings of the service.
        address: address of a Ray cluster, such as `"auto"`; None starts Ray on this machine.
        host, port: where HTTP listens.

    Raises:
        WanlabError: Ray Serve is not installed, there is no cluster at the address, the port is taken, or no worker could be
            started.
    """
    ray = require("ray", "'wanlab[serve]'")
    serve = require("ray.serve", "'wanlab[serve]'")
    folder = None
    try:
        if address is None:
            folder = short_folder()
            where = {"_temp_dir": folder} if folder else {}
            cpus = max(available_cores(), int(settings.cpus * settings.replicas) + 1)
            ray.init(
                include_dashboard=False, num_cpus=cpus, num_gpus=len(visible_gpus()), log_to_driver=False,
                logging_level=logging.ERROR, **where,
            )  # fmt: skip
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(http_options={"host": host, "port": port, "request_timeout_s": None})
        serve.run(application(settings), name=NAME, route_prefix="/", logging_config={"log_level": "ERROR"})
        yield Served(f"http://{host}:{port}", settings.token)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise WanlabError(f"the service could not be started: {first_line(error)}") from error
    finally:
        with suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def application(settings: ServiceSettings) -> Any:
    """The deployments of a service, bound to one another, as `serve.run` takes them."""
    serve = require("ray.serve", "'wanlab[serve]'")
    worker = serve.deployment(
        name="Worker",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_batch + 1,  # one for `facts`
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_constructor_retry_count=WORKER_FAULTS,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=20,
    )(WorkerReplica)
    front = serve.deployment(
        name="Front",
        num_replicas=1,  # it alone writes the jobs
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=20,
    )(serve.ingress()(Front))
    values = settings.to_dict()
    return front.bind(values, worker.bind(values))


class WorkerReplica:
    """A worker in a process of Ray; see `wanlab.serve.worker.Worker`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from wanlab.serve.worker import Worker  # loads torch, which the front does without

        self._worker = Worker(settings_of(settings))

    async def facts(self) -> dict[str, Any]:
        """Facts of the model, as JSON values."""
        import msgspec

        return msgspec.to_builtins(self._worker.facts())

    async def make(self, order: dict[str, Any], picture: bytes | None) -> AsyncIterator[dict[str, Any]]:
        """Events of one video, as `Worker.run`."""
        events = self._worker.run(order, picture)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()


class RayWorkers:
    """The workers of a service behind a handle of Ray Serve."""

    def __init__(self, handle: Any, settings: ServiceSettings) -> None:
        self._handle, self._settings = handle, settings
        self.capacity = settings.max_batch * settings.replicas

    async def facts(self) -> ModelFacts:
        """The facts of the model, when a worker is ready."""
        import msgspec

        facts = msgspec.convert(await self._handle.facts.remote(), ModelFacts)
        self.capacity = facts.max_batch * self._settings.replicas
        return facts

    async def run(self, order: dict[str, Any], picture: bytes | None) -> AsyncIterator[dict[str, Any]]:
        """Events of a video; raises WorkerDied where its process went away."""
        from ray import exceptions

        stream = self._handle.options(stream=True).make.remote(order, picture)
        ended = False
        try:
            async for event in stream:
                yield event
            ended = True
        except (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError) as error:
            ended = True
            raise WorkerDied(first_line(error, 120)) from error
        finally:
            if not ended:
                stream.cancel()

    async def close(self) -> None:
        """Ray Serve ends them."""


class Front:
    """HTTP and jobs of a service in a process of Ray."""

    def __init__(self, settings: dict[str, Any], worker: Any) -> None:
        own = settings_of(settings)
        self._service = Service(own, RayWorkers(worker, own))

    def __serve_build_asgi_app__(self) -> Any:
        """The application, which Ray Serve asks for after the constructor; the service begins and ends with it."""
        return make_app(self._service)
