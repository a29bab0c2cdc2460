"""The page, and what it asks under /v1: history, live news, groups."""

from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import FileResponse

from services.control_plane.dashboard.live import Broadcaster, EventStream
from services.control_plane.dashboard.look import look
from services.control_plane.dashboard.news import News
from services.control_plane.dashboard.pages import Pages
from services.control_plane.plane import ControlPlane
from services.runtime import api

PRIVATE = {"Cache-Control": "no-store"}


def add_dashboard(app: FastAPI, plane: ControlPlane, token: str) -> None:
    Pages(token).add_to(app)
    news = News(plane.history, plane.groups, partial(look, plane))
    broadcaster = Broadcaster(news.message, news.begin, lambda: plane.closing)
    router = APIRouter(prefix="/v1")

    @router.get("/history")
    async def history() -> Response:
        return Response(news.everything(), media_type="application/json", headers=PRIVATE)

    @router.get("/live")
    async def live() -> Response:
        return EventStream(broadcaster)

    @router.post("/groups")
    async def keep(body: api.ShownGroup) -> dict[str, str]:
        plane.groups.keep(body)
        return {}

    @router.get("/groups")
    async def groups() -> list[dict[str, Any]]:
        return plane.groups.rows()

    @router.get("/groups/{entry}")
    async def group(entry: str) -> Response:
        return FileResponse(plane.groups.file(entry), media_type="application/json", headers=PRIVATE)

    app.include_router(router)
