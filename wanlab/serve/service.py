"""The queue of a service: what is accepted, when it is made, what is told of it, and what happens when something fails."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import sqlite3
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, Protocol

import msgspec

from wanlab.core.errors import first_line
from wanlab.core.files import why, write_bytes
from wanlab.serve.jobs import (
    CANCELLED,
    COMPLETED,
    ENDED,
    FAILED,
    IN_PROGRESS,
    QUEUED,
    Job,
    JobStore,
    KeyTaken,
)
from wanlab.serve.metrics import Metrics
from wanlab.serve.requests import Order, Refused, read_request
from wanlab.serve.settings import ModelFacts, ServiceSettings

SWEEP_S = 30.0
SHARE = 0.3
"""Weight of the newest time in a running mean."""
DECODERS = 2
"""Pictures that are read at a time: each may take some hundred MiB."""


class WorkerDied(Exception):
    """The worker of a job went away before the job ended."""


class Workers(Protocol):
    """What makes the videos: `wanlab.serve.ray_workers.RayWorkers` on Ray Serve, or `LocalWorkers` in this process."""

    capacity: int

    async def facts(self) -> ModelFacts:
        """The facts of the model, when the workers are ready."""

    def run(self, order: dict[str, Any], picture: bytes | None) -> AsyncGenerator[dict[str, Any]]:
        """Events of a video, as `Worker.run`; raises WorkerDied."""

    async def close(self) -> None:
        """End them."""


class _Live:
    """What is known of a job that has not ended, beside its row: its step, its task, and who waits for news."""

    def __init__(self, job: Job) -> None:
        self.order = msgspec.convert(job.request, Order)
        self.deadline = job.created_at + self.order.deadline_s
        self.step = 0
        self.step_at: float | None = None
        self.task: asyncio.Task | None = None
        self.cancelled = False
        self.news = asyncio.Event()

    def tell(self) -> None:
        """Wake those who wait for news."""
        self.news.set()
        self.news = asyncio.Event()


class Service:
    """The jobs of one service.

    Args:
        settings: settings of the service.
        workers: what makes the videos.
    """

    def __init__(self, settings: ServiceSettings, workers: Workers) -> None:
        self.settings, self.workers = settings, workers
        self.metrics = Metrics()
        self.facts: ModelFacts | None = None
        self.fault: str | None = None
        self.at_once: int | None = None  # videos at a time; None is as many as the workers make
        self.store = JobStore(settings.folder)
        self._queue: deque[str] = deque()
        self._live: dict[str, _Live] = {}
        self._unsaved: dict[str, dict[str, Any]] = {}  # ends that a full disk did not take yet
        self._running: set[str] = set()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task] = []
        self._reading = asyncio.Semaphore(DECODERS)
        self._job_s: dict[tuple, float] = {}
        self._step_s: dict[tuple, float] = {}
        self._rest_s: dict[tuple, float] = {}

    async def start(self) -> None:
        """Take up what waited, and begin when the workers are ready; returns before they are."""
        for job in self.store.take_up(self.settings.attempts):
            self._live[job.id] = _Live(job)
            self._queue.append(job.id)
        self._tasks = [asyncio.create_task(self._open()), asyncio.create_task(self._sweep())]

    async def close(self) -> None:
        """Stop; what waits or is being made is taken up by the next start."""
        running = [live.task for live in self._live.values() if live.task is not None]
        for task in (*self._tasks, *running):
            task.cancel()
        await asyncio.gather(*self._tasks, *running, return_exceptions=True)
        with contextlib.suppress(sqlite3.Error):
            for job in self.store.listed(IN_PROGRESS, limit=-1):
                self.store.again(job.id, counted=False)
        await self.workers.close()
        self.store.close()

    @property
    def ready(self) -> bool:
        """Whether the workers are loaded and warmed up."""
        return self.facts is not None and self.fault is None

    @property
    def capacity(self) -> int:
        """Videos that are made at a time."""
        return min(self.workers.capacity, self.at_once or self.workers.capacity)

    async def submit(self, fields: Mapping[str, Any], key: str | None = None) -> tuple[Job, bool]:
        """Check and accept a request; the job, and whether it is new.

        Raises:
            Refused: the request is wrong, the queue is full, the disk is full, or the service is not ready.
        """
        if self.fault is not None:
            raise Refused(self.fault, 503, "not_ready")
        if self.facts is None:
            raise Refused("the model is being loaded; ask again soon", 503, "not_ready", {"Retry-After": "5"})
        facts = self.facts
        async with self._reading:
            order, picture, digest = await asyncio.to_thread(read_request, fields, facts, self.settings)
        try:
            before = None if key is None else self.store.by_key(key)
            if before is None and len(self._queue) >= self.settings.queue:
                after = self._retry_after()
                raise Refused(
                    f"the queue is full ({self.settings.queue} requests wait); ask again in {after} s", 429, "queue_full",
                    {"Retry-After": str(after)},
                )  # fmt: skip
            job, new = self.store.add(msgspec.to_builtins(order), digest, key=key, picture=picture)
        except KeyTaken as error:
            raise Refused(str(error), 409, "idempotency_key_reused") from error
        except (OSError, sqlite3.Error) as error:
            raise Refused(
                f"the request cannot be kept: {_disk(error)}; it was not accepted", 507, "storage"
            ) from error
        if new:
            self._live[job.id] = _Live(job)
            self._queue.append(job.id)
            self.metrics.accepted.inc()
            self._wake.set()
        return job, new

    def get(self, identity: str) -> Job:
        """The job of an id.

        Raises:
            Refused: there is none.
        """
        job = self.store.get(identity)
        if job is None:
            raise Refused(f"there is no video {identity[:60]!r}; it may have expired", 404, "not_found")
        if identity in self._unsaved:
            end = self._unsaved[identity]
            job.status, job.error, job.error_code = end["status"], end.get("error"), end.get("code")
            job.result, job.ended_at = end.get("result"), job.started_at or job.created_at
        return job

    def view(self, job: Job) -> dict[str, Any]:
        """What is told of a job: the fields of OpenAI's video object, with its place, step, estimate and versions."""
        order, live = job.request, self._live.get(job.id)
        result = job.result or {}
        step = order["steps"] if job.status == COMPLETED else live.step if live else 0
        progress = 100 if job.status == COMPLETED else int(99 * step / order["steps"])
        peak = result.get("peak_memory_mib")
        kept = job.ended_at and job.ended_at + self.settings.keep_s
        return {
            "id": job.id,
            "object": "video",
            "model": self.facts.name if self.facts else self.settings.model,
            "status": job.status,
            "progress": progress,
            "created_at": int(job.created_at),
            "started_at": job.started_at and int(job.started_at),
            "completed_at": int(job.ended_at) if job.status == COMPLETED else None,
            "expires_at": int(kept) if kept else None,
            "size": f"{order['width']}x{order['height']}",
            "num_frames": order["frames"],
            "seconds": f"{order['frames'] / self.facts.fps:g}" if self.facts else None,
            "seed": order["seed"],
            "error": None if job.error is None else {"code": job.error_code, "message": job.error},
            "step": step,
            "steps": order["steps"],
            "queue_position": self._position(job),
            "estimate_s": self._estimate(job, live),
            "inference_time_s": job.ended_at - job.started_at if job.status == COMPLETED else None,
            "queue_wait_s": job.started_at - job.created_at if job.started_at else None,
            "peak_memory_mb": peak and peak * 2**20 / 1e6,
            "result": result or None,
            "versions": self.facts.versions if self.facts else None,
        }

    async def changes(self, identity: str) -> AsyncIterator[dict[str, Any]]:
        """The job each time that something is new of it, until it has ended.

        Raises:
            Refused: there is no such job.
        """
        while True:
            live = self._live.get(identity)
            news = live.news if live else None
            job = self.get(identity)
            yield self.view(job)
            if job.status in ENDED or news is None:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), 15)

    def cancel(self, identity: str) -> Job:
        """End a job that waits or is being made; remove one that has ended, with its result.

        Raises:
            Refused: there is no such job.
        """
        job = self.get(identity)
        if job.status in ENDED:
            self.store.remove(identity)
            return job
        live = self._live.get(identity)
        self._end(identity, status=CANCELLED, error="cancelled by the caller", code="cancelled")
        if live is not None:
            live.cancelled = True
            if live.task is not None:
                live.task.cancel()
            else:
                self._forget(identity)
            live.tell()
        return self.get(identity)

    def queue_depth(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    async def _open(self) -> None:
        try:
            self.facts = await self.workers.facts()
        except Exception as error:
            self.fault = f"no worker could be started: {first_line(error)}"
            return
        while True:
            if self._queue and not self._running and len(self._queue) < self.capacity:
                await asyncio.sleep(
                    self.settings.batch_wait_s
                )  # so that those who come together begin together
            while self._queue and len(self._running) < self.capacity:
                identity = self._queue.popleft()
                live = self._live[identity]
                self._running.add(identity)
                live.task = asyncio.create_task(self._make(identity, live))
            self._wake.clear()
            self.metrics.waiting.set(len(self._queue))
            self.metrics.running.set(len(self._running))
            await self._wake.wait()

    async def _make(self, identity: str, live: _Live) -> None:
        requeue = False
        try:
            if not self.store.start(identity):
                return
            live.tell()
            left = live.deadline - time.time()
            async with asyncio.timeout(max(left, 0.001)):
                await self._follow(identity, live)
        except TimeoutError:
            late = f"not done within its deadline of {live.order.deadline_s:g} s"
            self._end(identity, status=FAILED, error=late, code="deadline")
        except asyncio.CancelledError:
            if not live.cancelled:
                raise  # the service ends: the next start takes it up
        except WorkerDied as error:
            job = self.store.get(identity)
            requeue = job is not None and job.attempts < self.settings.attempts
            if requeue:
                self.store.again(identity)
            else:
                self._end(identity, status=FAILED, error=f"its worker died: {error}", code="worker_died")
        except (sqlite3.Error, OSError) as error:
            lost = f"its record cannot be written: {_disk(error)}"
            self._end(identity, status=FAILED, error=lost, code="storage")
        except Exception as error:
            lost = f"a fault of the service: {first_line(error)}"
            self._end(identity, status=FAILED, error=lost, code="internal")
        finally:
            self._running.discard(identity)
            live.task = None
            if requeue:
                live.step = 0
                self._queue.appendleft(identity)
            else:
                self._forget(identity)
            live.tell()
            self._wake.set()

    async def _follow(self, identity: str, live: _Live) -> None:
        key = live.order.kind
        begin = time.monotonic()
        path = self.store.picture(identity)
        picture = await asyncio.to_thread(path.read_bytes) if path.exists() else None
        events = self.workers.run(msgspec.to_builtins(live.order), picture)
        async with contextlib.aclosing(events):
            async for event in events:
                if "step" in event:
                    now = time.monotonic()
                    if live.step_at is not None:
                        _mean(self._step_s, key, now - live.step_at)
                    live.step, live.step_at = event["step"], now
                    live.tell()
                elif "error" in event:
                    self._end(identity, status=FAILED, error=event["error"], code=event["code"])
                    return
                else:
                    if live.step_at is not None:
                        _mean(self._rest_s, key, time.monotonic() - live.step_at)
                    _mean(self._job_s, key, time.monotonic() - begin)
                    await self._keep(identity, live, event["video"], event["result"])
                    return
        raise WorkerDied("its stream of events ended early")

    async def _keep(self, identity: str, live: _Live, video: bytes, result: dict[str, Any]) -> None:
        path = self.store.video(identity, f".{live.order.output_format}")
        try:
            await asyncio.to_thread(write_bytes, path, video)
        except OSError as error:
            self._end(
                identity, status=FAILED, error=f"the video cannot be kept: {_disk(error)}", code="storage"
            )
            return
        job = self.store.get(identity)
        if not self._end(identity, status=COMPLETED, result=result, size_bytes=len(video)):
            path.unlink(missing_ok=True)  # it was cancelled meanwhile
            return
        self.metrics.done(result, time.time() - job.created_at, job.started_at - job.created_at)
        self.store.sweep(self.settings.keep_s, self.settings.keep_gib)

    def _end(self, identity: str, **end: Any) -> bool:
        """Write the end of a job; kept in memory and written later where the disk is full."""
        self.metrics.ended.labels(end["status"]).inc()
        try:
            return self.store.end(identity, **end)
        except (sqlite3.Error, OSError):
            self._unsaved[identity] = end
            return True

    def _forget(self, identity: str) -> None:
        self._live.pop(identity, None)
        with contextlib.suppress(ValueError):
            self._queue.remove(identity)

    async def _sweep(self) -> None:
        while True:
            with contextlib.suppress(sqlite3.Error, OSError):
                self.store.sweep(self.settings.keep_s, self.settings.keep_gib)
                for identity in list(self._unsaved):
                    self.store.end(identity, **self._unsaved[identity])
                    del self._unsaved[identity]
            now = time.time()
            for identity in [each for each in self._queue if self._live[each].deadline < now]:
                live = self._live[identity]
                self._end(
                    identity, status=FAILED, error="its deadline passed while it waited", code="deadline"
                )
                self._forget(identity)
                live.tell()
            await asyncio.sleep(min(SWEEP_S, max(1.0, self.settings.keep_s / 4)))

    def _position(self, job: Job) -> int | None:
        if job.status != QUEUED:
            return None
        with contextlib.suppress(ValueError):
            return self._queue.index(job.id)
        return 0

    def _estimate(self, job: Job, live: _Live | None) -> float | None:
        """Seconds until the video is done, from running means of its kind; None where no such video was made yet."""
        if live is None or job.status in ENDED:
            return None
        key = live.order.kind
        whole = self._job_s.get(key)
        if job.status == IN_PROGRESS and live.step_at is not None and key in self._step_s:
            left = (live.order.steps - live.step) * self._step_s[key] + self._rest_s.get(key, 0.0)
            return round(max(0.0, left - (time.monotonic() - live.step_at)), 1)
        if whole is None:
            return None
        rounds = 0 if job.status == IN_PROGRESS else 1 + (self._position(job) or 0) // max(1, self.capacity)
        return round(whole * (1 + rounds), 1)

    def _retry_after(self) -> int:
        known = list(self._job_s.values())
        usual = sum(known) / len(known) if known else 10.0
        return max(1, round(usual / max(1, self.capacity)))


def _mean(means: dict[tuple, float], key: tuple, value: float) -> None:
    if len(means) > 1000:  # callers choose the kinds
        means.clear()
    means[key] = value if key not in means else (1 - SHARE) * means[key] + SHARE * value


def _disk(error: Exception) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "full" in str(error):
        return "no space left on device"
    return (
        why(OSError(error.errno, error.strerror or str(error)))
        if isinstance(error, OSError)
        else first_line(error)
    )


class LocalWorkers:
    """One worker in this process, without Ray: for tests, and for a service of one model on one machine.

    Args:
        settings: settings of the service. The worker is made when `facts` is first asked.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._worker: Any = None
        self.capacity = settings.max_batch

    async def facts(self) -> ModelFacts:
        """The facts of the model, which is loaded first."""
        from wanlab.serve.worker import Worker  # loads torch

        if self._worker is None:
            self._worker = await asyncio.to_thread(Worker, self._settings)
            self.capacity = self._worker.meeting.max_batch
        return self._worker.facts()

    def run(self, order: dict[str, Any], picture: bytes | None) -> AsyncGenerator[dict[str, Any]]:
        """See `Worker.run`."""
        return self._worker.run(order, picture)

    async def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            await asyncio.to_thread(self._worker.close)
