"""Browsers and Prometheus that stopped reading: the run goes on beside them, and ends beside them."""

import asyncio
import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import uvicorn
from fastapi import FastAPI, Response

from services.control_plane.record import read
from services.runstore import EmbeddedRedis
from services.runtime import connections, http
from services.runtime.http import serving
from services.runtime.seldom import Seldom
from services.runtime.settings import RunConfig
from services.runtime.tls import Tls
from tests.certificates import Certificates
from tests.small_run import TOKEN, Learner, control_plane

REQUESTS = 200  # on one connection, whose answers are more than all buffers on the way hold


@pytest.fixture
def buffered() -> int:
    return 4096


@pytest.fixture(autouse=True)
def little_is_buffered(monkeypatch: pytest.MonkeyPatch, buffered: int) -> None:
    bind = http._bind

    def bound(address: str) -> socket.socket:
        listener = bind(address)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffered)  # connections inherit it
        return listener

    monkeypatch.setattr(http, "_bind", bound)


async def _asked(url: str, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has asked for more than it will read."""
    address = urlsplit(url)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, (address.hostname, address.port))
    reader, writer = await asyncio.open_connection(sock=client, limit=1)
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    writer.write(request.encode() * REQUESTS)
    return reader, writer


@pytest.mark.parametrize("path", ["/metrics", "/v1/events", "/v1/status"])
async def test_the_run_goes_on_and_ends_beside_viewers_that_do_not_read(
    config: RunConfig, redis: EmbeddedRedis, path: str
) -> None:
    async with asyncio.timeout(60):
        async with control_plane(config, redis.url) as running:
            learner = await Learner(running).start()
            viewers = [(await _asked(running.url, path))[1] for _ in range(8)]
            for step in range(1, 21):
                await learner.report("training", step=step, record={"kind": "step", "step": step})
            assert (await running.client.status())["last_step"]["step"] == 20
    steps = [line["step"] for line in read(config.run.directory / "record.jsonl") if line["kind"] == "step"]
    assert steps == list(range(1, 21))
    for viewer in viewers:
        viewer.close()


@pytest.mark.parametrize("path", ["/metrics", "/v1/status"])
async def test_who_reads_nothing_loses_the_connection(
    config: RunConfig,
    redis: EmbeddedRedis,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(connections, "TAKE_SECONDS", 0.3)
    monkeypatch.setattr(connections, "_unread_note", Seldom(3600))
    async with control_plane(config, redis.url) as running, asyncio.timeout(30):
        await Learner(running).start()
        _, viewer = await _asked(running.url, path)
        while "1 connections ended: nothing was read for 0.3 s" not in caplog.text:
            await asyncio.sleep(0.01)
        viewer.close()


@pytest.mark.parametrize("buffered", [1 << 18])
async def test_who_reads_slowly_keeps_the_connection(
    config: RunConfig,
    redis: EmbeddedRedis,
    buffered: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also where the buffers on the way empty much more slowly than it is looked at."""
    monkeypatch.setattr(connections, "TAKE_SECONDS", 2.0)
    async with control_plane(config, redis.url) as running, asyncio.timeout(60):
        await Learner(running).start()
        reader, writer = await _asked(running.url, "/metrics")
        for _ in range(20):
            assert await reader.read(4000)
            await asyncio.sleep(0.2)
        assert "nothing was read" not in caplog.text
        writer.close()


async def test_an_answer_that_is_taken_slowly_is_not_cut_by_the_end_of_an_idle_connection(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Under TLS, where closing a connection does not wait for what is still on its way."""
    made = Certificates(tmp_path)
    large = bytes(8 << 20)
    app = FastAPI()

    @app.get("/")
    async def answer() -> Response:
        return Response(large)

    config = uvicorn.Config
    monkeypatch.setattr(http.uvicorn, "Config", lambda *given, **named: config(*given, **named, timeout_keep_alive=2))
    tls = Tls(*made.pair("server"))
    async with serving(app, "127.0.0.1:0", tls) as url, asyncio.timeout(60):
        host, port = url.removeprefix("https://").split(":")
        context = ssl.create_default_context(cafile=made.ca)
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context, limit=1 << 16)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        received = 0
        while received < len(large):
            piece = await reader.read(1 << 20)
            assert piece, f"cut after {received} bytes"
            received += len(piece)
            await asyncio.sleep(0.05)
        writer.close()
