"""Evaluations through the running service: the first policy is really the first, and no restart loses one."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.control_plane import plane as plane_module
from services.runstore import EmbeddedRedis
from services.runtime.settings import RunConfig
from tests.small_run import Learner, Running, answer, control_plane, evaluate_all, heartbeat, lease_request, run_config


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Two chunks per evaluation."""
    return run_config(tmp_path, task={"held_out_every": 25}, evaluation={"boundary_samples": 200})


@pytest_asyncio.fixture
async def running(config: RunConfig, redis: EmbeddedRedis) -> AsyncIterator[Running]:
    async with control_plane(config, redis.url) as started:
        yield started


def recorded(config: RunConfig) -> list[tuple[int, int]]:
    """(step, version) of the evaluations in the run's record."""
    lines = [json.loads(line) for line in (config.run.directory / "record.jsonl").read_text().splitlines()]
    return [(line["step"], line["version"]) for line in lines if line["kind"] == "evaluation"]


async def test_a_worker_is_asked_to_evaluate_the_first_policy_from_the_moment_it_can_serve_it(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = running.plane._store.publish

    async def observed(*args: object) -> object:
        result = await publish(*args)  # type: ignore[arg-type]
        chunk = (await running.client.lease(lease_request(evaluate=True))).evaluation
        assert chunk is not None
        return result

    monkeypatch.setattr(running.plane._store, "publish", observed)
    await Learner(running).start()


async def test_the_second_policy_is_not_published_while_the_first_is_not_evaluated(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plane_module, "HOLD_SECONDS", 0.01)
    learner = await Learner(running).start()
    response = await learner.publish(1)
    assert response.version is None
    assert response.held_for == "the evaluation of the first policy"
    assert (await running.client.manifest()).version == 0


async def test_the_second_policy_is_published_as_soon_as_the_first_is_evaluated(
    running: Running, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = await Learner(running).start()
    wait, held = plane_module._wait, asyncio.Event()

    async def observed(changed: asyncio.Event, seconds: float) -> None:
        held.set()
        await wait(changed, seconds)

    monkeypatch.setattr(plane_module, "_wait", observed)
    second = asyncio.create_task(learner.publish(1))
    async with asyncio.timeout(5):
        await held.wait()
    chunk = (await running.client.lease(lease_request("a", 0, evaluate=True))).evaluation
    assert chunk
    await running.client.evaluated(answer(chunk, "a"))
    assert not second.done()
    assert (await running.client.manifest()).version == 0
    await evaluate_all(running, "a")
    async with asyncio.timeout(5):
        assert (await second).version == 1
    assert recorded(config) == [(0, 0)]


async def test_a_worker_that_dies_while_it_evaluates_the_first_policy_leaves_it_to_its_successor(
    running: Running, config: RunConfig
) -> None:
    await Learner(running).start()
    chunk = (await running.client.lease(lease_request("a", 0, evaluate=True))).evaluation
    assert chunk
    again = (await running.client.lease(lease_request("a", 0, evaluate=True))).evaluation  # restarted under its name
    assert again == chunk
    assert await evaluate_all(running, "a") == 2
    assert recorded(config) == [(0, 0)]


async def test_a_worker_that_dies_leaves_its_chunk_to_another(
    running: Running, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await Learner(running).start()
    assert (await running.client.lease(lease_request("dead", 0, evaluate=True))).evaluation
    assert await evaluate_all(running, "b") == 1  # the other chunk is somebody's
    monkeypatch.setattr("services.control_plane.workers.TTL_SECONDS", 0.0)
    assert await evaluate_all(running, "b") == 1
    assert recorded(config) == [(0, 0)]


async def test_a_pinned_worker_asks_until_none_is_left_and_wants_no_draws(running: Running) -> None:
    await Learner(running).start()
    assert await evaluate_all(running) == 2
    assert (await running.store.state()).leases == ()


async def test_an_evaluation_goes_on_after_a_restart_with_what_was_answered(
    redis: EmbeddedRedis, config: RunConfig
) -> None:
    async with control_plane(config, redis.url) as running:
        await Learner(running).start()
        for worker in ("a", "b"):
            await running.client.heartbeat(heartbeat(worker))
        chunk = (await running.client.lease(lease_request("a", 0, evaluate=True))).evaluation
        other = (await running.client.lease(lease_request("b", 0, evaluate=True))).evaluation
        assert chunk
        assert other
        await running.client.evaluated(answer(chunk, "a"))
    async with control_plane(config, redis.url) as running:
        assert (await running.client.lease(lease_request("a", 0, evaluate=True))).evaluation is None  # b is at it
        await running.client.evaluated(answer(other, "b"))
        assert recorded(config) == [(0, 0)]


async def test_a_newer_version_elsewhere_does_not_undo_an_evaluation_over_a_restart(
    redis: EmbeddedRedis, config: RunConfig
) -> None:
    async with control_plane(config, redis.url) as running:
        learner = await Learner(running).start()
        await evaluate_all(running, "a")
        await learner.publish(2)
        await running.client.heartbeat(heartbeat("a", version=1, step=2))
        request = lease_request("a", 0, version=1, step=2, evaluate=True)
        chunk = (await running.client.lease(request)).evaluation
        assert chunk
        await learner.publish(3)
    async with control_plane(config, redis.url) as running:
        newer = lease_request("b", 0, version=2, step=3, evaluate=True)
        assert (await running.client.lease(newer)).evaluation is None
        assert running.plane.evaluations.pinned == {1}


async def test_a_control_plane_that_dies_between_publishing_and_scheduling_schedules_at_its_next_start(
    redis: EmbeddedRedis, config: RunConfig
) -> None:
    async with control_plane(config, redis.url) as running:
        await Learner(running).start()
        await running.plane._store.delete_document(running.plane._token, "evaluations", "step-00000000")
    async with control_plane(config, redis.url) as running:
        assert await evaluate_all(running) == 2
        assert recorded(config) == [(0, 0)]
    async with control_plane(config, redis.url) as running:
        assert await evaluate_all(running) == 0


async def test_a_step_that_is_published_again_is_not_evaluated_again(running: Running, config: RunConfig) -> None:
    learner = await Learner(running).start()
    await evaluate_all(running)
    await learner.publish(2)
    request = {"version": 1, "step": 2, "evaluate": True}
    while chunk := (await running.client.lease(lease_request("w", 0, **request))).evaluation:
        await running.client.evaluated(answer(chunk))
    restored = await Learner(running).start(publish=False)
    await restored.publish(0)
    await restored.publish(2)
    await restored.publish(3)
    assert running.plane.evaluations.open == []
    assert recorded(config) == [(0, 0), (2, 1)]
