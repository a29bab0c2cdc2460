"""The ingest process: from its start to a graceful end."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr

from protos.sapo.v1 import ingest_pb2 as pb
from protos.sapo.v1 import ingest_pb2_grpc as pb_grpc
from sapo_learner.errors import ConfigError, Unavailable
from services.ingest import service
from services.ingest.service import SERVICE, serve
from services.runstore import EmbeddedRedis
from services.runtime.grpc_errors import from_rpc
from services.runtime.lifecycle import Lifecycle
from services.runtime.settings import Environment
from tests.ingest_door import AUTHORIZED, Ingest, hello, request, send
from tests.small_run import TOKEN, Learner, Running, group


def environment(running: Running, redis: EmbeddedRedis) -> Environment:
    return Environment(control_plane_url=running.url, redis_url=SecretStr(redis.url), token=SecretStr(TOKEN))


@dataclass
class Serving:
    lifecycle: Lifecycle
    address: str
    probes: str
    process: asyncio.Task[None]

    async def stop(self) -> None:
        self.lifecycle.stopping.set()
        async with asyncio.timeout(10):
            await self.process


@asynccontextmanager
async def serving(running: Running, redis: EmbeddedRedis) -> AsyncIterator[Serving]:
    """As `sapo serve ingest` runs it, but it looks at Redis more often."""
    lifecycle, announced = Lifecycle(), asyncio.get_running_loop().create_future()
    with socket.create_server(("127.0.0.1", 0)) as free:
        probes = f"127.0.0.1:{free.getsockname()[1]}"
    process = asyncio.create_task(
        serve(
            lifecycle, environment(running, redis), listen="127.0.0.1:0", http_listen=probes,
            announce=announced.set_result, watch_seconds=0.1,
        )
    )  # fmt: skip
    try:
        async with asyncio.timeout(10):
            yield Serving(lifecycle, await announced, f"http://{probes}/readyz", process)
    finally:
        lifecycle.stopping.set()
        await process


async def test_it_announces_its_port_serves_and_ends_in_peace(running: Running, redis: EmbeddedRedis) -> None:
    async with serving(running, redis) as ingest:
        async with grpc.aio.insecure_channel(ingest.address) as channel:
            watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), metadata=AUTHORIZED)
            await until(watched, health_pb2.HealthCheckResponse.SERVING)
        assert ingest.lifecycle.waiting_for == []
        await ingest.stop()


async def until(watched: Any, status: int) -> None:
    """The health service says so sooner or later."""
    while (await watched.read()).status != status:
        pass


async def test_health_and_readiness_follow_redis(
    running: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Away, and there but silent: each look has a time limit."""
    serves, waits = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    with EmbeddedRedis(tmp_path / "redis") as redis:

        def tell(number: signal.Signals) -> None:
            os.kill(redis.pid or 0, number)

        async with (
            serving(running, redis) as ingest,
            grpc.aio.insecure_channel(ingest.address) as channel,
            httpx.AsyncClient() as http,
        ):
            stub = health_pb2_grpc.HealthStub(channel)
            watched = [
                stub.Watch(health_pb2.HealthCheckRequest(service=name), metadata=AUTHORIZED) for name in ("", SERVICE)
            ]
            for away, back in (
                (redis.stop, redis.start),
                (partial(tell, signal.SIGSTOP), partial(tell, signal.SIGCONT)),
            ):
                for each in watched:
                    await until(each, serves)
                assert (await http.get(ingest.probes)).status_code == 200
                await asyncio.to_thread(away)
                for each in watched:
                    await until(each, waits)
                answer = await http.get(ingest.probes)
                assert answer.status_code == 503
                assert f"127.0.0.1:{redis.port}" in answer.json()["waiting_for"][0]
                await asyncio.to_thread(back)
            for each in watched:
                await until(each, serves)
    said = [record.message for record in caplog.records if record.message.startswith("waiting: ")]
    assert len(said) <= 2 * 4, "once per distinct reason, not per look"


async def test_a_client_that_says_nothing_is_sent_away(learner: Learner, ingest: Ingest) -> None:
    ingest.servicer._hello_seconds = 0.05
    silent = ingest.open()
    async with asyncio.timeout(10):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await silent.read()
    error = from_rpc(caught.value, where="elsewhere")
    assert type(error) is Unavailable
    assert str(error) == "StreamTrajectoryGroups: no hello within 0.05 s (connect again, and say hello first)"


MOST = 20_000
# A client that takes little in before it reads: by default gRPC lets megabytes of acks through first.
NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024), ("grpc.use_local_subchannel_pool", 1)]


async def flooded(channel: grpc.aio.Channel) -> Any:
    """A stream on which groups were sent, and no ack read, until nothing moved any more."""
    stub = pb_grpc.TrajectoryIngestServiceStub(channel)  # type: ignore[no-untyped-call]
    stream = stub.StreamTrajectoryGroups(metadata=AUTHORIZED)
    await stream.write(hello())
    message = request(group(99, 1, engine="x" * 10_000))
    with suppress(TimeoutError):
        for _ in range(MOST):
            async with asyncio.timeout(0.3):
                await stream.write(message)
        raise AssertionError("ingest took everything")
    return stream


async def test_a_client_that_reads_no_acks_fills_nothing_but_its_own_window(learner: Learner, ingest: Ingest) -> None:
    """Ingest takes no further group until the ack before is gone: the sender stands still, others do not."""
    async with grpc.aio.insecure_channel(ingest.address, options=NARROW) as channel:
        await flooded(channel)
        assert (await send(await ingest.greeted(), group(99, 1))).status == pb.Ack.STATUS_EXPIRED


async def test_streams_that_say_nothing_or_read_nothing_do_not_hold_up_the_end(
    running: Running, learner: Learner, redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "DRAIN_SECONDS", 0.2)
    async with (
        serving(running, redis) as ingest,
        grpc.aio.insecure_channel(ingest.address, options=NARROW) as channel,
    ):
        stub = pb_grpc.TrajectoryIngestServiceStub(channel)  # type: ignore[no-untyped-call]
        silent = stub.StreamTrajectoryGroups(metadata=AUTHORIZED)
        await silent.wait_for_connection()
        await flooded(channel)
        started = time.monotonic()
        await ingest.stop()
        assert time.monotonic() - started < 3
        assert await silent.code() is not grpc.StatusCode.OK


async def test_a_taken_port_is_said(running: Running, redis: EmbeddedRedis) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"{address}: another process listens there"):
            await serve(Lifecycle(), environment(running, redis), listen=address, http_listen="127.0.0.1:0")
