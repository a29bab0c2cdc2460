"""`sapo health ADDRESS`: the readiness of one process, over HTTP or the standard gRPC health service."""

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sapo_learner.errors import Unavailable
from services.runtime.http import parse_address


async def check(address: str, timeout: float) -> str:
    """ "ready"; raises Unavailable with what the process waits for, or why it cannot be asked."""
    return await (_http if address.startswith(("http://", "https://")) else _grpc)(address, timeout)


async def _http(address: str, timeout: float) -> str:
    try:
        async with httpx.AsyncClient(timeout=timeout) as client:
            response = await client.get(f"{address.rstrip('/')}/readyz")
            waiting = response.json().get("waiting_for", [])
    except (httpx.HTTPError, ValueError, AttributeError) as error:
        raise Unavailable(
            f"no answer: {error or type(error).__name__}", where=address, fix="is it running there?"
        ) from None
    if response.status_code != 200:
        raise Unavailable(f"not ready: waits for {', '.join(waiting) or 'something'}", where=address)
    return "ready"


async def _grpc(address: str, timeout: float) -> str:
    parse_address(address, where="ADDRESS")
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"no answer: {error.details()}", where=address, fix="is ingest running there?") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable("not serving", where=address)
    return "ready"
