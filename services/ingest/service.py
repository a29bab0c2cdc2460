"""`sapo serve ingest`: the gRPC server around IngestServicer, with health, token check and probes."""

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from protos.sapo.v1 import ingest_pb2, ingest_pb2_grpc
from sapo_learner.errors import ConfigError
from services.ingest.servicer import IngestServicer
from services.runstore import RunStore
from services.runtime.client import ControlPlaneClient
from services.runtime.http import probe_app, refuse_taken, serving
from services.runtime.lifecycle import Lifecycle
from services.runtime.metrics import IngestMetrics
from services.runtime.settings import Environment
from services.wire import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)
SERVICE = ingest_pb2.DESCRIPTOR.services_by_name["TrajectoryIngestService"].full_name
DRAIN_SECONDS = 5.0


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without the run's token, the health service excepted."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        given = dict(details.invocation_metadata or ()).get("authorization", "")
        if details.method.startswith("/grpc.health.") or hmac.compare_digest(str(given).encode(), self._expected):
            return await continuation(details)

        async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "authorization metadata: wrong or missing token (set SAPO_TOKEN to the run's)",
            )

        return grpc.stream_stream_rpc_method_handler(refuse)


async def serve(
    lifecycle: Lifecycle,
    environment: Environment,
    *,
    listen: str,
    http_listen: str,
    announce: Callable[[str], None] = print,
) -> None:
    """listen: gRPC HOST:PORT. http_listen: probes and metrics. announce: told the gRPC address that was taken."""
    token = environment.require("token")
    await asyncio.to_thread(refuse_taken, listen)
    metrics = IngestMetrics()
    async with serving(probe_app(lifecycle, metrics.registry), http_listen):
        lifecycle.wait_for("start", "the control plane's configuration")
        async with ControlPlaneClient(environment.require("control_plane_url"), token) as control:
            config = await control.config()
        lifecycle.wait_for("start", "Redis")
        async with await RunStore.connect(environment.require("redis_url"), config.run.name) as store:
            server, probe = _server(token, IngestServicer(config, store, metrics))
            try:
                port = server.add_insecure_port(listen)
            except RuntimeError as error:
                raise ConfigError(
                    f"cannot listen: {error}", where=listen, fix="choose another --listen address"
                ) from None
            await server.start()
            await probe.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
            await probe.set("", health_pb2.HealthCheckResponse.SERVING)
            address = f"{listen.rpartition(':')[0]}:{port}"
            log.info("ingest of run %r on %s", config.run.name, address)
            announce(address)
            lifecycle.ready()
            await lifecycle.stopping.wait()
            await probe.enter_graceful_shutdown()
            await asyncio.shield(server.stop(grace=DRAIN_SECONDS))


def _server(token: str, servicer: IngestServicer) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    server = grpc.aio.server(interceptors=[TokenInterceptor(token)], options=options)
    ingest_pb2_grpc.add_TrajectoryIngestServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    probe = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(probe, server)
    return server, probe
