"""The HTTP API under /v1: thin routes over ControlPlane. services/runtime/roles.py says who may."""

import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from sapo_learner.errors import ConfigError, Unavailable
from services.control_plane.dashboard.look import look
from services.control_plane.dashboard.routes import add_dashboard
from services.control_plane.plane import ControlPlane
from services.runtime import api
from services.runtime.auth import Tokens
from services.runtime.http import Door
from services.runtime.seldom import Seldom
from services.runtime.stated_length import stated_length

log = logging.getLogger(__name__)
MAX_EVENT_STREAMS = 512


class _Places:
    """Of event streams. A worker that finds none hears of new policies by its heartbeats, a second later."""

    def __init__(self, count: int) -> None:
        self._count, self._taken, self._note = count, 0, Seldom()

    async def __call__(self, request: Request) -> AsyncIterator[None]:
        if self._taken >= self._count:
            if refused := self._note.due():
                log.warning(
                    "%d event streams are open: %d refused, the last of %s", self._taken, refused, request.client
                )
            what = f"{self._count} event streams are open already"
            raise Unavailable(what, where=request.url.path, fix="heartbeats say the same; try again later")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


def add_routes(app: FastAPI, plane: ControlPlane, tokens: Tokens, run: str = "") -> None:
    """run: what every process calls the run in its log; "" where that is not known."""
    app.add_middleware(Door, tokens=tokens)
    router = APIRouter(prefix="/v1")
    _run(router, plane, run)
    _work(router, plane)
    _snapshots(router, plane)
    app.include_router(router)
    add_dashboard(app, tokens, plane.history, plane.groups, partial(look, plane), lambda: plane.closing)


def _run(router: APIRouter, plane: ControlPlane, run: str) -> None:
    @router.get("/config")
    async def config(response: Response) -> dict[str, Any]:
        response.headers[api.RUN_HEADER] = run
        return plane.config.model_dump(mode="json")

    @router.get("/status")
    async def status() -> dict[str, Any]:
        return await plane.status()

    @router.get("/ledger")
    async def ledger() -> dict[str, Any]:
        return await plane.ledger()

    @router.get("/events", response_class=EventSourceResponse, dependencies=[Depends(_Places(MAX_EVENT_STREAMS))])
    async def events() -> AsyncIterator[ServerSentEvent]:
        async for event in plane.events():
            yield ServerSentEvent(event="policy", data=event)


def _work(router: APIRouter, plane: ControlPlane) -> None:
    @router.post("/leases")
    async def lease(body: api.LeaseRequest, request: Request) -> api.LeaseResponse:
        return await plane.lease(body, request.is_disconnected)

    @router.post("/leases/release")
    async def release(body: api.ReleaseRequest) -> dict[str, str]:
        await plane.release(body)
        return {}

    @router.post("/workers/heartbeat")
    async def heartbeat(body: api.Heartbeat) -> api.HeartbeatResponse:
        return await plane.heartbeat(body)

    @router.post("/evaluations/results")
    async def evaluated(body: api.ChunkResult) -> dict[str, str]:
        await plane.evaluated(body)
        return {}

    @router.post("/groups")
    async def trained_group(body: api.ShownGroup) -> dict[str, str]:
        plane.groups.keep(body)
        return {}

    @router.post("/learner")
    async def learner(body: api.LearnerReport) -> dict[str, str]:
        await plane.learner_reports(body)
        return {}


def _snapshots(router: APIRouter, plane: ControlPlane) -> None:
    @router.post("/policies")
    async def publish(body: api.PublishRequest) -> api.PublishResponse:
        return await plane.publish(body)

    @router.get("/policies")
    async def versions() -> dict[int, int]:
        return await plane.policies.versions()

    @router.get("/policies/current")
    async def current() -> dict[str, Any]:
        return (await plane.policies.current()).model_dump(mode="json")

    @router.get("/policies/{version}")
    async def manifest(version: int) -> dict[str, Any]:
        return (await plane.policies.manifest(version)).model_dump(mode="json")

    @router.put("/blobs/{sha256}", status_code=201)
    async def upload(sha256: str, request: Request) -> Response:
        if (length := stated_length(request.headers)) is None:
            raise ConfigError("an upload states its length", where=request.url.path)
        await plane.policies.blobs.put(sha256, request.stream(), length)
        return JSONResponse({}, status_code=201)

    @router.head("/blobs/{sha256}")
    @router.get("/blobs/{sha256}")
    async def download(sha256: str, request: Request, if_none_match: str = Header(default="")) -> Response:
        path = plane.policies.blobs.path(sha256)
        if request.method == "HEAD":
            plane.policies.blobs.keep_a_while(path)
        # The name is the digest of the content, so it is the strong validator, and the content never changes.
        headers = {"ETag": f'"{sha256}"', "Cache-Control": "max-age=31536000, immutable"}
        known = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
        if known & {f'"{sha256}"', "*"}:
            return Response(status_code=304, headers=headers)
        return FileResponse(path, headers=headers, media_type="application/octet-stream")
