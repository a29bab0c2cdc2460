"""A worker of another version at ingest's door: let in inside the range, refused with the range outside."""

import pytest

from protos.sapo.v1 import ingest_pb2 as pb
from sapo_learner import formats
from sapo_learner.errors import Mismatch
from sapo_learner.formats import Format
from sapo_learner.trajectory import TrajectoryGroup
from services.rollout.sender import GroupSender
from services.wire import decode, to_message
from tests.ingest_door import Ingest, hello, send
from tests.small_run import TOKEN, Learner, Running, group, lease_request

OLDEST, NEWEST = 2, 4


@pytest.fixture(autouse=True)
def ranged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "WIRE", Format("schema version", OLDEST, NEWEST))


async def leased(running: Running, version: int) -> TrajectoryGroup:
    (draw,) = (await running.client.lease(lease_request())).draws
    return group(draw.draw, draw.attempt, schema_version=version)


@pytest.mark.parametrize("version", range(OLDEST, NEWEST + 1))
async def test_inside_the_range_its_groups_enter_the_log_as_they_came(
    running: Running, learner: Learner, ingest: Ingest, version: int
) -> None:
    one = await leased(running, version)
    stream = ingest.open()
    await stream.write(hello(schema_version=version))
    assert (await stream.read()).WhichOneof("message") == "welcome"
    assert (await send(stream, one)).status == pb.Ack.STATUS_ACCEPTED
    assert decode((await ingest.store.read(0, 10))[0].payload).schema_version == version


@pytest.mark.parametrize(("version", "fix"), [(1, "upgrade what writes it"), (5, "upgrade whatever reads it first")])
async def test_outside_it_is_refused_for_good_with_both_versions(
    running: Running, learner: Learner, ingest: Ingest, version: int, fix: str
) -> None:
    sender = GroupSender(ingest.address, TOKEN, hello(schema_version=version).hello)
    with pytest.raises(Mismatch) as caught:
        await sender.run()
    assert f"schema version {version}, this ingest reads 2 to 4" in caught.value.what
    assert fix in caught.value.fix


async def test_a_group_that_is_not_of_the_version_its_hello_said_is_refused(
    running: Running, learner: Learner, ingest: Ingest
) -> None:
    message = to_message(await leased(running, NEWEST))
    stream = ingest.open()
    await stream.write(hello(schema_version=OLDEST))
    await stream.read()
    message.schema_version = NEWEST + 1
    ack = await send(stream, message)
    assert (ack.status, "schema version 5, this sapo reads 2 to 4" in ack.reason) == (pb.Ack.STATUS_INVALID, True)
