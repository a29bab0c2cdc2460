"""Leases over real HTTP and a real run store: pacing holds, waiting ends when it should, nothing goes to the dead."""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.control_plane import plane as plane_module
from services.runstore import EmbeddedRedis
from services.runtime import api
from services.runtime.settings import RunConfig
from services.wire import encode
from tests.small_run import TOKEN, Learner, Running, control_plane, group, heartbeat, lease_request, run_config

LONG = 30.0  # a wait that no test sits out


async def accept(running: Running, *draws: api.LeasedDraw) -> None:
    for draw in draws:
        payload = encode(group(draw.draw, draw.attempt))
        result = await running.store.append(draw.draw, draw.attempt, payload, max_entries=100, max_bytes=1 << 20)
        assert result.status == "OK"


async def waiting(running: Running, count: int = 1) -> None:
    """Until so many lease requests wait."""
    async with asyncio.timeout(5):
        while running.plane._waiting < count:
            await asyncio.sleep(0.001)


async def prompt(task: "asyncio.Task[api.LeaseResponse]") -> api.LeaseResponse:
    async with asyncio.timeout(5):
        return await task


@pytest.fixture
def slow_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends a wait then is an event."""
    monkeypatch.setattr(plane_module, "POLL_SECONDS", LONG)


async def test_before_anything_is_published_there_is_nothing_to_lease(running: Running) -> None:
    answer = await running.client.lease(lease_request(count=4))
    assert (answer.draws, answer.waiting_for) == ([], "not ready")


async def test_draws_come_in_order_each_as_the_sampler_has_it(running: Running, learner: Learner) -> None:
    answer = await running.client.lease(lease_request(count=2))
    assert [(each.draw, each.epoch) for each in answer.draws] == [(0, 0), (1, 0)]
    for each in answer.draws:
        expected = running.plane._sampler.draw(each.draw)
        assert (each.prompt.id, each.seed) == (expected.prompt.id, expected.seed)
    assert answer.version == 0


async def test_sampling_runs_ahead_of_the_published_policy_by_lookahead_and_no_further(
    running: Running, learner: Learner
) -> None:
    # 2 groups per step, lookahead 2: (0 + 2 + 1) * 2 groups, accepted or under way.
    got = [await running.client.lease(lease_request(count=2)) for _ in range(4)]
    assert [len(each.draws) for each in got] == [2, 2, 2, 0]
    assert got[3].waiting_for == "lookahead"
    await accept(running, *got[0].draws)
    assert (await running.client.lease(lease_request(count=2))).draws == []
    await learner.publish(1)
    answer = await running.client.lease(lease_request(count=2, policy=1))
    assert (answer.draws, answer.waiting_for) == ([], "max_policy_age")  # leases of step 0 are still open
    await accept(running, *got[1].draws, *got[2].draws)
    assert len((await running.client.lease(lease_request(count=2, policy=1))).draws) == 2


async def test_no_more_is_leased_than_the_run_has_steps_for(redis: EmbeddedRedis, tmp_path: Path) -> None:
    config = run_config(tmp_path, training={"steps": 1})
    async with control_plane(config, redis.url) as running:
        await Learner(running).start()
        assert len((await running.client.lease(lease_request(count=2))).draws) == 2
        assert (await running.client.lease(lease_request(count=2))).waiting_for == "steps"


async def test_no_worker_takes_a_whole_step_while_others_idle(running: Running, learner: Learner) -> None:
    for name in ("a", "b"):
        await running.client.heartbeat(heartbeat(name))
    assert len((await running.client.lease(lease_request("a", 10))).draws) == 1
    assert len((await running.client.lease(lease_request("b", 10))).draws) == 1


async def test_a_request_that_can_be_served_does_not_wait(running: Running, learner: Learner) -> None:
    started = time.monotonic()
    assert (await running.client.lease(lease_request(wait_seconds=LONG))).draws
    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("slow_polls")
async def test_a_waiting_request_is_granted_as_soon_as_a_policy_is_published(
    running: Running, learner: Learner
) -> None:
    draws = [await running.client.lease(lease_request(count=2)) for _ in range(3)]
    await accept(running, *(each for answer in draws for each in answer.draws))
    task = asyncio.create_task(running.client.lease(lease_request(wait_seconds=LONG)))
    await waiting(running)
    await running.client.heartbeat(heartbeat(policy=1))  # the worker will have moved on by then
    await learner.publish(1)
    answer = await prompt(task)
    assert [each.draw for each in answer.draws] == [6]
    assert answer.version == 1


@pytest.mark.usefixtures("slow_polls")
async def test_a_waiting_request_gets_what_another_worker_hands_back(running: Running, learner: Learner) -> None:
    held = [each for _ in range(3) for each in (await running.client.lease(lease_request("a", 2))).draws]
    task = asyncio.create_task(running.client.lease(lease_request("b", wait_seconds=LONG)))
    await waiting(running)
    back = [api.LeaseProgress(draw=held[3].draw, attempt=held[3].attempt, tokens=0)]
    await running.client.release(api.ReleaseRequest(worker="a", leases=back))
    (given,) = (await prompt(task)).draws
    assert (given.draw, given.attempt) == (held[3].draw, held[3].attempt + 1)
    assert (given.seed, given.prompt) == (held[3].seed, held[3].prompt)


async def test_a_waiting_request_gets_a_draw_whose_lease_ran_out(redis: EmbeddedRedis, tmp_path: Path) -> None:
    config = run_config(tmp_path, pacing={"lease_seconds": 0.05})
    async with control_plane(config, redis.url) as running:
        await Learner(running).start()
        for _ in range(3):
            await running.client.lease(lease_request("dead", 2))
        answer = await running.client.lease(lease_request("alive", 2, wait_seconds=LONG))
        assert answer.draws
        assert all(each.attempt >= 2 for each in answer.draws)


@pytest.mark.usefixtures("slow_polls")
async def test_a_waiting_request_ends_when_its_time_is_over(running: Running) -> None:
    answer = await running.client.lease(lease_request(wait_seconds=0.05))
    assert (answer.draws, answer.waiting_for) == ([], "not ready")


@pytest.mark.usefixtures("slow_polls")
async def test_closing_answers_every_waiting_request_at_once(running: Running) -> None:
    tasks = [
        asyncio.create_task(running.client.lease(lease_request(f"w{index}", wait_seconds=LONG))) for index in range(3)
    ]
    await waiting(running, 3)
    await running.plane.close()
    assert [(await prompt(task)).draws for task in tasks] == [[], [], []]


@pytest.mark.usefixtures("slow_polls")
async def test_a_worker_that_hung_up_is_not_given_a_lease(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    lease, answered = running.plane.lease, asyncio.Event()

    async def observed(*args: Any) -> api.LeaseResponse:
        try:
            return await lease(*args)
        finally:
            answered.set()

    monkeypatch.setattr(running.plane, "lease", observed)
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}) as dying:
        body = lease_request("dying", 2, wait_seconds=LONG).model_dump()
        request = asyncio.create_task(dying.post(f"{running.url}/v1/leases", json=body))
        await waiting(running)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    await Learner(running).start()
    async with asyncio.timeout(5):
        await answered.wait()
    assert (await running.store.state()).leases == ()


async def test_a_worker_that_leaves_hands_back_what_it_was_granted_without_hearing_of_it(
    running: Running, learner: Learner
) -> None:
    held = (await running.client.lease(lease_request("goes", count=2))).draws
    (others,) = (await running.client.lease(lease_request("stays", count=1))).draws
    while (await running.client.lease(lease_request("goes", count=1))).draws:
        pass  # the answers were lost
    waits = asyncio.create_task(running.client.lease(lease_request("goes", count=4, wait_seconds=LONG)))
    await waiting(running)
    unfinished = api.LeaseProgress(draw=held[0].draw, attempt=held[0].attempt, tokens=0)
    await running.client.release(api.ReleaseRequest(worker="goes", leases=[unfinished], leaving=True))
    assert (await prompt(waits)).draws == [], "a request from before it left is granted nothing"
    assert {each.worker for each in (await running.store.state()).leases} == {"stays"}
    assert others.draw in {each.draw for each in (await running.store.state()).leases}
    assert (await running.client.lease(lease_request("goes", count=1))).draws, "it may come back"


async def test_a_worker_that_leaves_while_it_is_granted_a_lease_holds_nothing(
    running: Running, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    grant = running.plane._store.grant

    async def late(*args: Any) -> Any:
        await running.plane.release(api.ReleaseRequest(worker="goes", leases=[], leaving=True))
        return await grant(*args)

    monkeypatch.setattr(running.plane._store, "grant", late)
    assert (await running.client.lease(lease_request("goes", count=2))).draws == []
    assert (await running.store.state()).leases == ()


async def test_many_waiting_workers_cost_redis_no_more_than_a_few(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    async def wait(changed: asyncio.Event, seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(plane_module, "_wait", wait)
    far = time.monotonic() + 1000
    for workers in (1, 8, 80):
        monkeypatch.setattr(running.plane, "_waiting", workers - 1)
        await running.plane._wait_for_change(asyncio.Event(), far)
    assert pauses == [0.1, 0.1, 1.0]


async def test_progress_keeps_a_lease_and_the_lack_of_it_loses_it(redis: EmbeddedRedis, tmp_path: Path) -> None:
    config = run_config(tmp_path, pacing={"lease_seconds": 3})
    async with control_plane(config, redis.url) as running:
        await Learner(running).start()
        kept, idle = (await running.client.lease(lease_request(count=2))).draws

        def progress(draw: api.LeasedDraw, tokens: int) -> api.LeaseProgress:
            return api.LeaseProgress(draw=draw.draw, attempt=draw.attempt, tokens=tokens)

        lost: list[api.LeaseProgress] = []
        async with asyncio.timeout(40):
            while not lost:
                beat = heartbeat(leases=[progress(kept, 1), progress(idle, 0)])
                lost = (await running.client.heartbeat(beat)).lost
                await running.client.lease(lease_request("sweeper", 0))
        assert [(each.draw, each.attempt) for each in lost] == [(idle.draw, idle.attempt)]


@pytest.mark.parametrize("shift", [-86_400.0, 86_400.0])
async def test_a_host_whose_clock_is_wrong_neither_ends_nor_prolongs_a_lease(
    redis: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    """Redis' clock alone decides; the control plane's and the worker's may be a day off, and jump."""
    config = run_config(tmp_path, pacing={"lease_seconds": 0.3})
    true_time, true_monotonic, off = time.time, time.monotonic, [0.0]
    monkeypatch.setattr(time, "time", lambda: true_time() + off[0])
    async with control_plane(config, redis.url) as running:
        await Learner(running).start()
        (lease,) = (await running.client.lease(lease_request("w", 1))).draws
        off[0] = shift
        progress = api.LeaseProgress(draw=lease.draw, attempt=lease.attempt, tokens=1)
        assert (await running.client.heartbeat(heartbeat("w", leases=[progress]))).lost == []
        (held,) = (await running.store.state()).leases
        assert held.draw == lease.draw
        assert 0 < held.remaining_seconds <= 0.3
        since = true_monotonic()
        (again,) = (await running.client.lease(lease_request("other", 1, wait_seconds=5))).draws
        while again.draw != lease.draw:  # new draws come first while the lease lives
            (again,) = (await running.client.lease(lease_request("other", 1, wait_seconds=5))).draws
        assert true_monotonic() - since < 4
        assert (again.seed, again.attempt) == (lease.seed, lease.attempt + 1)


async def test_a_restarted_control_plane_knows_who_serves_what_and_what_is_leased(
    redis: EmbeddedRedis, config: RunConfig
) -> None:
    async with control_plane(config, redis.url) as running:
        await Learner(running).start()
        await running.client.heartbeat(heartbeat("a", policy=0))
        await running.client.heartbeat(heartbeat("b", policy=0))
        before = await running.client.lease(lease_request("a", 2))
    async with control_plane(config, redis.url) as running:
        assert running.plane.workers.versions() == {"a": 0, "b": 0}
        after = await running.client.lease(lease_request("b", 2))
    assert [each.draw for each in (*before.draws, *after.draws)] == [0, 1]


async def test_an_overtaken_heartbeat_does_not_take_a_worker_back(running: Running, learner: Learner) -> None:
    await running.client.lease(lease_request("a", policy=3))
    await running.client.heartbeat(heartbeat("a", policy=2))
    assert running.plane.workers.versions() == {"a": 3}
