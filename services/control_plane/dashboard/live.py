"""One broadcaster for all tabs: each message is made and serialised once, whoever does not read it is dropped.

While no tab is open nothing is done.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sapo_learner.errors import Unavailable

log = logging.getLogger(__name__)
TICK_SECONDS = 2.0
TABS = 200
BUFFERED = 16  # messages that a tab may lie behind
QUIET_SECONDS = 15.0  # after which a comment shows proxies and the tab that somebody is there

Tab = asyncio.Queue[bytes | None]  # None: the end


class Broadcaster:
    def __init__(
        self, message: Callable[[], Awaitable[bytes]], begin: Callable[[], None], closing: Callable[[], bool]
    ) -> None:
        """message: the next one. begin: called before the first of a new series. closing: whether it is all over."""
        self._message, self._begin, self._closing = message, begin, closing
        self._tabs: set[Tab] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def tabs(self) -> int:
        return len(self._tabs)

    def join(self) -> Tab:
        """A tab's messages from now on. Raises Unavailable."""
        if len(self._tabs) >= TABS:
            fix = "close one, then load this page again"
            raise Unavailable(f"{TABS} pages are open already", where="dashboard", fix=fix)
        tab: Tab = asyncio.Queue(BUFFERED)
        self._tabs.add(tab)
        if self._task is None:
            self._begin()
            self._task = asyncio.create_task(self._broadcast(), name="dashboard")
            self._task.add_done_callback(_say_why)
        return tab

    def leave(self, tab: Tab) -> None:
        self._tabs.discard(tab)

    async def _broadcast(self) -> None:
        try:
            while self._tabs and not self._closing():
                message = await self._message()
                for tab in [*self._tabs]:
                    self._give(tab, message)
                await asyncio.sleep(TICK_SECONDS)
        finally:
            for tab in self._tabs:
                _end(tab)
            self._tabs, self._task = set(), None

    def _give(self, tab: Tab, message: bytes) -> None:
        try:
            tab.put_nowait(message)
        except asyncio.QueueFull:
            log.info("dashboard: a page that does not read its messages is dropped")
            self._tabs.discard(tab)
            _end(tab)


def _say_why(task: "asyncio.Task[None]") -> None:
    """A view that cannot be made is no reason to stop a run: it is said, and pages that come back try again."""
    if not task.cancelled() and (error := task.exception()):
        log.error("dashboard: %s: %s", type(error).__name__, error, exc_info=error)


def _end(tab: Tab) -> None:
    if tab.full():
        tab.get_nowait()
    tab.put_nowait(None)


class EventStream(Response):
    """Server-sent events of one tab until it leaves, or the server has ended its connection."""

    media_type = "text/event-stream"

    def __init__(self, broadcaster: Broadcaster) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._broadcaster, self._tab = broadcaster, broadcaster.join()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = asyncio.create_task(_until_left(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send(_body(b"retry: 2000\n\n"))
            while (text := await self._next(left)) is not None:
                await send(_body(text))
            if not left.done():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            left.cancel()
            self._broadcaster.leave(self._tab)

    async def _next(self, left: "asyncio.Task[None]") -> bytes | None:
        """The tab's next event as it goes over the wire, None at the end."""
        waiting = asyncio.ensure_future(self._tab.get())
        try:
            done, _ = await asyncio.wait([waiting, left], timeout=QUIET_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not waiting.done():
                waiting.cancel()
        if left in done:
            return None
        if waiting not in done:
            return b": still here\n\n"
        message = waiting.result()
        return None if message is None else b"event: news\ndata: " + message + b"\n\n"


def _body(content: bytes) -> dict[str, object]:
    return {"type": "http.response.body", "body": content, "more_body": True}


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
