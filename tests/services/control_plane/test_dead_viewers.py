"""Browsers and Prometheus that stopped reading: the run goes on beside them, and ends beside them."""

import asyncio
import socket
from urllib.parse import urlsplit

import pytest

from services.control_plane.record import read
from services.runstore import EmbeddedRedis
from services.runtime import http
from services.runtime.seldom import Seldom
from services.runtime.settings import RunConfig
from tests.small_run import TOKEN, Learner, control_plane

REQUESTS = 200  # on one connection, whose answers are more than all buffers on the way hold


@pytest.fixture(autouse=True)
def little_is_buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    bind = http._bind

    def bound(address: str) -> socket.socket:
        listener = bind(address)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        return listener

    monkeypatch.setattr(http, "_bind", bound)


async def _unread(url: str, path: str) -> asyncio.StreamWriter:
    """A connection that has asked for more than it will ever read."""
    address = urlsplit(url)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, (address.hostname, address.port))
    _, writer = await asyncio.open_connection(sock=client, limit=1)
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    writer.write(request.encode() * REQUESTS)
    return writer


@pytest.mark.parametrize("path", ["/metrics", "/v1/events", "/v1/status"])
async def test_the_run_goes_on_and_ends_beside_viewers_that_do_not_read(
    config: RunConfig, redis: EmbeddedRedis, path: str
) -> None:
    async with asyncio.timeout(60):
        async with control_plane(config, redis.url) as running:
            learner = await Learner(running).start()
            viewers = [await _unread(running.url, path) for _ in range(8)]
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
    monkeypatch.setattr(http, "TAKE_SECONDS", 0.3)
    monkeypatch.setattr(http, "_unread_note", Seldom(3600))
    async with control_plane(config, redis.url) as running, asyncio.timeout(30):
        await Learner(running).start()
        viewer = await _unread(running.url, path)
        while "1 connections ended: nothing was read for 0.3 s" not in caplog.text:
            await asyncio.sleep(0.01)
        viewer.close()
