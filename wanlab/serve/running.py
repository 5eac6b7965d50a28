"""A service that runs: HTTP and the queue in a thread of this process, the workers on Ray Serve or in this process too."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import uvicorn
from fastapi import FastAPI

from wanlab.core.errors import WanlabError
from wanlab.core.files import why
from wanlab.serve.app import make_app
from wanlab.serve.ray_workers import RayWorkers
from wanlab.serve.service import LocalWorkers, Service, Workers
from wanlab.serve.settings import ModelFacts, ServiceSettings

PATIENCE_S = 5
"""Seconds that open connections, such as progress, are given when the service stops."""
CONNECTIONS = 1000
"""Connections at a time; more are answered with 503."""


@dataclass(frozen=True)
class Served:
    """A running service.

    Attributes:
        url: its address. token: empty where none is asked for. facts: of its model.
        limit: makes so many videos at a time from now on, or as many as the workers make (None); None itself for a service
            of another process, which has no such switch.
    """

    url: str
    token: str
    facts: ModelFacts
    limit: Callable[[int | None], None] | None = None


@contextmanager
def served(
    settings: ServiceSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    ray: bool = True,
    address: str | None = None,
    on_listen: Callable[[str], None] | None = None,
) -> Iterator[Served]:
    """A service inside the block; it is ready when the block begins, and has ended when the block is left.

    Args:
        settings: settings of the service.
        host, port: where HTTP listens; port 0 is any free one.
        ray: workers on Ray Serve; False for one worker in this process, which starts sooner and dies with it.
        address: address of a Ray cluster, such as `"auto"`; None starts Ray on this machine.
        on_listen: called with the URL when HTTP answers, which is before the service is ready.

    Raises:
        WanlabError: Ray Serve is not installed, there is no cluster at the address, the port is taken, another service has
            the folder, or no worker could be started.
    """
    with ExitStack() as stack:  # what is entered first ends last
        listener = stack.enter_context(_listener(host, port))
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        on_ray = RayWorkers(settings, address) if ray else None
        workers: Workers = on_ray or LocalWorkers(settings)
        if on_ray is not None:
            stack.callback(on_ray.shut)
        service = Service(settings, workers)
        stack.callback(service.store.close)
        stack.enter_context(_listening(make_app(service), listener))
        if on_listen is not None:
            on_listen(url)
        if on_ray is not None:
            on_ray.open()
        while not service.ready:
            if service.fault is not None:
                raise WanlabError(service.fault)
            time.sleep(0.02)
        yield Served(url, settings.token, service.facts, partial(setattr, service, "at_once"))


def _listener(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        reason = why(error) if isinstance(error, OSError) else str(error)
        raise WanlabError(f"{host}:{port} cannot be listened on: {reason}; name another --port") from error


@contextmanager
def _listening(app: FastAPI, listener: socket.socket) -> Iterator[None]:
    """An application that answers inside the block, in a thread of its own."""
    config = uvicorn.Config(
        app, log_level="critical", access_log=False, lifespan="on", limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=PATIENCE_S, server_header=False,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listener]}, name="wanlab-http", daemon=True
    )
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise WanlabError("the service could not begin to answer HTTP")
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join()
