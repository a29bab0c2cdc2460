"""What people and scripts ask, and what the learner and the workers tell: status, ledger, record."""

from pathlib import Path

import pytest

from sapo_learner.errors import ConfigError
from services.control_plane.record import RECENT, Record, read
from services.runstore import EmbeddedRedis
from services.runtime.settings import RunConfig
from services.wire import encode
from tests.small_run import (
    Learner,
    Running,
    control_plane,
    evaluate_all,
    group,
    heartbeat,
    lease_request,
    run_config,
)

STATUS_FIELDS = {
    "run", "state", "steps", "learner", "last_step", "evaluations", "evaluating", "unscored", "workers", "version",
    "published_step", "accepted", "unread", "groups_ready", "open_leases", "reoffered", "slowest_draws", "since",
    "unread_bytes", "redis_memory_bytes", "overdue_leases", "oldest_lease_seconds",
}  # fmt: skip


async def accept_one(running: Running) -> None:
    (lease,) = (await running.client.lease(lease_request())).draws
    payload = encode(group(lease.draw, lease.attempt))
    await running.store.append(lease.draw, lease.attempt, payload, max_entries=9, max_bytes=1 << 20)


async def test_status_of_a_run_that_has_not_begun(running: Running) -> None:
    status = await running.client.status()
    assert set(status) == STATUS_FIELDS
    assert (status["state"], status["version"], status["steps"]) == ("not started", None, 5)
    assert (status["accepted"], status["workers"], status["evaluations"]) == (0, [], [])
    assert status["unscored"] is None


async def test_status_says_what_is_accepted_leased_ready_and_who_works(running: Running, learner: Learner) -> None:
    await accept_one(running)
    await accept_one(running)
    await running.client.lease(lease_request("a"))
    await running.client.heartbeat(heartbeat("a", tokens=12, waiting_for="lookahead"))
    await learner.report("training", 1, cursor=1, record={"kind": "step", "step": 1, "reward": 0.5})
    status = await running.client.status()
    assert (status["state"], status["learner"]["step"], status["version"]) == ("training", 1, 0)
    assert (status["accepted"], status["unread"], status["groups_ready"], status["open_leases"]) == (2, 2, 1, 1)
    assert all(each["age_seconds"] >= 0 for each in status["slowest_draws"])
    assert status["since"] > 0
    (worker,) = status["workers"]
    assert (worker["worker"], worker["tokens"], worker["waiting_for"]) == ("a", 12, "lookahead")
    assert 0 <= worker["age_seconds"] < 5
    assert status["last_step"]["reward"] == 0.5


async def test_the_ledger_balances_while_the_sums_are_right_and_says_which_is_not(
    running: Running, learner: Learner
) -> None:
    await accept_one(running)
    await running.client.lease(lease_request())
    await learner.report("training", 1, cursor=1)
    ledger = await running.client.ledger()
    assert (ledger["accepted"], ledger["trained"], ledger["backlog"], ledger["open_draws"]) == (1, 1, 0, 1)
    assert (ledger["balanced"], ledger["problems"]) == (True, [])
    await learner.report("training", 1, cursor=2, ledger=counts_of(trained=1))
    ledger = await running.client.ledger()
    assert not ledger["balanced"]
    assert "outcomes sum to 1, but the learner has consumed 2" in ledger["problems"][0]
    assert "the log ends at 1, behind the 2" in ledger["problems"][1]


def counts_of(**counts: int) -> dict[str, int]:
    names = ("trained", "degenerate", "stale", "invalid", "refused", "skipped", "uncounted", "control")
    return dict.fromkeys(names, 0) | counts


async def test_a_figure_that_is_not_a_number_breaks_no_status(running: Running, learner: Learner) -> None:
    await learner.report("training", 1, record={"kind": "step", "step": 1, "loss": float("nan")})
    assert (await running.client.status())["last_step"]["loss"] is None


async def test_a_record_without_its_kind_is_refused(running: Running, learner: Learner) -> None:
    with pytest.raises(ConfigError, match="without its kind"):
        await learner.report("training", 1, record={"step": 1})


async def test_the_learner_report_survives_a_restart(redis: EmbeddedRedis, config: RunConfig) -> None:
    async with control_plane(config, redis.url) as running:
        learner = await Learner(running).start()
        await learner.report("training", 3, record={"kind": "step", "step": 3})
    async with control_plane(config, redis.url) as running:
        status = await running.client.status()
        assert (status["state"], status["learner"]["step"], status["last_step"]["step"]) == ("training", 3, 3)


async def test_the_run_is_finished_only_when_its_last_policy_is_evaluated(redis: EmbeddedRedis, tmp_path: Path) -> None:
    config = run_config(tmp_path, task={"held_out_every": 40}, training={"steps": 1})
    async with control_plane(config, redis.url) as running:
        learner = await Learner(running).start()
        await evaluate_all(running)
        await learner.publish(1)
        await learner.report("finished", 1)
        assert (await running.client.status())["state"] == "evaluating"
        await evaluate_all(running, policy=1)
        status = await running.client.status()
        assert status["state"] == "finished"
        assert [each["step"] for each in status["evaluations"]] == [0, 1]
        assert "examples" not in status["evaluations"][0]


async def test_a_run_without_held_out_problems_is_finished_when_the_learner_is(
    running: Running, learner: Learner
) -> None:
    await learner.report("finished", 5)
    assert (await running.client.status())["state"] == "finished"


def test_a_line_torn_by_a_crash_costs_neither_its_neighbours_nor_the_next(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record = Record(path)
    record.add("step", step=1)
    record.close()
    with path.open("a") as file:
        file.write('{"kind":"step","st')
    record = Record(path)
    record.add("step", step=2)
    record.close()
    assert [line["step"] for line in read(path)] == [1, 2]
    assert [line["step"] for line in record.recent["step"]] == [1, 2]


def test_memory_of_the_record_is_bounded(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.jsonl")
    for step in range(RECENT + 10):
        record.add("step", step=step)
    record.close()
    assert len(record.recent["step"]) == RECENT
    assert record.last("step") is not None
    assert record.last("evaluation") is None
