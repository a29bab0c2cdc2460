"""Ingest over real gRPC and a real run store: each group in the log once, and every other one told why not."""

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.sapo.v1 import ingest_pb2 as pb
from sapo_learner.errors import Unavailable
from services.ingest.service import SERVICE
from services.runstore import AppendResult
from services.wire import decode, to_message
from tests.ingest_door import Ingest, hello, lease, refusal, request, send
from tests.small_run import TOKEN, Learner, Running, group

Ack = pb.Ack


async def test_the_welcome_names_the_run_and_the_credits(running: Running, learner: Learner, ingest: Ingest) -> None:
    stream = ingest.open()
    await stream.write(hello())
    welcome = (await stream.read()).welcome
    assert (welcome.run, welcome.credits) == (running.config.run.name, running.config.ingest.credits)


async def test_an_accepted_group_is_in_the_log_as_it_was_sent(
    running: Running, learner: Learner, ingest: Ingest
) -> None:
    (one,) = await lease(running)
    ack = await send(await ingest.greeted(), one)
    assert (ack.status, ack.draw, ack.attempt, ack.retry_after_ms) == (Ack.STATUS_ACCEPTED, one.draw, one.attempt, 0)
    (entry,) = await ingest.store.read(0, 10)
    assert f"{entry.generation}-{entry.sequence}" == ack.entry_id
    assert to_message(decode(entry.payload)) == to_message(one)


async def test_acks_come_in_the_order_of_the_groups(running: Running, learner: Learner, ingest: Ingest) -> None:
    groups = [each for _ in range(3) for each in await lease(running, 2)]
    stream = await ingest.greeted()
    for each in reversed(groups):
        await stream.write(request(each))
    acks = [(await stream.read()).ack for _ in groups]
    assert [ack.draw for ack in acks] == [each.draw for each in reversed(groups)]
    assert [ack.entry_id.split("-")[1] for ack in acks] == ["1", "2", "3", "4", "5", "6"]


async def test_a_stream_whose_sender_is_done_still_gets_every_ack_and_ends_well(
    running: Running, learner: Learner, ingest: Ingest
) -> None:
    groups = await lease(running, 2)
    stream = await ingest.greeted()
    for each in groups:
        await stream.write(request(each))
    await stream.done_writing()
    assert [(await stream.read()).ack.status for _ in groups] == [Ack.STATUS_ACCEPTED] * 2
    assert await stream.read() is grpc.aio.EOF
    assert await stream.code() is grpc.StatusCode.OK


async def test_a_group_that_comes_again_is_a_duplicate(running: Running, learner: Learner, ingest: Ingest) -> None:
    (one,) = await lease(running)
    stream = await ingest.greeted()
    await send(stream, one)
    again = await send(stream, one)
    assert (again.status, again.entry_id) == (Ack.STATUS_DUPLICATE, "")
    assert (await ingest.store.state()).sequence == 1


async def test_an_attempt_that_is_no_longer_current_has_expired(
    running: Running, learner: Learner, ingest: Ingest
) -> None:
    (one,) = await lease(running)
    stream = await ingest.greeted()
    for stale in (group(one.draw, one.attempt + 1), group(99, 1)):
        ack = await send(stream, stale)
        assert ack.status == Ack.STATUS_EXPIRED
        assert "offered again" in ack.reason
    assert (await send(stream, one)).status == Ack.STATUS_ACCEPTED


async def test_a_version_published_meanwhile_is_known_at_once(
    running: Running, learner: Learner, ingest: Ingest
) -> None:
    one, two = await lease(running, 2)
    stream = await ingest.greeted()
    await send(stream, one)
    await learner.publish(1)
    assert (await send(stream, group(two.draw, two.attempt, version=1))).status == Ack.STATUS_ACCEPTED


async def test_a_full_log_asks_the_worker_to_keep_the_group(running: Running, learner: Learner, ingest: Ingest) -> None:
    one, two = await lease(running, 2)
    limits = running.config.ingest.model_copy(update={"max_entries": 1})
    ingest.servicer._config = running.config.model_copy(update={"ingest": limits})
    stream = await ingest.greeted()
    await send(stream, one)
    ack = await send(stream, two)
    assert (ack.status, ack.retry_after_ms > 0) == (Ack.STATUS_FULL, True)
    assert "learner has not read it" in ack.reason
    head = (await ingest.store.read(0, 1))[0]
    await ingest.store.trim(learner.token, type("Head", (), {"sequence": 1, "chain": head.chain})())
    assert (await send(stream, two)).status == Ack.STATUS_ACCEPTED


async def test_while_the_log_must_be_rebuilt_the_worker_keeps_the_group(
    running: Running, learner: Learner, ingest: Ingest
) -> None:
    one, two = await lease(running, 2)
    stream = await ingest.greeted()
    await send(stream, one)
    await ingest.store._redis.flushall()
    ack = await send(stream, two)
    assert (ack.status, ack.retry_after_ms > 0) == (Ack.STATUS_NOT_READY, True)


async def test_an_ingest_that_knows_nothing_calls_no_group_invalid_while_the_registry_is_lost(
    running: Running, learner: Learner, ingest: Ingest
) -> None:
    (one,) = await lease(running)
    stream = await ingest.greeted()
    await ingest.store._redis.flushall()
    ack = await send(stream, one)
    assert ack.status == Ack.STATUS_NOT_READY
    assert "being restored" in ack.reason


async def test_a_redis_that_is_away_costs_neither_the_stream_nor_the_group(
    running: Running, learner: Learner, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The append happens, but its answer is lost: the group is kept, sent again, and in the log once."""
    (one,) = await lease(running)
    lost: list[AppendResult] = []
    append = ingest.store.append

    async def unanswered(*args: Any, **fields: Any) -> AppendResult:
        result = await append(*args, **fields)
        if lost:
            return result
        lost.append(result)
        raise Unavailable("no answer within 10 s", where="Redis")

    monkeypatch.setattr(ingest.store, "append", unanswered)
    stream = await ingest.greeted()
    first = await send(stream, one)
    assert (first.status, first.retry_after_ms > 0) == (Ack.STATUS_NOT_READY, True)
    assert "no answer" in first.reason
    assert (await send(stream, one)).status == Ack.STATUS_DUPLICATE
    assert (await ingest.store.state()).sequence == 1


async def test_a_group_resent_after_a_broken_stream_is_in_the_log_once(
    running: Running, learner: Learner, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker breaks off while the append runs, before and after Redis has done it."""
    groups = await lease(running, 2)
    append = ingest.store.append
    for one, done_before in zip(groups, (True, False), strict=True):
        reached, gate = asyncio.Event(), asyncio.Event()

        async def held(*args: Any, done_before: bool = done_before, reached: Any = reached, gate: Any = gate,
                       **fields: Any) -> AppendResult:  # fmt: skip
            if done_before:
                await append(*args, **fields)
            reached.set()
            await gate.wait()
            raise AssertionError("was cancelled")

        monkeypatch.setattr(ingest.store, "append", held)
        stream = await ingest.greeted()
        await stream.write(request(one))
        async with asyncio.timeout(10):
            await reached.wait()
        stream.cancel()
        monkeypatch.setattr(ingest.store, "append", append)
        ack = await send(await ingest.greeted(), one)
        assert ack.status == (Ack.STATUS_DUPLICATE if done_before else Ack.STATUS_ACCEPTED)
    assert (await ingest.store.state()).sequence == 2
    assert [entry.draw for entry in await ingest.store.read(0, 10)] == [each.draw for each in groups]


async def test_streams_broken_at_any_moment_leave_every_group_in_the_log_once(
    running: Running, learner: Learner, ingest: Ingest
) -> None:
    groups = [each for _ in range(3) for each in await lease(running, 2)]
    for turn in range(12):
        stream = await ingest.greeted()
        for each in groups:
            await stream.write(request(each))
        for _ in range(turn % 7):
            await stream.read()
        stream.cancel()
    stream = await ingest.greeted()
    final = [(await send(stream, each)).status for each in groups]
    assert set(final) <= {Ack.STATUS_ACCEPTED, Ack.STATUS_DUPLICATE}
    entries = await ingest.store.read(0, 100)
    assert sorted(entry.draw for entry in entries) == [each.draw for each in groups]


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer wrong"),), (("authorization", TOKEN),)])
async def test_a_stream_without_the_token_is_refused(ingest: Ingest, metadata: Any) -> None:
    code, details = await refusal(ingest.open(metadata))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "SAPO_TOKEN" in details


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tokenizer_digest": "f" * 64}, "tokenizer_digest ffffffffffff differs from the run's"),
        ({"model_digest": ""}, "model_digest missing differs"),
        ({"schema_version": 2}, "schema version 2, this ingest reads 1"),
    ],
)
async def test_a_worker_whose_tokens_mean_something_else_is_refused(
    running: Running, learner: Learner, ingest: Ingest, fields: dict[str, Any], said: str
) -> None:
    code, details = await refusal(ingest.open(), hello(**fields))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert said in details


async def test_a_stream_is_one_hello_and_then_groups(running: Running, learner: Learner, ingest: Ingest) -> None:
    empty = pb.StreamTrajectoryGroupsRequest()
    for messages in ([request(group())], [hello(), hello()], [hello(), empty], [empty], [hello(worker="")]):
        code, _ = await refusal(ingest.open(), *messages)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert (await ingest.store.state()).sequence == 0


async def test_before_the_first_policy_a_worker_is_told_to_try_again(ingest: Ingest) -> None:
    code, details = await refusal(ingest.open(), hello())
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "no policy is published yet" in details


async def test_health_needs_no_token(ingest: Ingest) -> None:
    stub = health_pb2_grpc.HealthStub(ingest.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
