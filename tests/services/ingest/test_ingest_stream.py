"""Ingest over real gRPC and a real run store: each group in the log once, and every other one told why not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.sapo.v1 import ingest_pb2 as pb
from protos.sapo.v1 import ingest_pb2_grpc as pb_grpc
from protos.sapo.v1 import trajectory_pb2
from sapo_learner.trajectory import SamplingParameters, TrajectoryGroup
from services.ingest.service import SERVICE, _server
from services.ingest.servicer import IngestServicer
from services.runstore import AppendResult, EmbeddedRedis, RunStore
from services.runtime.metrics import IngestMetrics
from services.wire import MAX_MESSAGE_BYTES, decode, to_message
from tests.small_run import (
    TOKEN,
    VOCABULARY,
    Learner,
    Running,
    group,
    lease_request,
    snapshot_files,
    snapshot_manifest,
    trajectory,
)

AUTHORIZED = (("authorization", f"Bearer {TOKEN}"),)
MANIFEST = snapshot_manifest(0, snapshot_files("any"))
Ack = pb.Ack


def hello(**fields: Any) -> pb.StreamTrajectoryGroupsRequest:
    facts: dict[str, Any] = {"model_digest": MANIFEST.model_digest, "tokenizer_digest": MANIFEST.tokenizer_digest}
    return pb.StreamTrajectoryGroupsRequest(hello=pb.Hello(**({"worker": "w", "schema_version": 1} | facts | fields)))


def request(one: TrajectoryGroup | trajectory_pb2.TrajectoryGroup) -> pb.StreamTrajectoryGroupsRequest:
    return pb.StreamTrajectoryGroupsRequest(group=to_message(one) if isinstance(one, TrajectoryGroup) else one)


@dataclass
class Ingest:
    address: str
    store: RunStore
    servicer: IngestServicer
    channel: grpc.aio.Channel

    def open(self, metadata: Any = AUTHORIZED) -> Any:
        return pb_grpc.TrajectoryIngestServiceStub(self.channel).StreamTrajectoryGroups(metadata=metadata)

    async def greeted(self) -> Any:
        stream = self.open()
        await stream.write(hello())
        assert (await stream.read()).WhichOneof("message") == "welcome"
        return stream


async def send(stream: Any, one: TrajectoryGroup | trajectory_pb2.TrajectoryGroup) -> pb.Ack:
    await stream.write(request(one))
    async with asyncio.timeout(10):
        return (await stream.read()).ack


async def refusal(stream: Any, *messages: pb.StreamTrajectoryGroupsRequest) -> tuple[grpc.StatusCode, str]:
    """How ingest ends the stream."""
    async with asyncio.timeout(10):
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it may have ended before the last message
            for message in messages:
                await stream.write(message)
            while await stream.read() is not grpc.aio.EOF:
                pass
        return await stream.code(), await stream.details()


@pytest_asyncio.fixture
async def ingest(running: Running, redis: EmbeddedRedis) -> AsyncIterator[Ingest]:
    async with await RunStore.connect(redis.url, running.config.run.name) as store:
        servicer = IngestServicer(running.config, store, IngestMetrics())
        server, probe = _server(TOKEN, servicer)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        await probe.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield Ingest(f"127.0.0.1:{port}", store, servicer, channel)
        await server.stop(None)


async def lease(running: Running, count: int = 1) -> list[TrajectoryGroup]:
    """Groups that answer freshly leased draws."""
    draws = (await running.client.lease(lease_request(count=count))).draws
    assert len(draws) == count
    return [group(each.draw, each.attempt) for each in draws]


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


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": ({"trajectories": (trajectory((VOCABULARY,)),) * 2}, "outside the vocabulary"),
    "prompt": ({"prompt_ids": np.array([VOCABULARY], np.int32)}, "prompt_ids holds 20"),
    "unknown version": ({"version": 3}, "policy version 3 is not one of the run's"),
    "task": ({"task": "chess"}, "task is 'chess', the run's is 'arithmetic'"),
    "group size": ({"trajectories": (trajectory(),)}, "number of responses is 1, the run's is 2"),
    "temperature": ({"sampling": SamplingParameters(0.7, 8)}, "sampling.temperature is 0.7"),
    "length": ({"trajectories": (trajectory((5,) * 9),) * 2}, "9 sampled tokens, sampling.max_tokens is 8"),
    "context": ({"prompt_ids": np.full(63, 5, np.int32)}, "the model's context is 64"),
    "max_tokens": ({"sampling": SamplingParameters(1.0, 9)}, "sampling.max_tokens is 9"),
}


@pytest.mark.parametrize("name", INVALID)
async def test_a_group_that_is_not_this_runs_is_refused_for_good_and_says_why(
    running: Running, learner: Learner, ingest: Ingest, name: str
) -> None:
    fields, reason = INVALID[name]
    (one,) = await lease(running)
    stream = await ingest.greeted()
    ack = await send(stream, group(one.draw, one.attempt, **fields))
    assert (ack.status, ack.retry_after_ms) == (Ack.STATUS_INVALID, 0)
    assert reason in ack.reason
    assert f"draw {one.draw}" in ack.reason
    assert (await send(stream, one)).status == Ack.STATUS_ACCEPTED  # the stream lives on
    assert (await ingest.store.state()).sequence == 1


async def test_a_malformed_message_is_refused_for_good(running: Running, learner: Learner, ingest: Ingest) -> None:
    (one,) = await lease(running)
    message = to_message(one)
    message.trajectories[1].behaviour_logprobs.data = b"\0"
    ack = await send(await ingest.greeted(), message)
    assert ack.status == Ack.STATUS_INVALID
    assert "response 1: behaviour_logprobs states 1 elements of 4 bytes but holds 1" in ack.reason
    message = to_message(one)
    message.trajectories[0].spans[0].policy_step = 5
    assert "comes from step 0, not 5" in (await send(await ingest.greeted(), message)).reason


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
    from sapo_learner.errors import Unavailable

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
        ({"schema_version": 2}, "schema version 2, this run's is 1"),
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


async def test_a_message_beyond_the_limit_ends_its_stream_and_nobody_elses(
    running: Running, learner: Learner, ingest: Ingest
) -> None:
    (one,) = await lease(running)
    other = await ingest.greeted()
    message = to_message(one)
    message.engine = "x" * MAX_MESSAGE_BYTES
    code, _ = await refusal(await ingest.greeted(), request(message))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await send(other, one)).status == Ack.STATUS_ACCEPTED


async def test_health_needs_no_token(ingest: Ingest) -> None:
    stub = health_pb2_grpc.HealthStub(ingest.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
