"""Live news: made once for all tabs, dropped where nobody reads, nothing at all while nobody looks."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from sapo_learner.errors import Unavailable
from services.control_plane.dashboard import live
from services.control_plane.dashboard.live import BUFFERED, TABS, Broadcaster
from services.runtime import connections
from tests.services.control_plane.test_dashboard_history import line
from tests.shown_group import shown_group
from tests.small_run import TOKEN, Learner, Running, heartbeat

HEADERS = {"Authorization": f"Bearer {TOKEN}"}


class Counting:
    """Messages 0, 1, 2, ..."""

    def __init__(self) -> None:
        self.made, self.begun, self.over, self.broken = 0, 0, False, False
        self.broadcaster = Broadcaster(self._message, self._begin, lambda: self.over)

    def _begin(self) -> None:
        self.begun += 1

    async def _message(self) -> bytes:
        if self.broken:
            raise ValueError("no such figure")
        self.made += 1
        return str(self.made - 1).encode()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "TICK_SECONDS", 0.01)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_every_tab_gets_the_very_same_bytes() -> None:
    counting = Counting()
    one, other = counting.broadcaster.join(), counting.broadcaster.join()
    for _ in range(3):
        assert await one.get() is await other.get()
    assert counting.begun == 1


async def test_nothing_is_made_while_nobody_looks() -> None:
    counting = Counting()
    tab = counting.broadcaster.join()
    await tab.get()
    counting.broadcaster.leave(tab)
    await until(lambda: counting.broadcaster._task is None)
    made = counting.made
    await asyncio.sleep(0.05)
    assert counting.made == made
    await counting.broadcaster.join().get()
    assert counting.begun == 2


async def test_a_tab_that_does_not_read_is_dropped_and_holds_nobody_up() -> None:
    counting = Counting()
    asleep, awake = counting.broadcaster.join(), counting.broadcaster.join()
    for _ in range(BUFFERED + 2):
        assert await awake.get() is not None
    await until(lambda: counting.broadcaster.tabs == 1)
    assert asleep.qsize() <= BUFFERED
    last = [asleep.get_nowait() for _ in range(asleep.qsize())][-1]
    assert last is None


async def test_tabs_are_bounded() -> None:
    counting = Counting()
    tabs = [counting.broadcaster.join() for _ in range(TABS)]
    with pytest.raises(Unavailable, match="pages are open already"):
        counting.broadcaster.join()
    counting.broadcaster.leave(tabs[0])
    counting.broadcaster.join()


async def test_all_end_with_the_process() -> None:
    counting = Counting()
    tab = counting.broadcaster.join()
    await tab.get()
    counting.over = True
    async with asyncio.timeout(5):
        while await tab.get() is not None:
            pass


async def test_a_message_that_cannot_be_made_is_said_and_the_next_page_tries_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counting = Counting()
    counting.broken = True
    assert await counting.broadcaster.join().get() is None
    await until(lambda: "no such figure" in caplog.text)
    counting.broken = False
    assert await counting.broadcaster.join().get() == b"0"


@asynccontextmanager
async def news(running: Running) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    async with (
        httpx.AsyncClient(base_url=running.url, headers=HEADERS, timeout=10) as http,
        http.stream("GET", "/v1/live") as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")

        async def messages() -> AsyncIterator[dict[str, Any]]:
            async for each in response.aiter_lines():
                if each.startswith("data: "):
                    yield json.loads(each.removeprefix("data: "))

        yield messages()


async def find(stream: AsyncIterator[dict[str, Any]], condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    async with asyncio.timeout(15):
        async for message in stream:
            if condition(message):
                return message
    raise AssertionError("the stream ended")


async def test_a_page_hears_of_steps_workers_and_groups(running: Running, learner: Learner) -> None:
    await learner.report("training", 1, record=line(1))
    async with news(running) as stream:
        first = await find(stream, lambda _: True)
        assert "steps" not in first, "what was there before the page is in its history"
        assert first["now"]["state"] == "training"
        await learner.report("training", 2, record=line(2))
        steps = (await find(stream, lambda each: "steps" in each))["steps"]
        assert (steps["from"], steps["x"]) == (0, [1, 2])
        await running.client.heartbeat(heartbeat("a", tokens=5))
        message = await find(stream, lambda each: each["now"]["workers"])
        assert message["now"]["workers"][0]["worker"] == "a"
        running.plane.groups.keep(shown_group("1-2"))
        assert (await find(stream, lambda each: "groups" in each))["groups"][0]["entry"] == "1-2"
        assert message["now"]["ledger"]["balanced"]


async def test_the_stream_ends_when_the_process_closes(running: Running) -> None:
    async with news(running) as stream:
        await find(stream, lambda _: True)
        await running.plane.close()
        async with asyncio.timeout(5):
            async for _ in stream:
                pass


async def test_a_tab_that_stops_reading_loses_its_connection(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its buffers fill; then the server hangs up, rather than hold what nobody will ever read."""
    monkeypatch.setattr(connections, "TAKE_SECONDS", 0.2)
    host, port = running.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    writer.write(f"GET /v1/live HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
    await reader.readline()
    for number in range(120):  # more than the kernel's buffers take
        running.plane.record.add("step", step=number + 1, rewards={})
        running.plane.history.histograms = {"step": number, "padding": "x" * 400_000}
        await asyncio.sleep(0.01)
    await until(lambda: "1 connections ended: nothing was read" in caplog.text)
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(10):
            while await reader.read(1 << 20):
                pass
    writer.close()
