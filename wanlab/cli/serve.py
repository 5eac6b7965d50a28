"""`wanlab serve`: a video service until it is stopped."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from types import FrameType

from wanlab.cli.command import Command, positive, show, video_size
from wanlab.core.errors import WanlabError, require
from wanlab.core.paths import default_outputs
from wanlab.launch.slots import visible_gpus
from wanlab.serve.settings import ServiceSettings

HELP = """Serve a model in a configuration as an OpenAI-style video API with a queue, batches and a small web page, until it
is stopped with Ctrl+C or SIGTERM. It listens on this machine alone and asks for a token, which is printed once; set
WANLAB_TOKEN to choose it. For TLS and other machines put a proxy before it."""
TOKEN = "WANLAB_TOKEN"
DEFAULTS = ServiceSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        default=DEFAULTS.model,
        help=f"name or folder of a model (default {DEFAULTS.model})",
    )
    add(
        "--config",
        default=DEFAULTS.configuration,
        metavar="NAME",
        help="configuration: a name or a YAML file (default eager)",
    )
    add(
        "--size",
        action="append",
        default=[],
        metavar="HxWxF",
        help="height, width and frames that are served; several times for several sizes (default: the model's own)",
    )
    add("--any-size", action="store_true", help="serve every legal size, not only those of --size")
    add("--weights", default=DEFAULTS.weights, choices=("pretrained", "random"), help="weights of the model")
    add("--dtype", default=DEFAULTS.dtype, help="dtype of the model: auto, float32, bfloat16, float16")
    add("--device", default=DEFAULTS.device, help="device of the model: auto, cpu, cuda")
    add(
        "--engines",
        metavar="DIR",
        help="folder of the configuration's converted networks (default: in the project's outputs/)",
    )
    add("--folder", metavar="DIR", help="folder of jobs and results (default: outputs/serve of the project)")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    add("--port", type=int, default=8000, help="port to listen on; 0 is any free one (default 8000)")
    add(
        "--no-token",
        action="store_true",
        help="ask for no token; only where this machine alone is listened to",
    )
    add(
        "--batch",
        type=int,
        default=DEFAULTS.max_batch,
        help=f"videos that a worker makes at a time (default {DEFAULTS.max_batch})",
    )
    add(
        "--batch-wait",
        type=float,
        default=DEFAULTS.batch_wait_s,
        metavar="SECONDS",
        help=f"time that an idle worker waits for more requests (default {DEFAULTS.batch_wait_s:g})",
    )
    add(
        "--queue",
        type=int,
        default=DEFAULTS.queue,
        help=f"requests that may wait; more are refused (default {DEFAULTS.queue})",
    )
    add(
        "--deadline",
        type=positive,
        default=DEFAULTS.deadline_s,
        metavar="SECONDS",
        help=f"time after which a request is given up (default {DEFAULTS.deadline_s:g})",
    )
    add(
        "--keep-hours",
        type=positive,
        default=DEFAULTS.keep_s / 3600,
        metavar="HOURS",
        help=f"time that results are kept (default {DEFAULTS.keep_s / 3600:g})",
    )
    add(
        "--keep-gib",
        type=positive,
        default=DEFAULTS.keep_gib,
        metavar="GIB",
        help=f"size of all results that are kept (default {DEFAULTS.keep_gib:g})",
    )
    add(
        "--replicas",
        type=int,
        default=DEFAULTS.replicas,
        help="workers, each with a model of its own (default 1)",
    )
    add("--gpus", type=float, help="GPUs of a worker, such as 0.5 (default: 1 where one is seen)")
    add(
        "--threads",
        type=int,
        default=DEFAULTS.threads,
        help="threads of PyTorch in a worker (default: PyTorch's own choice)",
    )
    add(
        "--address",
        metavar="ADDRESS",
        help='put the workers on a Ray cluster, such as "auto" (default: a Ray of its own)',
    )
    add(
        "--no-ray",
        action="store_true",
        help="one worker in this process: starts sooner and takes less memory; a crash of it ends the service",
    )


def main(options: argparse.Namespace) -> int:
    """Serve until a signal; returns 0 after a clean stop."""
    if options.no_ray and (options.address or options.replicas != 1):
        raise WanlabError("--no-ray has one worker in this process; leave --address and --replicas out")
    settings = _settings(options)
    for package in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        require(package, "'wanlab[serve]'")
    from wanlab.serve.running import served  # imports them

    with _ended_by_signals():
        try:
            show(f"loading {settings.model} in configuration {settings.configuration} ...")
            running = served(
                settings,
                host=options.host,
                port=options.port,
                ray=not options.no_ray,
                address=options.address,
            )
            with running as service:
                facts = service.facts
                sizes = ", ".join(f"{w}x{h} with {f} frames" for w, h, f in facts.sizes)
                show(f"ready: {service.url}, {facts.name} on {facts.versions['device']}, {sizes}")
                if facts.alone:
                    show(f"one video at a time: {facts.alone}")
                if settings.token and not os.environ.get(TOKEN):
                    show(f"token: {settings.token}", f"page: {service.url}/#token={settings.token}")
                sys.stdout.flush()
                threading.Event().wait()
        except (KeyboardInterrupt, SystemExit):
            show("stopped")
    return 0


def _settings(options: argparse.Namespace) -> ServiceSettings:
    token = "" if options.no_token else os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    if not token and not _loopback(options.host):
        raise WanlabError(f"--no-token lets everyone in who reaches {options.host}; leave one of the two out")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise WanlabError(f"{TOKEN} must be printable ASCII without spaces, as it stands in a header of HTTP")
    gpus = options.gpus
    if gpus is None:
        gpus = 1.0 if _sees_gpu(options.device) else 0.0
    outputs = default_outputs()
    return ServiceSettings(
        model=options.model,
        weights=options.weights,
        device=options.device,
        dtype=options.dtype,
        configuration=options.config,
        engines_folder=options.engines or str(outputs / "configured"),
        sizes=tuple((width, height, frames) for height, width, frames in map(video_size, options.size)),
        any_size=options.any_size,
        folder=os.path.abspath(options.folder or outputs / "serve"),
        max_batch=options.batch,
        batch_wait_s=options.batch_wait,
        replicas=options.replicas,
        gpus=gpus,
        threads=options.threads,
        queue=options.queue,
        deadline_s=options.deadline,
        keep_s=options.keep_hours * 3600,
        keep_gib=options.keep_gib,
        token=token,
    )


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _sees_gpu(device: str) -> bool:
    return device != "cpu" and bool(visible_gpus())


def _stop(*_: int | FrameType | None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a second one does not interrupt the cleaning up
    raise KeyboardInterrupt


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, _ in before:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


COMMANDS = {"serve": Command(HELP, add_arguments, main)}
