"""A thousand clients of the control plane that want nothing, or too much: bounded, said, and the run goes on."""

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from services.control_plane import routes
from services.runtime import connections
from services.runtime.http import parse_address
from services.runtime.seldom import Seldom, SeldomWarnings
from tests.descriptors import require_many
from tests.small_run import TOKEN, Learner, Running, heartbeat, lease_request

THOUSAND = 1000
Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Crowd:
    """Clients that connect and write the same first bytes."""

    def __init__(self, address: str) -> None:
        self._host, self._port = parse_address(address, where="test")
        self.lines: list[Line] = []

    async def gather(self, count: int, first: str) -> None:
        async with asyncio.timeout(60):
            for _ in range(count):
                self.lines.append(line := await asyncio.open_connection(self._host, self._port))
                line[1].write(first.encode())

    async def open(self, most: int) -> list[Line]:
        """Those whose connection the server has not ended; waits until they are at most so many."""
        async with asyncio.timeout(30):
            while len(still := [line for line in self.lines if not _ended(line[0])]) > most:
                await asyncio.sleep(0.01)
        return still


def _ended(reader: asyncio.StreamReader) -> bool:
    return reader.at_eof() or reader.exception() is not None


@pytest_asyncio.fixture
async def crowd(running: Running) -> AsyncIterator[Crowd]:
    require_many()
    crowd = Crowd(running.url.removeprefix("http://"))
    yield crowd
    for _, writer in crowd.lines:
        writer.transport.abort()


async def goes_on(running: Running) -> None:
    """A worker beside them is served."""
    async with asyncio.timeout(20):
        await running.client.heartbeat(heartbeat())
        assert (await running.client.lease(lease_request())).draws


async def test_connections_that_ask_nothing_make_room_for_those_that_ask(
    running: Running, learner: Learner, crowd: Crowd, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "_note", Seldom(3600))
    await crowd.gather(THOUSAND, "GET /v1/status HT")
    await goes_on(running)
    still = await crowd.open(connections.MAX_STRANGERS)
    assert still == crowd.lines[-len(still) :], "the oldest go first"
    said = [record.message for record in caplog.records if "ask nothing" in record.message]
    assert len(said) == 1, "however many there are"
    assert f"more than {connections.MAX_STRANGERS} connections that ask nothing: 1 closed" in said[0]


async def test_a_client_that_asks_in_time_stays_however_many_come_after_it(
    running: Running, crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_STRANGERS", 3)
    await crowd.gather(1, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(10):
        assert await crowd.lines[0][0].readuntil(b'"alive"}')
    await crowd.gather(10, "")
    await crowd.open(4)
    crowd.lines[0][1].write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(10):
        assert await crowd.lines[0][0].readuntil(b'"alive"}')


@pytest.mark.parametrize(
    ("request_head", "says"),
    [
        (
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
            "Unsupported upgrade request.",
        ),
        ("\x16\x03\x01\r\n\r\n", "Invalid HTTP request received."),
    ],
)
async def test_what_the_server_itself_says_of_strangers_does_not_fill_the_log(
    running: Running, crowd: Crowd, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    request_head: str, says: str,
) -> None:  # fmt: skip
    (seldom,) = (each for each in logging.getLogger("uvicorn.error").filters if isinstance(each, SeldomWarnings))
    monkeypatch.setattr(seldom, "_notes", {})
    await crowd.gather(20, request_head)
    async with asyncio.timeout(10):
        for reader, _ in crowd.lines:
            assert await reader.readline()
    assert [message for message in caplog.messages if says in message] == [says]


async def test_event_streams_are_bounded_and_the_run_goes_on(
    running: Running, learner: Learner, crowd: Crowd, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await crowd.gather(THOUSAND, f"GET /v1/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n")
    async with asyncio.timeout(60):
        statuses = [int((await reader.readline()).split()[1]) for reader, _ in crowd.lines]
    assert statuses.count(200) == routes.MAX_EVENT_STREAMS
    assert statuses.count(503) == THOUSAND - routes.MAX_EVENT_STREAMS
    assert [record.message for record in caplog.records if "event streams are open" in record.message]
    await goes_on(running)


@pytest.fixture
def one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_EVENT_STREAMS", 1)


async def test_the_place_of_an_event_stream_that_ended_is_free_again(
    one_place: None, running: Running, learner: Learner, crowd: Crowd
) -> None:
    ask = f"GET /v1/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    async with asyncio.timeout(20):
        for _ in range(3):
            status = 503
            while status != 200:
                await crowd.gather(1, ask)
                status = int((await crowd.lines[-1][0].readline()).split()[1])
            crowd.lines[-1][1].transport.abort()
