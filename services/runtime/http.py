"""HTTP parts that every process shares: probes, the bearer token, errors as JSON, and the server itself."""

import asyncio
import contextlib
import hmac
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from sapo_learner.errors import ConfigError, SapoError, Unauthenticated
from services.runtime.lifecycle import Lifecycle


def parse_address(address: str, *, where: str) -> tuple[str, int]:
    """ "127.0.0.1:8080" -> ("127.0.0.1", 8080); port 0 takes a free one."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(
            f"{address!r} is not HOST:PORT", where=where, fix="for example 127.0.0.1:8080; port 0 is free choice"
        )
    return host, int(port)


def probe_app(lifecycle: Lifecycle, registry: CollectorRegistry) -> FastAPI:
    """/healthz (alive), /readyz (ready, or for what it waits), /metrics; and every SapoError as its JSON."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> Response:
        waiting = lifecycle.waiting_for
        return JSONResponse({"ready": not waiting, "waiting_for": waiting}, status_code=503 if waiting else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(SapoError)
    async def sapo_error(_: Request, error: SapoError) -> JSONResponse:
        body = {"code": error.code, "what": error.what, "where": error.where, "fix": error.fix}
        return JSONResponse({"error": body}, status_code=error.http_status)

    return app


def bearer_check(token: str) -> Callable[..., None]:
    """A FastAPI dependency that refuses any other token, in constant time."""
    scheme = HTTPBearer(auto_error=False)

    def check(credentials: HTTPAuthorizationCredentials | None = Depends(scheme)) -> None:
        given = credentials.credentials if credentials else ""
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise Unauthenticated(
                "wrong or missing token", where="Authorization header", fix="set SAPO_TOKEN to the run's"
            )

    return check


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the process' own lifecycle handles them


@contextlib.asynccontextmanager
async def serving(app: FastAPI, address: str) -> AsyncIterator[str]:
    """Serve `app` while the block runs; yields the URL with the port that was really taken."""
    host, port = parse_address(address, where="--listen")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # `sapo up` holds the port across restarts
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen: {error.strerror}", where=address, fix="choose another --listen address"
        ) from None
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2)
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            if task.done():
                await task
            await asyncio.sleep(0.005)
        yield f"http://{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
