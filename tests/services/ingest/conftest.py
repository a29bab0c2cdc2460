"""Ingest over real gRPC, beside a control plane and a real run store."""

from collections.abc import AsyncIterator

import grpc
import pytest_asyncio
from grpc_health.v1 import health_pb2

from services.ingest.service import SERVICE, _server
from services.ingest.servicer import IngestServicer
from services.runstore import EmbeddedRedis, RunStore
from services.runtime.auth import Tokens
from services.runtime.metrics import IngestMetrics
from tests.ingest_door import Ingest
from tests.small_run import TOKEN, Running

MAX_MESSAGE_BYTES = 1 << 20


@pytest_asyncio.fixture
async def ingest(running: Running, redis: EmbeddedRedis) -> AsyncIterator[Ingest]:
    async with await RunStore.connect(redis.url, running.config.run.name) as store:
        servicer = IngestServicer(running.config, store, IngestMetrics())
        server, probe = _server(Tokens.one(TOKEN), servicer, max_message_bytes=MAX_MESSAGE_BYTES)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        await probe.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield Ingest(f"127.0.0.1:{port}", store, servicer, channel)
        await server.stop(None)
