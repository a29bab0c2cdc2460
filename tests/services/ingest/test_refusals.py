"""Every malformed group: its status, a sentence of what, where and what to do; nothing is lost, nothing is twice."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from protos.sapo.v1 import ingest_pb2 as pb
from protos.sapo.v1 import trajectory_pb2
from sapo_learner import errors
from sapo_learner.trajectory import MAX_INTEGER
from services.rollout.sender import GroupSender
from services.runstore.log import MAX_REFUSALS
from services.runtime.auth import wrong_token
from services.runtime.grpc_errors import from_rpc
from services.runtime.settings import RunConfig
from services.wire import to_message
from tests.ingest_door import MANIFEST, Ingest, hello, lease, send
from tests.services.ingest.conftest import MAX_MESSAGE_BYTES
from tests.small_run import VOCABULARY, Learner, Running, group, lease_request, run_config

Ack = pb.Ack
Message = trajectory_pb2.TrajectoryGroup
Change = Callable[[Message], Any]


def ids(*values: int) -> dict[str, Any]:
    return {"dtype": trajectory_pb2.DTYPE_INT32, "length": len(values), "data": np.array(values, "<i4").tobytes()}


def logprobs(*values: float) -> dict[str, Any]:
    return {"dtype": trajectory_pb2.DTYPE_FLOAT32, "length": len(values), "data": np.array(values, "<f4").tobytes()}


def first(name: str, array: dict[str, Any]) -> Change:
    """Another array in the first response, which has two tokens."""
    return lambda message: getattr(message.trajectories[0], name).CopyFrom(trajectory_pb2.Array(**array))


def long(message: Message) -> None:
    """Nine sampled tokens, one more than the run's limit."""
    for name, array in (
        ("token_ids", ids(*[5] * 9)),
        ("behaviour_logprobs", logprobs(*[-1.0] * 9)),
        ("loss_mask", {"dtype": trajectory_pb2.DTYPE_BOOL, "length": 9, "data": b"\1" * 9}),
    ):
        first(name, array)(message)
    message.trajectories[0].spans[0].length = 9


def prompt(*values: int) -> Change:
    return lambda message: message.prompt_ids.CopyFrom(trajectory_pb2.Array(**ids(*values)))


def span(**fields: int) -> Change:
    return lambda message: [setattr(message.trajectories[0].spans[0], *each) for each in fields.items()]


def sampling(**fields: float) -> Change:
    return lambda message: [setattr(message.sampling, *each) for each in fields.items()]


def fields(**values: Any) -> Change:
    return lambda message: [setattr(message, *each) for each in values.items()]


# What is sent -> where (behind the draw), what, and a word of what to do.
MALFORMED: dict[str, tuple[Change, str, str, str]] = {
    "fewer log-probs": (first("behaviour_logprobs", logprobs(-1)), ", response 0", "shape (1,), expected (2,)", "one"),
    "NaN": (first("behaviour_logprobs", logprobs(-1, np.nan)), ", response 0, token 1", "nan is not finite", "record"),
    "infinite": (first("behaviour_logprobs", logprobs(np.inf, -1)), ", response 0, token 0", "inf is not", "record"),
    "positive": (first("behaviour_logprobs", logprobs(-1, 0.5)), ", response 0, token 1", "0.5 is above 0", "record"),
    "unknown version": (span(policy_version=3), ", response 0, token 0", "version 3 is not one of", "control plane"),
    "another step": (span(policy_step=5), ", response 0, token 0", "comes from step 0, not 5", "control plane"),
    "absurd version": (span(policy_version=2**64 - 1), ", response 0, token 0", "is not one of", "control plane"),
    "spans too short": (span(length=1), ", response 0", "spans cover 1 tokens of 2", "policy of every token"),
    "spans too long": (span(length=2**32 - 1), ", response 0", "cover 4294967295 tokens", "policy of every token"),
    "mask length": (
        first("loss_mask", {"dtype": trajectory_pb2.DTYPE_BOOL, "length": 3, "data": b"\1\1\1"}),
        ", response 0", "loss_mask has shape (3,)", "mask value",
    ),
    "negative token": (first("token_ids", ids(5, -2)), ", response 0, token 1", "token id -2 is negative", "tokenizer"),
    "vocabulary": (first("token_ids", ids(5, VOCABULARY)), ", response 0, token 1", "vocabulary of 20", "tokenizer"),
    "prompt id": (prompt(4, VOCABULARY), ", prompt, token 1", "token id 20 is outside", "tokenizer"),
    "negative prompt id": (prompt(-1), ", prompt, token 0", "-1 is negative", "tokenizer"),
    "task": (fields(task="chess"), "", "task is 'chess', the run's is 'arithmetic'", "settings"),
    "endless task": (fields(task="x" * 5000), "", "x...", "settings"),
    "group size": (lambda m: m.trajectories.pop(), "", "number of responses is 1, the run's is 2", "settings"),
    "temperature": (sampling(temperature=0.7), "", "sampling.temperature is 0.7", "settings"),
    "max_tokens": (sampling(max_tokens=9), "", "sampling.max_tokens is 9", "settings"),
    "too many tokens": (long, ", response 0", "9 sampled tokens, sampling.max_tokens is 8", "settings"),
    "context": (prompt(*[5] * 63), ", response 0", "65 tokens, the model's context is 64", "lower"),
    "top_p": (sampling(top_p=0.9), "", "truncated sampling (top_p 0.9", "use top_p 1"),
    "top_k": (sampling(top_k=50), "", "truncated sampling (top_p 1.0, top_k 50)", "top_k 0"),
    "schema": (fields(schema_version=2), "", "schema version 2, this sapo reads 1", "upgrade"),
    "reward": (lambda m: m.trajectories[1].rewards.update({"correct": np.nan}), ", response 1", "is nan", "finite"),
    "no response": (lambda m: m.ClearField("trajectories"), "", "no response", "group_size"),
    "dtype": (first("token_ids", logprobs(5, 6)), ", response 0", "dtype DTYPE_FLOAT32, expected", "same version"),
    "bytes": (first("token_ids", ids(5, 6) | {"length": 3}), ", response 0", "3 elements of 4 bytes", "same version"),
    "seed": (fields(seed=MAX_INTEGER + 1), "", "seed out of range", "control plane"),
    "nothing": (lambda m: [m.ClearField(f.name) for f in m.DESCRIPTOR.fields if f.name not in ("draw", "attempt")],
                "", "DTYPE_UNSPECIFIED", "same version"),
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Steps large enough that pacing stops nobody here."""
    return run_config(tmp_path, training={"groups_per_step": 100})


async def test_a_malformed_group_is_refused_with_a_reason_and_its_draw_is_sampled_again(
    running: Running, learner: Learner, ingest: Ingest
) -> None:
    """All over one stream, which goes on after each."""
    stream, accepted = await ingest.greeted(), []
    for name, (change, where, what, fix) in MALFORMED.items():
        (one,) = (await running.client.lease(lease_request())).draws
        bad = to_message(group(one.draw, one.attempt))
        change(bad)
        ack = await send(stream, bad)
        assert (ack.status, ack.draw, ack.attempt, ack.retry_after_ms) == (Ack.STATUS_INVALID, one.draw, 1, 0), name
        place, _, rest = ack.reason.partition(": ")
        assert place == f"draw {one.draw}{where}", name
        assert what in rest, name
        assert fix in rest, name
        assert rest.endswith("; the draw is offered again"), name
        # The draw comes again as it was, and the malformed attempt is over.
        (again,) = (await running.client.lease(lease_request())).draws
        assert again == one.model_copy(update={"attempt": 2}), name
        assert (await send(stream, bad)).status == Ack.STATUS_EXPIRED, name
        assert (await send(stream, group(again.draw, again.attempt))).status == Ack.STATUS_ACCEPTED, name
        accepted.append(one.draw)
        await nothing_lost_or_doubled(ingest, accepted)


async def nothing_lost_or_doubled(ingest: Ingest, accepted: list[int], still_open: tuple[int, ...] = ()) -> None:
    state = await ingest.store.state()
    assert [entry.draw for entry in await ingest.store.read(0, 100)] == accepted
    assert state.sequence == len(accepted)
    assert {each.draw for each in state.leases} | state.reoffered == set(still_open)
    assert state.next_draw == len(accepted) + len(still_open)


async def test_what_is_settled_is_said_with_what_to_do(running: Running, learner: Learner, ingest: Ingest) -> None:
    one, two = await lease(running, 2)
    stream = await ingest.greeted()
    assert (await send(stream, one)).status == Ack.STATUS_ACCEPTED
    closed = await send(stream, one)
    assert closed.status == Ack.STATUS_DUPLICATE
    assert closed.reason.startswith(f"draw {one.draw}, attempt 1: accepted before (forget")
    for stale in (group(two.draw, 2), group(99, 1), group(MAX_INTEGER, 2**32 - 1)):
        ack = await send(stream, stale)
        assert ack.status == Ack.STATUS_EXPIRED
        assert ack.reason.startswith(f"draw {stale.draw}, attempt {stale.attempt}: offered again, or never leased")
        assert "(forget this group" in ack.reason
    await nothing_lost_or_doubled(ingest, [one.draw], (two.draw,))


@pytest.mark.parametrize("change", [fields(draw=2**63), fields(draw=2**64 - 1), fields(attempt=0)])
async def test_absurd_numbers_reach_nobody_elses_draw(
    running: Running, learner: Learner, ingest: Ingest, change: Change
) -> None:
    (one,) = await lease(running)
    absurd = to_message(one)
    change(absurd)
    stream = await ingest.greeted()
    assert (await send(stream, absurd)).status == Ack.STATUS_EXPIRED
    assert (await send(stream, one)).status == Ack.STATUS_ACCEPTED
    await nothing_lost_or_doubled(ingest, [one.draw])


async def test_a_group_that_comes_again_is_a_duplicate_also_when_its_version_was_forgotten_meanwhile(
    running: Running, learner: Learner, ingest: Ingest
) -> None:
    one, two = await lease(running, 2)
    stream = await ingest.greeted()
    assert (await send(stream, one)).status == Ack.STATUS_ACCEPTED
    await learner.publish(1)
    assert await ingest.store.forget(0)
    ingest.servicer._versions = {}  # as another replica, or this one later
    assert (await send(stream, one)).status == Ack.STATUS_DUPLICATE
    assert (await send(stream, group(two.draw, two.attempt + 1))).status == Ack.STATUS_EXPIRED
    ack = await send(stream, two)
    assert (ack.status, "version 0 is not one" in ack.reason) == (Ack.STATUS_INVALID, True)
    await nothing_lost_or_doubled(ingest, [one.draw], (two.draw,))


async def test_a_valid_group_costs_one_round_trip(
    running: Running, learner: Learner, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await lease(running, 2)
    stream = await ingest.greeted()
    await send(stream, one)
    calls: list[Any] = []
    call = ingest.store._call

    async def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return await call(*args, **options)

    monkeypatch.setattr(ingest.store, "_call", counted)
    assert (await send(stream, two)).status == Ack.STATUS_ACCEPTED
    assert len(calls) == 1


async def test_a_draw_whose_groups_are_all_malformed_is_set_aside_open_and_loudly(
    running: Running, learner: Learner, ingest: Ingest, caplog: pytest.LogCaptureFixture
) -> None:
    stream, reasons = await ingest.greeted(), []
    for _ in range(MAX_REFUSALS):
        (bad,) = (await running.client.lease(lease_request())).draws
        assert bad.draw == 0
        message = to_message(group(bad.draw, bad.attempt))
        first("behaviour_logprobs", logprobs(-1, 0.5))(message)
        reasons.append((await send(stream, message)).reason)
    assert "set aside" in reasons[-1]
    assert not any("set aside" in reason for reason in reasons[:-1])
    assert [record.levelno for record in caplog.records if "invalid group" in record.message][-1] == logging.ERROR
    (other,) = (await running.client.lease(lease_request())).draws
    assert (await send(stream, group(other.draw, other.attempt))).status == Ack.STATUS_ACCEPTED
    await nothing_lost_or_doubled(ingest, [1], (0,))
    ledger = await running.plane.ledger()
    assert ledger["balanced"], ledger["problems"]


async def test_nobody_ends_the_lease_of_another_worker(running: Running, learner: Learner, ingest: Ingest) -> None:
    (one,) = await lease(running)
    stranger = ingest.open()
    await stranger.write(hello(worker="stranger"))
    await stranger.read()
    bad = to_message(one)
    bad.task = "chess"
    ack = await send(stranger, bad)
    assert (ack.status, ack.reason.endswith("the draw is another worker's")) == (Ack.STATUS_INVALID, True)
    assert (await send(await ingest.greeted(), one)).status == Ack.STATUS_ACCEPTED


# ---- the limit of a message


def large(message: Message) -> Message:
    message.engine = "x" * MAX_MESSAGE_BYTES
    return message


async def test_a_message_beyond_the_limit_ends_its_stream_and_nobody_elses(
    running: Running, learner: Learner, ingest: Ingest
) -> None:
    one, two = await lease(running, 2)
    other, stream = await ingest.greeted(), await ingest.greeted()
    await stream.write(pb.StreamTrajectoryGroupsRequest(group=large(to_message(one))))
    async with asyncio.timeout(10):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = from_rpc(caught.value, where="ingest")
    assert type(error) is errors.InvalidTrajectory
    assert str(MAX_MESSAGE_BYTES) in error.what
    assert "lower sampling.max_tokens or sampling.group_size" in error.fix
    assert (await send(other, two)).status == Ack.STATUS_ACCEPTED
    assert (await send(await ingest.greeted(), one)).status == Ack.STATUS_ACCEPTED
    await nothing_lost_or_doubled(ingest, [two.draw, one.draw])


async def test_a_sender_told_so_by_ingest_does_not_send_it_again_and_again(
    running: Running, learner: Learner, ingest: Ingest
) -> None:
    (one,) = await lease(running)
    sender = GroupSender(ingest.address, "the-run's-token", hello().hello)
    run = asyncio.create_task(sender.run())
    sending = asyncio.create_task(sender.send(group(one.draw, one.attempt, engine="x" * MAX_MESSAGE_BYTES)))
    async with asyncio.timeout(10):
        with pytest.raises(errors.InvalidTrajectory, match=r"larger than max.*lower sampling.max_tokens"):
            await run
    sending.cancel()
    assert (await send(await ingest.greeted(), one)).status == Ack.STATUS_ACCEPTED


# ---- who knocks


async def ending(stream: Any) -> errors.SapoError:
    async with asyncio.timeout(10):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
    return from_rpc(caught.value, where="elsewhere")


async def test_a_wrong_token_gets_the_sentence_of_the_http_door(ingest: Ingest) -> None:
    error = await ending(ingest.open((("authorization", "Bearer wrong"),)))
    assert (type(error), str(error)) == (errors.Unauthenticated, str(wrong_token()))


@pytest.mark.parametrize("name", ["", "x" * 201, "x" * 10_000, "two\nlines", "\x00", "\N{ZERO WIDTH SPACE}"])
async def test_a_name_that_is_none_is_refused(learner: Learner, ingest: Ingest, name: str) -> None:
    stream = ingest.open()
    await stream.write(hello(worker=name))
    error = await ending(stream)
    assert type(error) is errors.ConfigError
    assert "1 to 200 printable characters" in error.what
    assert len(str(error)) < 500


async def test_bytes_that_are_no_message_end_their_stream_alone(
    running: Running, learner: Learner, ingest: Ingest
) -> None:
    """A lone surrogate in a name, for example, which no protobuf of ours would write."""
    (one,) = await lease(running)
    stream = await ingest.greeted()
    raw = hello(worker="abc").SerializeToString().replace(b"abc", b"\xed\xa0\x80")
    method = "/sapo.v1.TrajectoryIngestService/StreamTrajectoryGroups"
    call = ingest.channel.stream_stream(method)(metadata=(("authorization", "Bearer the-run's-token"),))
    await call.write(raw)
    error = await ending(call)
    assert type(error) is errors.InvalidTrajectory
    assert "not a message of sapo.v1" in error.what
    assert "same version" in error.fix
    assert (await send(stream, one)).status == Ack.STATUS_ACCEPTED


async def test_digests_that_differ_say_what_to_do(learner: Learner, ingest: Ingest) -> None:
    stream = ingest.open()
    await stream.write(hello(tokenizer_digest="f" * 64))
    error = await ending(stream)
    assert (type(error), error.where) == (errors.Mismatch, "w")
    assert f"tokenizer_digest ffffffffffff differs from the run's {MANIFEST.tokenizer_digest[:12]}" in error.what
    assert "published policy" in error.fix


async def test_without_a_token_a_probe_s_request_is_not_even_read(ingest: Ingest) -> None:
    probe = ingest.channel.unary_unary(
        "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
    )
    large = bytes(2 * MAX_MESSAGE_BYTES)  # no request of the health service, and more than the server would take
    async with asyncio.timeout(20):
        for _ in range(20):
            assert (await probe(large)).status == health_pb2.HealthCheckResponse.SERVING
