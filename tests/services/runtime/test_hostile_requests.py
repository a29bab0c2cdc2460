"""Requests that nobody of ours would send: each ends with a sentence or the connection, and costs nothing for long."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import quote

import httpx
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.types import Message

from services.runtime import connections
from services.runtime import http as http_module
from services.runtime.api import MAX_DEPTH
from services.runtime.http import parse_address
from tests.small_run import TOKEN, Learner, Running

AUTHORIZED = f"Authorization: Bearer {TOKEN}\r\n"
BODIES = (
    "/v1/leases", "/v1/leases/release", "/v1/workers/heartbeat", "/v1/evaluations/results", "/v1/groups", "/v1/learner",
    "/v1/policies",
)  # fmt: skip


@pytest_asyncio.fixture
async def http(running: Running) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=running.url, headers=headers) as client:
        yield client


async def raw(running: Running, request: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = parse_address(running.url.removeprefix("http://"), where="test")
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request.encode("latin-1"))
    return reader, writer


# ---- bodies


async def test_a_deeply_nested_body_is_refused(http: httpx.AsyncClient) -> None:
    """Outermost, and where anything may stand: a step's record, a policy's manifest."""
    for path, depth, kind in product(BODIES, (MAX_DEPTH, 500, 900, 990, 1100, 100_000), ("[]", '{"a":}')):
        nested = kind[:-1] * depth + ("1" if kind != "[]" else "") + kind[-1] * depth
        for body in (nested, f'{{"record": {nested}, "manifest": {nested}}}'):
            response = await http.post(path, content=body)
            assert response.status_code in (400, 422), (path, depth, response.text[:300])
            assert set(response.json()["error"]) == {"kind", "code", "what", "where", "fix"}


async def test_a_body_that_is_no_object_is_refused(http: httpx.AsyncClient) -> None:
    for path, body in product(BODIES, ("-633", "null", "true", '"x"', "[]", "[{}]", "1e999", "NaN", "", "{]", "\0")):
        response = await http.post(path, content=body)
        assert response.status_code in (400, 422), (path, body, response.text[:300])


async def test_a_record_as_deep_as_is_allowed_is_kept(
    running: Running, learner: Learner, http: httpx.AsyncClient
) -> None:
    depth = MAX_DEPTH - 2  # behind the body and the record
    for deeper, status in ((0, 200), (1, 422)):
        nested = json.loads("[" * (depth + deeper) + "]" * (depth + deeper))
        body = {"state": "training", "step": 1, "cursor": 0, "ledger": {}, "record": {"kind": "step", "odd": nested}}
        response = await http.post("/v1/learner", content=json.dumps(body))
        assert response.status_code == status, response.text
    assert "nested deeper than 32" in response.text
    assert (await running.client.status())["run"] == running.config.run.name


# ---- drop by drop


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(http_module, "BODY_SECONDS", 0.5)


DROPS = {
    "a head": "GET /v1/status HTTP/1.1\r\nHost: x\r\nX: ",
    "a body": f"POST /v1/leases HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}Content-Length: 9999\r\n\r\n",
    "an upload": f"PUT /v1/blobs/{'0' * 64} HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}Content-Length: 9999\r\n\r\n",
}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("part", DROPS)
async def test_what_comes_drop_by_drop_ends(running: Running, part: str, tmp_path: Path) -> None:
    reader, writer = await raw(running, DROPS[part])
    async with asyncio.timeout(20):
        end = asyncio.create_task(reader.read())
        while not end.done():
            writer.write(b"x")
            await asyncio.wait([end], timeout=0.05)  # ten drops in the time of one
    writer.close()
    assert not list(tmp_path.rglob("*.upload"))


@pytest.mark.parametrize(("piece", "pieces"), [(1, 6), (4096 * 10, 1000)])
async def test_a_body_that_keeps_its_pace_may_take_long(
    monkeypatch: pytest.MonkeyPatch, piece: int, pieces: int
) -> None:
    """Ten seconds from piece to piece: drops are over after the first minute, at 4 KiB/s nothing is."""
    clock = count(step=10)
    monkeypatch.setattr(http_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    async def receive() -> Message:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"x" * piece, "more_body": True}

    bounded = http_module._unstalled(receive)
    came = 0
    while came < 1000 and (await bounded())["type"] == "http.request":
        came += 1
    assert came == pytest.approx(pieces, abs=1)


# ---- uploads


async def test_an_upload_states_a_length_that_the_disk_has_room_for(
    running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=1 << 30))
    put = f"PUT /v1/blobs/{'0' * 64} HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}"
    for header, status, said in (
        (f"Content-Length: {1 << 40}\r\n", b"503", "1099511627776 bytes do not fit into the 1073741824 that are free"),
        ("Transfer-Encoding: chunked\r\n", b"422", "an upload states its length"),
        ("Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", b"422", "an upload states its length"),
    ):
        reader, writer = await raw(running, f"{put}{header}\r\n")  # and not a byte of it
        async with asyncio.timeout(10):
            assert status in await reader.readline()
            assert said in (await reader.readuntil(b"}}")).decode()
        writer.close()
    assert not list(tmp_path.rglob("*.upload"))


async def test_a_login_of_a_stated_length_is_no_longer_than_that(running: Running) -> None:
    """Beside `chunked` a stated length bounds nothing, and whoever logs in has no token yet."""
    head = "POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    reader, writer = await raw(running, head)  # and not a byte of it
    async with asyncio.timeout(5):
        assert b"422" in await reader.readline()
    writer.close()


# ---- names that are paths

_PIECES = st.sampled_from(
    ["..", ".", "/", "\\", "%2e%2e", "%2f", "%5c", "%00", "~", "run.yaml", "staged", "blobs", "manifests", "facts.json",
     "00000000.json", "1-1", "0" * 64, "é", "\t", "%0a", ";", "?", "#", "*"]
)  # fmt: skip
_NAMES = st.lists(_PIECES, min_size=1, max_size=8).map("".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(name="../../staged-config.json", route="blobs", encoded=False)
@example(name="../../staged-config.json", route="blobs", encoded=True)
@example(name="../staged-config", route="groups", encoded=True)
@given(name=_NAMES, route=st.sampled_from(["blobs", "groups", "policies"]), encoded=st.booleans())
async def test_no_name_leads_out_of_its_directory(
    running: Running, learner: Learner, tmp_path: Path, name: str, route: str, encoded: bool
) -> None:
    """As it is in a request line, and percent-encoded; what such a file holds is never in the answer."""
    secret = tmp_path / "staged-config.json"
    secret.write_text("the secret")
    path = f"/v1/{route}/{quote(name, safe='') if encoded else name.replace('#', '').replace(chr(9), '')}"
    before = _files(tmp_path)
    for method in ("GET", "PUT"):
        reader, writer = await raw(
            running,
            f"{method} {path} HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}Connection: close\r\nContent-Length: 2\r\n\r\n{{}}",
        )
        async with asyncio.timeout(10):
            answer = await reader.read()
        writer.close()
        assert b"the secret" not in answer
        assert not answer.startswith(b"HTTP/1.1 5"), answer
        assert method == "GET" or not answer.startswith(b"HTTP/1.1 2"), answer
    assert _files(tmp_path) == before


def _files(directory: Path) -> set[Path]:
    return {*directory.rglob("*"), *directory.parent.iterdir()}


# ---- what browsers make of answers


async def test_no_answer_is_anything_but_what_it_says(running: Running, http: httpx.AsyncClient) -> None:
    for path in ("/", "/healthz", "/metrics", "/static/style.css", "/v1/status", "/v1/confg", "/v1/policies/x", "/v2"):
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            response = await http.get(path, headers=headers)
            assert response.headers.get_list("X-Content-Type-Options") == ["nosniff"], path
