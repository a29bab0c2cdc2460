"""A group's trace goes into the log with it, and into every event about it; a malformed one costs nothing."""

from dataclasses import replace

import pytest

from protos.sapo.v1 import ingest_pb2 as pb
from services.wire import decode, to_message
from tests.ingest_door import Ingest, lease, send
from tests.logs import heard
from tests.small_run import Learner, Running

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACE = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


async def test_what_becomes_of_a_group_is_told_with_its_draw_and_trace(
    running: Running, learner: Learner, ingest: Ingest
) -> None:
    one, two = [replace(each, traceparent=TRACE) for each in await lease(running, 2)]
    malformed = to_message(two)
    malformed.trajectories[0].ClearField("rewards")
    stream = await ingest.greeted()
    with heard() as events:
        accepted = await send(stream, one)
        for other in (one, malformed, two):
            await send(stream, other)
    about_one, other_one, invalid, expired = [each for each in events if "draw" in each]
    assert {each["trace_id"] for each in (about_one, other_one, invalid, expired)} == {TRACE_ID}
    assert {each["worker"] for each in events if "draw" in each} == {"w"}
    assert [each["draw"] for each in (about_one, other_one, invalid, expired)] == [one.draw] * 2 + [two.draw] * 2
    assert (about_one["level"], about_one["entry"]) == ("DEBUG", accepted.entry_id)
    assert other_one["level"] == "INFO", "a duplicate is worth a word, and every accepted group is not"
    assert "accepted before" in other_one["message"]
    assert (invalid["level"], expired["level"]) == ("WARNING", "INFO")
    assert "offered again" in expired["message"]


@pytest.mark.parametrize(("sent", "kept"), [(TRACE, TRACE), ("", ""), ("nonsense", ""), (TRACE * 1000, "")])
async def test_the_log_holds_a_trace_or_none(
    running: Running, learner: Learner, ingest: Ingest, sent: str, kept: str
) -> None:
    (one,) = await lease(running)
    message = to_message(one)
    message.traceparent = sent
    ack = await send(await ingest.greeted(), message)
    assert ack.status == pb.Ack.STATUS_ACCEPTED, ack.reason
    (entry,) = await ingest.store.read(0, 10)
    assert decode(entry.payload).traceparent == kept
    assert (b"nonsense" in entry.payload, len(entry.payload) < 1000) == (False, True)


async def test_another_trace_does_not_make_it_another_group(running: Running, learner: Learner, ingest: Ingest) -> None:
    (one,) = await lease(running)
    stream = await ingest.greeted()
    assert (await send(stream, replace(one, traceparent=TRACE))).status == pb.Ack.STATUS_ACCEPTED
    assert (await send(stream, one)).status == pb.Ack.STATUS_DUPLICATE
