"""The HTTP side of a service: the paths of OpenAI's video API, progress as server-sent events, a page, and metrics."""

from __future__ import annotations

import contextlib
import hmac
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from wanlab.core.errors import first_line
from wanlab.serve.jobs import COMPLETED, ENDED, Job
from wanlab.serve.requests import OUTPUTS, PICTURE, Refused, idempotency_key, json_fields
from wanlab.serve.service import Service

PAGE = Path(__file__).parent / "page.html"
MAX_FIELDS = 30
# What is sent by anyone is never a page of this address; the page itself loads nothing from elsewhere.
SAFE = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; media-src blob:;"
    " connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def make_app(service: Service) -> FastAPI:
    """The application of a service, which begins and ends with it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="wanlab",
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    token = service.settings.token

    def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(given.encode("latin-1", "replace"), f"Bearer {token}".encode()):
            challenge = {"WWW-Authenticate": "Bearer"}
            raise Refused(
                "give the token of this service as Authorization: Bearer", 401, "unauthorized", challenge
            )

    guarded = [Depends(allowed)]

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        service.metrics.refused.labels(error.code).inc()
        return _error(error.message, int(error.status), error.code, error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        words = {404: f"no path {request.url.path[:80]!r}", 405: f"{request.method[:20]} is not allowed here"}
        return _error(
            words.get(error.status_code, str(error.detail)),
            error.status_code,
            "http",
            dict(error.headers or {}),
        )

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> JSONResponse:
        return _error(f"a fault of the service: {type(error).__name__}", 500, "internal", {})

    @app.post("/v1/videos", dependencies=guarded)
    async def create(request: Request) -> JSONResponse:
        key = idempotency_key(request.headers.get("idempotency-key"))
        fields = await _fields(request, int(service.settings.max_body_mib * 2**20))
        job, new = await service.submit(fields, key)
        return _told(service, job, headers={} if new else {"Idempotent-Replay": "true"})

    @app.get("/v1/videos", dependencies=guarded)
    async def listed() -> JSONResponse:
        jobs = service.store.listed(limit=100)
        return JSONResponse(
            {"object": "list", "data": [service.view(service.get(job.id)) for job in jobs]}, headers=SAFE
        )

    @app.get("/v1/videos/{identity}", dependencies=guarded)
    async def get(identity: str) -> JSONResponse:
        return _told(service, service.get(identity))

    @app.delete("/v1/videos/{identity}", dependencies=guarded)
    async def delete(identity: str) -> JSONResponse:
        job = service.cancel(identity)
        return JSONResponse(
            {"id": job.id, "object": "video.deleted", "deleted": True, "status": job.status}, headers=SAFE
        )

    @app.get("/v1/videos/{identity}/content", dependencies=guarded)
    async def content(identity: str) -> Response:
        return _content(service, identity)

    @app.get("/v1/videos/{identity}/events", dependencies=guarded)
    async def events(identity: str) -> StreamingResponse:
        service.get(identity)
        return StreamingResponse(_lines(service, identity), media_type="text/event-stream", headers=SAFE)

    @app.get("/v1/models", dependencies=guarded)
    async def listed_models() -> JSONResponse:
        facts = service.facts
        if facts is None:
            raise Refused(
                service.fault or "the model is being loaded; ask again soon",
                503,
                "not_ready",
                {"Retry-After": "5"},
            )
        about = {
            "id": facts.name, "object": "model", "owned_by": "wanlab", "created": 0, "needs": facts.needs, "fps": facts.fps,
            "steps": facts.steps, "guidance_scale": facts.guidance_scale, "any_size": facts.any_size,
            "sizes": [{"size": f"{w}x{h}", "num_frames": f} for w, h, f in facts.sizes],
            "size_step": facts.size_step, "frame_step": facts.frame_step, "fewest_steps": facts.fewest_steps,
            "max_batch": facts.max_batch, "one_at_a_time": facts.alone or None, "versions": facts.versions,
        }  # fmt: skip
        return JSONResponse({"object": "list", "data": [about]}, headers=SAFE)

    @app.get("/healthz")
    async def health() -> JSONResponse:
        state = "ready" if service.ready else "failed" if service.fault else "loading"
        told = {"status": state} | ({"reason": service.fault} if service.fault else {})
        return JSONResponse(told, status_code=200 if service.ready else 503, headers=SAFE)

    @app.get("/metrics", dependencies=guarded)
    async def metrics() -> Response:
        text, kind = service.metrics.text()
        return Response(text, media_type=kind, headers=SAFE)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text("utf-8"), headers=SAFE | {"Content-Security-Policy": PAGE_POLICY})

    return app


def _error(message: str, status: int, code: str, headers: dict[str, str]) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "code": code}}
    return JSONResponse(body, status_code=status, headers=SAFE | headers)


def _told(service: Service, job: Job, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(service.view(job), headers=SAFE | (headers or {}))


def _content(service: Service, identity: str) -> Response:
    job = service.get(identity)
    if job.status in ENDED and job.status != COMPLETED:
        raise Refused(f"video {job.id} was not made: {job.error}", 409, job.status)
    if job.status != COMPLETED:
        raise Refused(f"video {job.id} is {job.status}; ask again when it is completed", 409, "not_completed")
    kind = job.request["output_format"]
    path = service.store.video(job.id, f".{kind}")
    if job.removed or not path.is_file():
        raise Refused(
            f"the file of video {job.id} was removed to make room; send the request again", 410, "removed"
        )
    versions = (
        {"X-Wanlab-Configuration": service.facts.versions["configuration_hash"]} if service.facts else {}
    )
    return FileResponse(path, media_type=OUTPUTS[kind], filename=path.name, headers=SAFE | versions)


async def _lines(service: Service, identity: str) -> AsyncIterator[str]:
    try:
        async for view in service.changes(identity):
            yield f"event: {view['status']}\ndata: {json.dumps(view)}\n\n"
    except Refused as error:  # it was deleted meanwhile
        yield f"event: error\ndata: {json.dumps({'message': error.message})}\n\n"


async def _fields(request: Request, most: int) -> dict[str, Any]:
    """The fields of a request, whose body is read up to `most` bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise Refused(
            f"content type {kind[:60]!r} is not read; send JSON or multipart/form-data", 415, "media_type"
        )
    bounded = Request(request.scope, _bounded(request.receive, most))
    if kind == "application/json":
        return json_fields(await bounded.body())
    try:
        async with bounded.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=most) as form:
            pairs = []
            for name, value in form.multi_items():
                if isinstance(value, UploadFile) and name != PICTURE:
                    raise Refused(f"{name[:80]!r} is a file; only {PICTURE} is one")
                pairs.append((name, await value.read() if isinstance(value, UploadFile) else value))
            return _unique(pairs)
    except (HTTPException, ValueError, LookupError) as error:  # what python-multipart raises is open-ended
        said = getattr(error, "detail", first_line(error, 80))
        raise Refused(f"the form cannot be read ({said}); send it with a boundary") from error


def _bounded(receive: Receive, most: int) -> Receive:
    """`receive` of a request that may have so many bytes of body."""
    left = most

    async def limited() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise Refused(
                f"the request is larger than {most / 2**20:g} MiB; make the picture smaller", 413, "too_large"
            )
        return message

    return limited


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise Refused("the form names a field twice; name each once")
    return fields
