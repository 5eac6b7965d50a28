"""Requests that are sent to a service as callers would: so many at a time, or at random times, each followed to its end."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from wanlab.core.errors import WanlabError, first_line, require
from wanlab.serve.running import Served, served
from wanlab.serve.settings import ModelFacts, ServiceSettings

PATIENCE_S = 3600.0
"""Longest time without news of a video; the service itself tells something every 15 s."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request.

    Attributes:
        sent_ms: when it was sent, after the load began. latency_ms: from then to the end, as its caller saw it.
        status: `"completed"`, `"failed"`, `"cancelled"`, or `"refused"`, with `error` for all but the first.
        queue_wait_ms: part in which it waited for its turn. encode_ms, denoise_ms, decode_ms: parts of its generation.
        wait_ms: part of these three in which it waited for calls of other videos.
        mean_batch: mean samples in the denoiser's calls. peak_memory_mib: of the GPU; None on a CPU.
    """

    sent_ms: float
    latency_ms: float
    status: str
    error: str = ""
    queue_wait_ms: float | None = None
    encode_ms: float | None = None
    denoise_ms: float | None = None
    decode_ms: float | None = None
    wait_ms: float | None = None
    mean_batch: float | None = None
    peak_memory_mib: float | None = None


def body_of(asked: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
    """The body of a request from arguments of `Model.generate`, such as those of `heldout.ask`.

    Args:
        asked: prompt, and where given image `[H, W, 3]` in [0, 1] or uint8, seed, height, width, frames, steps,
            guidance_scale. facts: of the service's model, whose size and steps hold where none are given.
    """
    width, height, frames = facts.sizes[0]
    body: dict[str, Any] = {
        "prompt": asked["prompt"],
        "size": f"{asked.get('width') or width}x{asked.get('height') or height}",
        "num_frames": asked.get("frames") or frames,
        "num_inference_steps": asked.get("steps") or facts.steps,
        "seed": asked.get("seed", 0),
    }
    if asked.get("guidance_scale") is not None:
        body["guidance_scale"] = asked["guidance_scale"]
    if facts.needs:
        picture = np.asarray(asked["image"])
        if picture.dtype != np.uint8:
            picture = np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
        packed = io.BytesIO()
        Image.fromarray(picture).save(packed, "PNG")
        body["input_reference"] = "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()
    return body


def remote(url: str, token: str = "") -> Served:
    """A service that runs elsewhere.

    Raises:
        WanlabError: it does not answer, the token is wrong, or it is not ready.
    """
    httpx = require("httpx", "'wanlab[serve]'")
    try:
        answer = httpx.get(f"{url.rstrip('/')}/v1/models", headers=_headers(token), timeout=30)
        told = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise WanlabError(
            f"no service answers at {url}: {first_line(error)}; start one with wanlab serve"
        ) from error
    if answer.status_code != 200:
        said = told.get("error", {}).get("message", answer.status_code)
        raise WanlabError(f"the service at {url} refuses: {said}")
    (about,) = told["data"]
    sizes = tuple((*map(int, size["size"].split("x")), size["num_frames"]) for size in about["sizes"])
    facts = ModelFacts(
        name=about["id"], needs=about["needs"], fps=about["fps"], steps=about["steps"],
        guidance_scale=about["guidance_scale"], sizes=sizes, any_size=about["any_size"],
        size_step=tuple(about["size_step"]), frame_step=about["frame_step"], fewest_steps=about["fewest_steps"],
        max_batch=about["max_batch"], alone=about["one_at_a_time"] or "", versions=about["versions"],
    )  # fmt: skip
    return Served(url.rstrip("/"), token, facts)


@contextmanager
def opened(url: str | None, token: str, settings: ServiceSettings, *, ray: bool = False) -> Iterator[Served]:
    """The service at an address, which stays after the block; without an address one of these settings, which ends then.

    Raises:
        WanlabError: as `remote` or `served`.
    """
    if url:
        yield remote(url, token)
        return
    with served(settings, ray=ray) as service:
        yield service


def send(
    service: Served,
    bodies: Sequence[Mapping[str, Any]],
    *,
    at_once: int | None = None,
    sent_s: Sequence[float] | None = None,
) -> list[Reply]:
    """Send requests and follow each to its end; what became of them, in the order of `bodies`.

    Args:
        bodies: as `body_of`.
        at_once: callers, each of which sends its next request when its last one has ended.
        sent_s: seconds after the begin at which each request is sent, whatever has become of the others.

    Raises:
        WanlabError: both or none of `at_once` and `sent_s`, or as many times as there are no requests.
    """
    require("httpx", "'wanlab[serve]'")
    if (at_once is None) == (sent_s is None) or (at_once is not None and at_once < 1):
        raise WanlabError("a load has either at_once, a whole number of at least 1, or sent_s")
    if sent_s is not None and len(sent_s) != len(bodies):
        raise WanlabError(f"{len(bodies)} requests have {len(sent_s)} times; give one for each")
    replies: list[Reply] = []
    failed: list[BaseException] = []

    def work() -> None:  # a notebook has an event loop of its own in its thread
        try:
            replies.extend(asyncio.run(_load(service, bodies, at_once, sent_s)))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="wanlab-load", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise WanlabError(f"the load ended early: {first_line(failed[0])}") from failed[0]
    return replies


def arrivals(count: int, per_second: float, seed: int = 0) -> list[float]:
    """Times in seconds at which requests of a Poisson process arrive: gaps are exponential with mean 1 / per_second."""
    gaps = np.random.default_rng(seed).exponential(1 / per_second, count)
    return np.cumsum(gaps).tolist()


def _headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


async def _load(
    service: Served,
    bodies: Sequence[Mapping[str, Any]],
    at_once: int | None,
    sent_s: Sequence[float] | None,
) -> list[Reply]:
    import httpx  # an optional package

    places = asyncio.Semaphore(at_once or len(bodies))
    connections = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=service.url, headers=_headers(service.token), timeout=PATIENCE_S, limits=connections
    ) as client:
        begin = time.perf_counter()

        async def one(index: int, body: Mapping[str, Any]) -> Reply:
            if sent_s is not None:
                await asyncio.sleep(max(0.0, begin + sent_s[index] - time.perf_counter()))
            async with places:
                return await _followed(client, body, begin)

        return list(await asyncio.gather(*(one(index, body) for index, body in enumerate(bodies))))


async def _followed(client: Any, body: Mapping[str, Any], begin: float) -> Reply:
    sent = time.perf_counter()
    accepted = await client.post("/v1/videos", json=body)
    told = accepted.json()
    if accepted.status_code == 200:
        async with client.stream("GET", f"/v1/videos/{told['id']}/events") as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    told = json.loads(line[6:])
    times: dict[str, Any] = {
        "sent_ms": (sent - begin) * 1e3,
        "latency_ms": (time.perf_counter() - sent) * 1e3,
    }
    if accepted.status_code != 200:
        return Reply(
            **times, status="refused", error=told.get("error", {}).get("message", accepted.text[:200])
        )
    if told.get("status") != "completed":
        error = (told.get("error") or {}).get("message") or told.get("message", "")
        return Reply(**times, status=told.get("status", "failed"), error=error)
    result = told["result"]
    parts = {name: result[name] for name in ("encode_ms", "denoise_ms", "decode_ms", "wait_ms", "mean_batch")}
    return Reply(
        **times,
        status="completed",
        queue_wait_ms=told["queue_wait_s"] * 1e3,
        peak_memory_mib=result["peak_memory_mib"],
        **parts,
    )
