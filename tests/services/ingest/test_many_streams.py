"""A thousand streams that say nothing, or do nothing: bounded, said, and the run goes on beside them."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import grpc
import pytest
import pytest_asyncio

from protos.sapo.v1 import ingest_pb2 as pb
from protos.sapo.v1 import ingest_pb2_grpc as pb_grpc
from sapo_learner.errors import Unavailable
from services.ingest import service
from services.ingest.open_streams import MAX_SILENT, MAX_STREAMS
from services.runtime.grpc_errors import from_rpc
from services.runtime.http import parse_address
from tests.descriptors import require_many
from tests.ingest_door import AUTHORIZED, Ingest, hello, lease, send
from tests.small_run import Learner, Running

THOUSAND = 1000
PER_CONNECTION = dict(service._BOUNDS)["grpc.max_concurrent_streams"]


@pytest_asyncio.fixture
async def doors(ingest: Ingest) -> AsyncIterator[list[Any]]:
    """What opens a thousand streams, over as many connections as that needs."""
    require_many()
    async with AsyncExitStack() as stack:
        doors: list[Any] = []
        while len(doors) < THOUSAND:
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(ingest.address, options=options))
            stub = pb_grpc.TrajectoryIngestServiceStub(channel)  # type: ignore[no-untyped-call]
            doors += [partial(stub.StreamTrajectoryGroups, metadata=AUTHORIZED)] * PER_CONNECTION
        yield doors[:THOUSAND]


async def ended(streams: list[Any], count: int) -> list[Any]:
    """Wait until so many of them are over; which."""
    async with asyncio.timeout(60):
        while len(over := [each for each in streams if each.done()]) < count:
            await asyncio.sleep(0.02)
    return over


async def test_streams_without_a_hello_take_no_place_from_a_worker(
    running: Running, learner: Learner, ingest: Ingest, doors: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    ingest.servicer._hello_seconds = 3600  # which is not what ends them
    one, two = await lease(running, 2)
    before = await ingest.greeted()
    crowd = [door() for door in doors]
    over = await ended(crowd, THOUSAND - MAX_SILENT)
    after = await ingest.greeted()
    for stream, group in ((before, one), (after, two)):
        assert (await send(stream, group)).status == pb.Ack.STATUS_ACCEPTED
    assert {await each.code() for each in over} == {grpc.StatusCode.UNAVAILABLE}
    said = [record.message for record in caplog.records if "streams ended" in record.message]
    assert said == [f"1 streams ended: no hello in time, or the oldest of more than {MAX_SILENT}"], "once a minute"


async def test_greeted_streams_that_send_nothing_are_bounded_and_the_run_goes_on(
    running: Running, learner: Learner, ingest: Ingest, doors: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    (one,) = await lease(running)
    stream = await ingest.greeted()
    answers: Counter[str] = Counter()
    crowd: list[Any] = []
    async with asyncio.timeout(60):
        for door in doors:
            crowd.append(each := door())
            await each.write(hello(worker="idle"))
            try:
                answers[(await each.read()).WhichOneof("message")] += 1
            except grpc.aio.AioRpcError as error:
                refusal = from_rpc(error, where="test")
                assert isinstance(refusal, Unavailable), refusal
                answers[refusal.what] += 1
    assert answers == {
        "welcome": MAX_STREAMS - 1,
        f"{MAX_STREAMS} streams are open already": THOUSAND - MAX_STREAMS + 1,
    }
    assert (await send(stream, one)).status == pb.Ack.STATUS_ACCEPTED
    said = [record.message for record in caplog.records if "streams are open" in record.message]
    assert said == [f"{MAX_STREAMS} streams are open: 1 refused, the last of idle"]
    crowd[0].cancel()
    async with asyncio.timeout(10):
        while True:  # its place is free as soon as ingest has noticed
            with contextlib.suppress(grpc.aio.AioRpcError):
                await ingest.greeted()
                break


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = dict(service._BOUNDS) | {"grpc.server_handshake_timeout_ms": 500, "grpc.max_connection_idle_ms": 500}
    monkeypatch.setattr(service, "_BOUNDS", list(changed.items()))


async def test_connections_that_never_speak_http2_are_ended_and_so_are_those_without_a_call(
    impatient: None, running: Running, learner: Learner, ingest: Ingest
) -> None:
    require_many()
    host, port = parse_address(ingest.address, where="test")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # and empty settings
    (one,) = await lease(running)
    lines = []
    for index in range(THOUSAND):
        lines.append(await asyncio.open_connection(host, port))
        lines[-1][1].write((b"", b"PRI * HT", preface, preface + b"\0\0")[index % 4])
    assert (await send(await ingest.greeted(), one)).status == pb.Ack.STATUS_ACCEPTED
    async with asyncio.timeout(30):  # gRPC's own limits are a minute and more
        for reader, writer in lines:
            with contextlib.suppress(ConnectionError):
                await reader.read()  # to its end
            writer.close()
