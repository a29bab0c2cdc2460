"""Questions to processes from outside: is one ready, what do those of a `sapo up` wait for, what does a run say."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sapo_learner.errors import NotFound, SapoError, Unavailable
from services.run_directory import LocalServices, is_url, live_services, require_url, run_config
from services.runtime.auth import Credential
from services.runtime.client import ControlPlaneClient
from services.runtime.http import parse_address
from services.runtime.settings import Environment
from services.runtime.tls import SCHEME, meaning_for_client

PROBE_SECONDS, PATIENCE_SECONDS = 2.0, 3.0
Question = Callable[[ControlPlaneClient], Awaitable[dict[str, Any]]]


async def waiting_for(address: str, timeout: float) -> list[str]:
    """What a process waits for, [] when it is ready; raises Unavailable when it gives no answer."""
    return await (_http if is_url(address) else _grpc)(address, timeout)


async def _http(address: str, timeout: float) -> list[str]:
    require_url(address)
    try:
        verify = Environment().tls.client_context()() if address.startswith(SCHEME) else True
        async with httpx.AsyncClient(timeout=timeout, verify=verify) as client:
            response = await client.get(f"{address.rstrip('/')}/readyz")
            body = response.json()
            ready, waits = bool(body["ready"]), [str(each) for each in body["waiting_for"]]
    except httpx.HTTPError as error:
        said = str(error) or type(error).__name__
        what, fix = meaning_for_client(said) or (said, "is it running there?")
        raise Unavailable(f"no answer: {what}", where=address, fix=fix) from None
    except (ValueError, KeyError, TypeError):
        raise Unavailable(
            f"HTTP {response.status_code}, but no answer of a service of ours", where=address, fix="is it the address?"
        ) from None
    return [] if ready else waits or ["something it does not name"]


async def _grpc(address: str, timeout: float) -> list[str]:
    parse_address(address, where="ADDRESS")
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(
                f"no answer: {error.details()}",
                where=address,
                fix="is ingest running there? Under TLS, ask at its --health-listen",
            ) from None
    # The standard health service has no place for a reason.
    return [] if answer.status == health_pb2.HealthCheckResponse.SERVING else ["what its HTTP port's /readyz names"]


async def processes(services: LocalServices) -> list[dict[str, Any]]:
    """Each process of a `sapo up`: its id, since when it runs (None: it does not), and what it waits for."""

    async def look(name: str, pid: int | None, http: str) -> dict[str, Any]:
        since = _running_since(pid)
        waits: list[str] = []
        if since is not None and http:
            try:
                waits = await waiting_for(f"http://{http}", PROBE_SECONDS)
            except SapoError as error:
                waits = [error.what]
        return {"name": name, "pid": pid, "since": since, "waiting_for": waits}

    return await asyncio.gather(
        *(look(name, each.get("pid"), each.get("http", "")) for name, each in services.processes.items())
    )


def _running_since(pid: int | None) -> float | None:
    try:
        return psutil.Process(pid).create_time() if pid else None
    except psutil.Error:
        return None


async def ask(run: str, question: Question) -> dict[str, Any]:
    """Put a question to a run's control plane, found by its directory or URL."""
    if is_url(run):
        require_url(run)
        url, token = run, Environment().credential()
    else:
        if not Path(run).exists() and re.fullmatch(r"[\w.-]+:\d+", run):
            raise NotFound(
                "no such directory", where=run, fix=f"a control plane's URL begins with http://: http://{run}"
            )
        services = _services_of(Path(run))
        url, token = services.control_plane_url, Credential(services.token)
    try:
        async with ControlPlaneClient(url, token, tls=Environment().tls, patience=PATIENCE_SECONDS) as control:
            answer = await question(control)
    except (ValueError, TypeError):
        answer = None
    if not isinstance(answer, dict):
        raise Unavailable("something answers there that is no control plane", where=url, fix="is it the address?")
    return answer


def _services_of(directory: Path) -> LocalServices:
    if not directory.is_dir():
        raise NotFound("no such directory", where=str(directory), fix="give runs/NAME or a control plane's URL")
    services = live_services(directory)
    if services is None:
        run_config(directory)  # says so when it is no run at all
        raise NotFound(
            "no `sapo up` runs on this directory", where=str(directory), fix="`sapo ledger` also reads a stopped run"
        )
    return services
