"""The page, and what it asks under /v1: history, live news, groups. Nothing here changes anything."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import FileResponse

from services.control_plane.dashboard.groups import KeptGroups
from services.control_plane.dashboard.history import History
from services.control_plane.dashboard.live import Broadcaster, EventStream
from services.control_plane.dashboard.news import Look, News
from services.control_plane.dashboard.pages import Pages
from services.runtime.auth import Tokens

PRIVATE = {"Cache-Control": "no-store"}


def add_dashboard(
    app: FastAPI, tokens: Tokens, history: History, groups: KeptGroups, look: Look, closing: Callable[[], bool]
) -> None:
    """look: what the page shows of the moment. closing: whether the process stops. `Door` guards what is under /v1."""
    Pages(tokens).add_to(app)
    news = News(history, groups, look)
    broadcaster = Broadcaster(news.message, news.begin, closing)
    router = APIRouter(prefix="/v1")

    @router.get("/history")
    async def everything() -> Response:
        return Response(news.everything(), media_type="application/json", headers=PRIVATE)

    @router.get("/live")
    async def live() -> Response:
        return EventStream(broadcaster)

    @router.get("/groups")
    async def rows() -> list[dict[str, Any]]:
        return groups.rows()

    @router.get("/groups/{entry}")
    async def group(entry: str) -> Response:
        return FileResponse(groups.file(entry), media_type="application/json", headers=PRIVATE)

    app.include_router(router)
