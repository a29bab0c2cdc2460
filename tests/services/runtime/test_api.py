"""Odd bodies at the control plane's door: a sentence, never a 500, and nothing of them is kept."""

import json
from typing import Any

import httpx
import pytest

from tests.small_run import TOKEN, Learner, Running, heartbeat, lease_request

HUGE = 2**63
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}


def beat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/workers/heartbeat", heartbeat().model_dump() | fields


def lease(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/leases", lease_request().model_dump() | fields


def progress(**fields: Any) -> tuple[str, dict[str, Any]]:
    return beat(leases=[{"draw": 0, "attempt": 1, "tokens": 1} | fields])


def result(**fields: Any) -> tuple[str, dict[str, Any]]:
    plain = {"evaluation": "e", "chunk": 0, "version": 0, "correct": [1], "samples": 1, "tokens": 1, "worker": "w"}
    return "/v1/evaluations/results", plain | fields


NAMES = ["", "x" * 10_000, "two\nlines", "\x00"]
ODD: list[tuple[tuple[str, dict[str, Any]], str]] = [
    (beat(worker="\ud800"), "surrogates not allowed"),
    *(((path, body | {"worker": name}), "worker") for name in NAMES for path, body in (beat(), lease(), result())),
    (beat(version=HUGE), "version"),
    (beat(step=-1), "step"),
    (beat(tokens_per_second=float("nan")), "tokens_per_second"),
    (beat(busy=[[0, float("inf")]]), "busy"),
    (beat(waiting_for="\udfff"), "surrogates not allowed"),
    (lease(step=2**80), "step"),
    (lease(wait_seconds=float("nan")), "wait_seconds"),
    (progress(draw=HUGE), "draw"),
    (progress(attempt=-1), "attempt"),
    (progress(attempt=HUGE), "attempt"),
    (progress(tokens=HUGE), "tokens"),
    (result(chunk=HUGE), "chunk"),
    (result(correct=[-1]), "correct"),
    (("/v1/leases/release", {"worker": "w", "leases": [{"draw": -1, "attempt": 1, "tokens": 0}]}), "draw"),
    (("/v1/learner", {"state": "training", "step": HUGE, "cursor": 0, "ledger": {}}), "step"),
    (("/v1/learner", {"state": "training", "step": 0, "cursor": -1, "ledger": {}}), "cursor"),
    (("/v1/learner", {"state": "t", "step": 0, "cursor": 0, "ledger": {"\ud800": 1}}), "surrogates not allowed"),
    (("/v1/policies", {"token": 1, "manifest": {"dtype": "\ud800"}}), "surrogates not allowed"),
]


async def test_odd_bodies_are_refused_with_a_sentence(running: Running, learner: Learner) -> None:
    async with httpx.AsyncClient(base_url=running.url, headers=HEADERS) as client:
        for (path, body), field in ODD:
            response = await client.post(path, content=json.dumps(body).encode())
            error = response.json()["error"]
            assert (response.status_code, error["kind"]) == (422, "ConfigError"), (path, field, error)
            assert field in error["what"]
            assert error["where"] == f"POST {path}"
            assert error["fix"]
            assert len(response.content) < 1000
    assert (await running.client.status())["workers"] == []
    assert (await running.store.state()).leases == ()


@pytest.mark.parametrize("step", [2**63, 2**80, -1, 1.5, float("inf")])
async def test_a_manifest_with_an_absurd_step_is_refused(running: Running, learner: Learner, step: float) -> None:
    """It would stop pacing for ever: no real step could come after it."""
    request = learner.request(await learner.upload(1)).model_dump()
    request["manifest"]["step"] = step
    async with httpx.AsyncClient(base_url=running.url, headers=HEADERS) as client:
        response = await client.post("/v1/policies", content=json.dumps(request).encode())
    assert response.status_code == 422
    assert "step" in response.json()["error"]["what"]
    assert await running.client.versions() == {0: 0}
