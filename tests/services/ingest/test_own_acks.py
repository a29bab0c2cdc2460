"""What Redis forgets after it was acknowledged is said and counted, once."""

import logging

import pytest

from protos.sapo.v1 import ingest_pb2 as pb
from sapo_learner.archive import Head
from services.ingest.own_acks import OwnAcks
from tests.ingest_door import Ingest, lease, send
from tests.small_run import Learner, Running


def test_concurrent_appends_that_answer_out_of_order_are_no_loss() -> None:
    acks = OwnAcks()
    before = acks.now()
    assert [acks.note(before, sequence) for sequence in (3, 1, 2)] == [0, 0, 0]
    assert acks.note(acks.now(), 4) == 0


def test_a_loss_is_counted_once_however_many_appends_were_under_way() -> None:
    acks = OwnAcks(last=10)
    before = acks.now()
    assert [acks.note(before, sequence) for sequence in (7, 8, 9)] == [4, 0, 0]
    assert acks.note(acks.now(), 10) == 0
    assert acks.note(acks.now(), 5) == 6, "and so is the next one"


async def test_groups_that_redis_forgot_are_counted_and_their_draws_sampled_anew(
    running: Running, learner: Learner, ingest: Ingest, caplog: pytest.LogCaptureFixture
) -> None:
    stream = await ingest.greeted()
    for each in await lease(running, 2):
        assert (await send(stream, each)).status == pb.Ack.STATUS_ACCEPTED
    (first,) = await ingest.store.read(0, 1)
    await ingest.store.rebuild(learner.token, Head(first.generation, 1, first.chain), [first.draw])
    again, other = await lease(running, 2)
    assert (again.draw, again.attempt) != (1, 1)
    assert again.draw == 1
    with caplog.at_level(logging.ERROR):
        for each in (again, other):
            assert (await send(stream, each)).status == pb.Ack.STATUS_ACCEPTED
    assert ingest.servicer._metrics.registry.get_sample_value("sapo_ingest_forgotten_groups_total") == 1
    assert caplog.text.count("Redis has forgotten 1 groups") == 1
