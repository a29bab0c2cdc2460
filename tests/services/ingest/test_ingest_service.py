"""The ingest process: from its start to a graceful end."""

import asyncio
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr

from sapo_learner.errors import ConfigError
from services.ingest.service import serve
from services.runstore import EmbeddedRedis
from services.runtime.lifecycle import Lifecycle
from services.runtime.settings import Environment
from tests.small_run import TOKEN, Running


def environment(running: Running, redis: EmbeddedRedis) -> Environment:
    return Environment(control_plane_url=running.url, redis_url=SecretStr(redis.url), token=SecretStr(TOKEN))


async def test_it_announces_its_port_serves_and_ends_in_peace(running: Running, redis: EmbeddedRedis) -> None:
    lifecycle, announced = Lifecycle(), asyncio.get_running_loop().create_future()
    process = asyncio.create_task(
        serve(
            lifecycle, environment(running, redis), listen="127.0.0.1:0", http_listen="127.0.0.1:0",
            announce=announced.set_result,
        )
    )  # fmt: skip
    async with asyncio.timeout(10):
        address = await announced
    async with grpc.aio.insecure_channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert lifecycle.waiting_for == []
    lifecycle.stopping.set()
    async with asyncio.timeout(10):
        await process


async def test_a_taken_port_is_said(running: Running, redis: EmbeddedRedis) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"{address}: another process listens there"):
            await serve(Lifecycle(), environment(running, redis), listen=address, http_listen="127.0.0.1:0")
