"""A worker's view of ingest: streams, hellos, groups, and how ingest ends a stream.

stream = await ingest.greeted()
ack = await send(stream, group(draw, attempt))
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from protos.sapo.v1 import ingest_pb2 as pb
from protos.sapo.v1 import ingest_pb2_grpc as pb_grpc
from protos.sapo.v1 import trajectory_pb2
from sapo_learner.trajectory import TrajectoryGroup
from services.ingest.service import SERVICE, _server
from services.ingest.servicer import IngestServicer
from services.runstore import RunStore
from services.runtime.auth import Tokens
from services.runtime.metrics import IngestMetrics
from services.runtime.settings import RunConfig
from services.wire import MAX_MESSAGE_BYTES, to_message
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


@asynccontextmanager
async def open_ingest(
    config: RunConfig, redis_url: str, *, tokens: Tokens | None = None, max_message_bytes: int = MAX_MESSAGE_BYTES
) -> AsyncIterator[Ingest]:
    """As `sapo serve ingest` starts it, on a free port and without its watch."""
    async with await RunStore.connect(redis_url, config.run.name) as store:
        servicer = IngestServicer(config, store, IngestMetrics())
        server, probe = _server(tokens or Tokens.one(TOKEN), servicer, max_message_bytes=max_message_bytes)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        await probe.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        await probe.set("", health_pb2.HealthCheckResponse.SERVING)
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield Ingest(f"127.0.0.1:{port}", store, servicer, channel)
        await server.stop(None)


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
