"""A worker's view of ingest: streams, hellos, groups, and how ingest ends a stream.

stream = await ingest.greeted()
ack = await send(stream, group(draw, attempt))
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc

from protos.sapo.v1 import ingest_pb2 as pb
from protos.sapo.v1 import ingest_pb2_grpc as pb_grpc
from protos.sapo.v1 import trajectory_pb2
from sapo_learner.trajectory import TrajectoryGroup
from services.ingest.servicer import IngestServicer
from services.runstore import RunStore
from services.wire import to_message
from tests.small_run import TOKEN, Running, group, lease_request, snapshot_files, snapshot_manifest

AUTHORIZED = (("authorization", f"Bearer {TOKEN}"),)
MANIFEST = snapshot_manifest(0, snapshot_files("any"))


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


async def lease(running: Running, count: int = 1) -> list[TrajectoryGroup]:
    """Groups that answer freshly leased draws."""
    draws = (await running.client.lease(lease_request(count=count))).draws
    assert len(draws) == count
    return [group(each.draw, each.attempt) for each in draws]
