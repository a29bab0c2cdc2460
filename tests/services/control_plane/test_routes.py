"""The HTTP API against a running server: who may ask, what errors look like, blobs by range, events."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from sapo_learner.errors import ConfigError, Mismatch, Unauthenticated
from services.runtime.client import ControlPlaneClient
from services.runtime.http import MAX_BODY_BYTES
from services.runtime.settings import RunConfig
from tests.small_run import TOKEN, Learner, Running, heartbeat, lease_request, sha256

CONTENT = bytes(range(256)) * 40
NAME = sha256(CONTENT)
TAG = f'"{NAME}"'


@pytest_asyncio.fixture
async def http(running: Running) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=running.url, headers=headers) as client:
        yield client


@pytest_asyncio.fixture
async def blob(http: httpx.AsyncClient) -> str:
    assert (await http.put(f"/v1/blobs/{NAME}", content=CONTENT)).status_code == 201
    return f"/v1/blobs/{NAME}"


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"kind", "code", "what", "where", "fix"}
    return error


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer ü"]
)
async def test_every_route_wants_the_token(running: Running, given: str | None) -> None:
    headers = [] if given is None else [(b"authorization", given.encode())]
    async with httpx.AsyncClient(base_url=running.url) as http:
        for method, path in (
            ("GET", "/v1/config"), ("GET", "/v1/status"), ("GET", "/v1/ledger"), ("GET", "/v1/events"),
            ("GET", "/v1/policies/current"), ("GET", f"/v1/blobs/{NAME}"), ("PUT", f"/v1/blobs/{NAME}"),
        ):  # fmt: skip
            response = await http.request(method, path, headers=headers)
            assert error_of(response, 401)["code"] == "UNAUTHENTICATED"
            assert response.headers["www-authenticate"] == "Bearer"
        body = lease_request().model_dump()
        assert (await http.post("/v1/leases", headers=headers, json=body)).status_code == 401


async def test_a_client_with_a_wrong_token_is_told_what_to_set(running: Running) -> None:
    async with ControlPlaneClient(running.url, "wrong", patience=1.0) as client:
        with pytest.raises(Unauthenticated, match="set SAPO_TOKEN to the run's"):
            await client.config()


async def test_probes_and_metrics_need_no_token(running: Running) -> None:
    async with httpx.AsyncClient(base_url=running.url) as http:
        assert (await http.get("/healthz")).json() == {"status": "alive"}
        assert (await http.get("/readyz")).json() == {"ready": True, "waiting_for": []}
        running.lifecycle.wait_for("redis", "Redis")
        waiting = await http.get("/readyz")
        assert (waiting.status_code, waiting.json()["waiting_for"]) == (503, ["Redis"])
        metrics = await http.get("/metrics")
        assert "sapo_policy_version 0.0" in metrics.text
        assert metrics.headers["content-type"].startswith("text/plain")


async def test_a_body_that_is_wrong_is_an_error_like_all_others(http: httpx.AsyncClient) -> None:
    error = error_of(await http.post("/v1/leases", json={"worker": "w", "count": -1}), 422)
    assert error["code"] == "INVALID_ARGUMENT"
    assert error["where"] == "POST /v1/leases"
    assert "body.count" in error["what"]
    assert "body.version" in error["what"]
    error_of(await http.post("/v1/leases", content=b"{", headers={"Content-Type": "application/json"}), 422)
    error_of(await http.get("/v1/policies/newest"), 422)


async def test_a_wrong_body_reaches_the_client_as_a_config_error(running: Running) -> None:
    with pytest.raises(ConfigError, match=r"body\.correct"):
        await running.client._json("POST", "/v1/evaluations/results", heartbeat())


async def test_an_unknown_path_method_or_version_is_an_error_like_all_others(http: httpx.AsyncClient) -> None:
    assert error_of(await http.get("/v2/config"), 404)["code"] == "NOT_FOUND"
    assert error_of(await http.get("/v1/confg"), 404)["where"] == "GET /v1/confg"
    error_of(await http.delete("/v1/config"), 405)
    assert "not known" in error_of(await http.get("/v1/policies/3"), 404)["what"]
    assert error_of(await http.get("/v1/policies/current"), 404)["fix"]


async def test_a_fault_of_ours_is_an_error_like_all_others(
    running: Running, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken() -> dict[str, Any]:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(running.plane, "status", broken)
    assert error_of(await http.get("/v1/status"), 500)["what"] == "ZeroDivisionError: oops"


async def test_a_full_disk_asks_the_caller_to_try_again(
    running: Running, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(running.plane.policies.blobs, "put", full)
    error = error_of(await http.put(f"/v1/blobs/{NAME}", content=CONTENT), 503)
    assert (error["code"], error["fix"]) == ("UNAVAILABLE", "make room on the disk")


async def test_the_configuration_is_the_same_at_both_ends(running: Running, config: RunConfig) -> None:
    assert await running.client.config() == config


async def test_a_blob_comes_back_whole_with_its_digest_as_strong_validator(http: httpx.AsyncClient, blob: str) -> None:
    response = await http.get(blob)
    assert (response.status_code, response.content) == (200, CONTENT)
    assert response.headers["etag"] == TAG
    assert response.headers["accept-ranges"] == "bytes"


async def test_head_says_what_get_would_and_sends_nothing(http: httpx.AsyncClient, blob: str) -> None:
    response = await http.head(blob)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == str(len(CONTENT))
    assert response.headers["etag"] == TAG
    assert (await http.head(f"/v1/blobs/{sha256(b'none')}")).status_code == 404


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("bytes=100-199", 100, 200), ("bytes=10200-", 10200, 10240), ("bytes=-40", 10200, 10240)],
)
async def test_a_range_of_a_blob(http: httpx.AsyncClient, blob: str, asked: str, start: int, end: int) -> None:
    response = await http.get(blob, headers={"Range": asked})
    assert (response.status_code, response.content) == (206, CONTENT[start:end])
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/{len(CONTENT)}"
    assert response.headers["etag"] == TAG


async def test_a_range_beyond_the_end_is_refused_with_the_size(http: httpx.AsyncClient, blob: str) -> None:
    response = await http.get(blob, headers={"Range": f"bytes={len(CONTENT)}-"})
    assert response.status_code == 416
    assert response.headers["content-range"] == f"bytes */{len(CONTENT)}"


async def test_a_range_goes_on_only_if_the_content_is_the_same(http: httpx.AsyncClient, blob: str) -> None:
    ranged = {"Range": "bytes=100-"}
    assert (await http.get(blob, headers=ranged | {"If-Range": TAG})).status_code == 206
    for other in (f'"{sha256(b"other")}"', f"W/{TAG}", NAME):
        response = await http.get(blob, headers=ranged | {"If-Range": other})
        assert (response.status_code, len(response.content)) == (200, len(CONTENT))


@pytest.mark.parametrize("known", [TAG, f"W/{TAG}", f'"x", {TAG}', "*"])
async def test_who_has_the_blob_is_not_sent_it_again(http: httpx.AsyncClient, blob: str, known: str) -> None:
    response = await http.get(blob, headers={"If-None-Match": known})
    assert (response.status_code, response.content) == (304, b"")
    assert response.headers["etag"] == TAG


@pytest.mark.parametrize("known", ['"x"', NAME, f'"{NAME}x"'])
async def test_who_has_something_else_is_sent_it(http: httpx.AsyncClient, blob: str, known: str) -> None:
    assert (await http.get(blob, headers={"If-None-Match": known})).status_code == 200


async def test_an_upload_of_other_content_is_refused(http: httpx.AsyncClient) -> None:
    error = error_of(await http.put(f"/v1/blobs/{NAME}", content=b"other"), 409)
    assert error["code"] == Mismatch.code
    assert (await http.head(f"/v1/blobs/{NAME}")).status_code == 404


async def next_event(lines: AsyncIterator[str]) -> dict[str, Any]:
    async with asyncio.timeout(5):
        async for line in lines:
            if line.startswith("data:"):
                data: dict[str, Any] = json.loads(line.removeprefix("data:"))
                return data
    raise AssertionError("the stream ended")


async def test_workers_hear_of_a_published_version_at_once_and_of_nothing_twice(
    running: Running, learner: Learner, http: httpx.AsyncClient
) -> None:
    async with http.stream("GET", "/v1/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.aiter_lines()
        assert await next_event(lines) == {"version": 0, "step": 0}
        await running.client.heartbeat(heartbeat())
        await learner.report("training", 0)  # says nothing new
        await learner.publish(1)
        assert await next_event(lines) == {"version": 1, "step": 0}
        await learner.report("training", 1)
        assert await next_event(lines) == {"version": 1, "step": 1}


async def test_event_streams_end_at_once_when_the_process_closes(
    running: Running, learner: Learner, http: httpx.AsyncClient
) -> None:
    async with http.stream("GET", "/v1/events") as response:
        lines = response.aiter_lines()
        await next_event(lines)
        started = time.monotonic()
        await running.plane.close()
        async for _ in lines:
            pass
        assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("token", "headers", "status"),
    [
        ("wrong", f"Content-Length: {MAX_BODY_BYTES + 1}", 401),
        (TOKEN, f"Content-Length: {MAX_BODY_BYTES + 1}", 422),
        (TOKEN, "Transfer-Encoding: chunked", 422),
    ],
)
async def test_a_large_body_is_refused_before_it_is_read(
    running: Running, token: str, headers: str, status: int
) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/leases HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n{headers}\r\n\r\n"
        writer.write(head.encode())  # and no body at all
        assert int((await reader.readline()).split()[1]) == status
        writer.close()


async def test_event_streams_that_break_off_hold_nobody_up(http: httpx.AsyncClient, running: Running) -> None:
    """Each disconnect cancels a wait, again and again; a lock that is lost on the way would stop every lease."""

    async def listen_and_leave() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.02), http.stream("GET", "/v1/events") as stream:
                async for _ in stream.aiter_bytes():
                    running.plane._notify()

    for _ in range(10):
        await asyncio.gather(*(listen_and_leave() for _ in range(10)))
        async with asyncio.timeout(5):
            await running.client.status()
            await running.client.lease(lease_request("a", 1, wait_seconds=0.01))
