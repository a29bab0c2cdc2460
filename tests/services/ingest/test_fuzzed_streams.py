"""Fuzzed requests over real gRPC: each ends its own stream or gets an ack, and ingest works on."""

import asyncio
from random import Random

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos.sapo.v1 import ingest_pb2 as pb
from sapo_learner.errors import InvalidTrajectory, SapoError
from services.runtime.grpc_errors import from_rpc
from services.wire import encode
from services.wire_shape import MAX_PARTS
from tests.ingest_door import AUTHORIZED, Ingest, hello, lease, send
from tests.mutated_groups import mutated, seed, varint
from tests.small_run import Learner, Running

METHOD = "/sapo.v1.TrajectoryIngestService/StreamTrajectoryGroups"
FINAL = {pb.Ack.STATUS_INVALID, pb.Ack.STATUS_EXPIRED}  # nobody leased what is sent here


async def answer(ingest: Ingest, data: bytes) -> int | SapoError:
    """Status of the ack to a group of these bytes, or how the stream ended."""
    call = ingest.channel.stream_stream(METHOD)(metadata=AUTHORIZED)
    async with asyncio.timeout(20):
        await call.write(hello().SerializeToString())
        await call.read()
        await call.write(b"\x12" + varint(len(data)) + data)
        try:
            response = pb.StreamTrajectoryGroupsResponse.FromString(await call.read())
        except grpc.aio.AioRpcError as error:
            return from_rpc(error, where="test")
        call.cancel()
        return response.ack.status


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(random=st.integers(0, 2**32).map(Random))
async def test_ingest_answers_and_works_on(running: Running, learner: Learner, ingest: Ingest, random: Random) -> None:
    outcome = await answer(ingest, mutated(seed(random), random))
    assert outcome in FINAL or isinstance(outcome, InvalidTrajectory), outcome


@pytest.mark.parametrize(
    "bomb", [b"\x7b" * 10_000, b"\x4a\x00" * MAX_PARTS, b"\x4a\xff\xff\xff\xff\x0f", b"\x0a" * 5000]
)
async def test_bombs_end_their_stream_alone(running: Running, learner: Learner, ingest: Ingest, bomb: bytes) -> None:
    (one,) = await lease(running)
    stream = await ingest.greeted()
    assert isinstance(await answer(ingest, bomb), InvalidTrajectory)
    assert (await send(stream, one)).status == pb.Ack.STATUS_ACCEPTED
    assert (await ingest.store.read(0, 10))[0].payload == encode(one)
