"""`sapo serve ingest`: the gRPC server around IngestServicer, with health, token check and probes."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from protos.sapo.v1 import ingest_pb2
from sapo_learner.errors import ConfigError, SapoError
from services.ingest.interceptor import TokenInterceptor
from services.ingest.servicer import IngestServicer
from services.runstore import RunStore
from services.runtime.auth import Tokens
from services.runtime.client import ControlPlaneClient
from services.runtime.http import probe_app, refuse_taken, serving
from services.runtime.lifecycle import Lifecycle
from services.runtime.logging import of_run
from services.runtime.metrics import IngestMetrics
from services.runtime.settings import Environment
from services.runtime.tls import Tls
from services.wire import MAX_MESSAGE_BYTES
from services.wire_shape import parse_request

log = logging.getLogger(__name__)
SERVICE = ingest_pb2.DESCRIPTOR.services_by_name["TrajectoryIngestService"].full_name
DRAIN_SECONDS = 5.0
# What a connection may cost that does nothing, or too much: one that never speaks HTTP/2, one without a call, pings.
_BOUNDS = [
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_connection_idle_ms", 60_000),
    ("grpc.max_concurrent_streams", 16),  # of one connection; a worker has one
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 3),
]
MAX_PROBE_BYTES = 4096
WATCH_SECONDS = 2.0  # between two looks at Redis, and the time limit of each


async def serve(
    lifecycle: Lifecycle,
    environment: Environment,
    *,
    listen: str,
    http_listen: str,
    health_listen: str = "",
    announce: Callable[[str], None] = print,
    watch_seconds: float = WATCH_SECONDS,
) -> None:
    """listen: gRPC HOST:PORT. http_listen: probes and metrics. health_listen: gRPC health alone, without TLS.

    announce: told the gRPC address that was taken.
    """
    url, redis_url = (environment.require(name) for name in ("control_plane_url", "redis_url"))
    token, tokens, tls = environment.credential(), environment.tokens(), environment.tls
    await asyncio.to_thread(refuse_taken, listen)
    metrics, patience = IngestMetrics(), environment.patience_seconds
    async with serving(probe_app(lifecycle, metrics.registry), http_listen):
        async with ControlPlaneClient(
            url, token, tls=tls, patience=patience, waiting=lifecycle.peer("control plane")
        ) as control:
            config = await control.config()
            of_run(control.run)
        async with await RunStore.connect(
            redis_url, config.run.name, patience=patience, waiting=lifecycle.peer("Redis")
        ) as store:
            server, probe = _server(tokens, IngestServicer(config, store, metrics))
            address = await _started(server, listen, tls)
            log.info("ingest of run %r on %s", config.run.name, address)
            announce(address)
            lifecycle.ready()
            async with _plain_health(probe, health_listen):
                await _watch(lifecycle, store, probe, watch_seconds)
            await probe.enter_graceful_shutdown()
            await asyncio.shield(server.stop(grace=DRAIN_SECONDS))


async def _started(server: grpc.aio.Server, listen: str, tls: Tls) -> str:
    try:
        if tls.serves:
            port = server.add_secure_port(listen, tls.server_credentials())
        else:
            port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise ConfigError(f"cannot listen: {error}", where=listen, fix="choose another --listen address") from None
    await server.start()
    return f"{listen.rpartition(':')[0]}:{port}"


@contextlib.asynccontextmanager
async def _plain_health(probe: health.aio.HealthServicer, listen: str) -> AsyncIterator[None]:
    """The health service on a port of its own, for probes that speak no TLS. listen: "" for none."""
    if not listen:
        yield
        return
    await asyncio.to_thread(refuse_taken, listen)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_PROBE_BYTES)])
    health_pb2_grpc.add_HealthServicer_to_server(probe, server)
    await _started(server, listen, Tls())
    try:
        yield
    finally:
        await server.stop(grace=0)


async def _watch(lifecycle: Lifecycle, store: RunStore, probe: health.aio.HealthServicer, seconds: float) -> None:
    """Until the process stops: serving, ready and Redis within reach are one and the same."""
    redis = lifecycle.peer("Redis")
    while not lifecycle.stopping.is_set():
        try:
            await store.ping(seconds)
        except SapoError as error:
            redis(str(error))
            status = health_pb2.HealthCheckResponse.NOT_SERVING
        else:
            redis(None)
            status = health_pb2.HealthCheckResponse.SERVING
        for name in (SERVICE, ""):
            await probe.set(name, status)
        await lifecycle.sleep(seconds)


def _handler(servicer: IngestServicer) -> grpc.GenericRpcHandler:
    """As the generated code has it, but no message is decoded before its shape is known to be small."""
    stream = grpc.stream_stream_rpc_method_handler(
        servicer.StreamTrajectoryGroups,
        request_deserializer=parse_request,
        response_serializer=ingest_pb2.StreamTrajectoryGroupsResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(SERVICE, {"StreamTrajectoryGroups": stream})


def _server(
    tokens: Tokens, servicer: IngestServicer, *, max_message_bytes: int = MAX_MESSAGE_BYTES
) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
    options = [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        *_BOUNDS,
    ]
    server = grpc.aio.server(interceptors=[TokenInterceptor(tokens)], options=options)
    server.add_generic_rpc_handlers((_handler(servicer),))
    probe = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(probe, server)
    return server, probe
