"""Peers that connect and stop in the middle: they cost nothing for long, and nobody else notices."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.control_plane.dashboard import pages
from services.runtime import connections
from services.runtime import http as http_module
from services.runtime.http import parse_address
from tests.small_run import TOKEN, Learner, Running

AUTHORIZED = f"Authorization: Bearer {TOKEN}\r\n"
HALVES = {
    "nothing": "",
    "half a head": "POST /v1/leases HTTP/1.1\r\nHos",
    "half a body": f"POST /v1/leases HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}Content-Length: 100\r\n\r\n{{",
    "half an upload": f"PUT /v1/blobs/{'0' * 64} HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}Content-Length: 100\r\n\r\nabc",
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(http_module, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(pages, "FORM_SECONDS", 0.2)


@pytest_asyncio.fixture
async def half(short: None, running: Running, request: pytest.FixtureRequest) -> AsyncIterator[asyncio.StreamReader]:
    host, port = parse_address(running.url.removeprefix("http://"), where="test")
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(HALVES[request.param].encode())
    await writer.drain()
    yield reader
    writer.close()


@pytest.mark.parametrize("half", HALVES, indirect=True)
async def test_a_request_that_never_gets_whole_ends(
    half: asyncio.StreamReader, running: Running, learner: Learner, tmp_path: Path
) -> None:
    async with asyncio.timeout(10):
        while await half.read(1 << 12):
            pass  # an answer that says so, or none; and then the end
    assert not list(tmp_path.rglob("*.upload"))
    assert (await running.client.status())["run"] == running.config.run.name


async def connected(running: Running) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = parse_address(running.url.removeprefix("http://"), where="test")
    return await asyncio.open_connection(host, port)


@pytest.mark.usefixtures("short")
async def test_so_does_the_second_request_of_a_connection(running: Running) -> None:
    reader, writer = await connected(running)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(10):
        assert await reader.readuntil(b'"alive"}')
        writer.write(b"GET /healthz HTTP/1.1\r\nHo")
        assert await reader.read() == b""
    writer.close()


@pytest.mark.usefixtures("short")
async def test_a_second_request_in_time_is_answered(running: Running) -> None:
    reader, writer = await connected(running)
    async with asyncio.timeout(10):
        for _ in range(3):
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await reader.readuntil(b'"alive"}')
            await asyncio.sleep(0.15)  # three together are longer than one head may take
    writer.close()


@pytest.mark.usefixtures("short")
async def test_a_login_that_comes_drop_by_drop_ends(running: Running) -> None:
    reader, writer = await connected(running)
    writer.write(b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n")
    async with asyncio.timeout(10):
        answer = asyncio.create_task(reader.readline())
        while not answer.done():
            writer.write(b"x")
            await asyncio.wait([answer], timeout=0.05)
        assert answer.result().startswith(b"HTTP/1.1 4")
    writer.close()
