"""HTTP parts that every process shares: probes, the bearer token, errors as JSON, and the server itself."""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sapo_learner.errors import ConfigError, NotFound, SapoError, Unauthenticated, Unavailable
from services.runtime import roles
from services.runtime.auth import Tokens, wrong_token
from services.runtime.connections import BoundedProtocol
from services.runtime.error_parts import to_parts
from services.runtime.lifecycle import Lifecycle
from services.runtime.roles import Role
from services.runtime.seldom import Refusals
from services.runtime.tls import Tls
from services.runtime.tls_handshake import under_tls

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 16 << 20
BODY_SECONDS = 60.0  # without another piece of a body
BODY_BYTES_PER_SECOND = 4096  # that a body comes with at least, once those seconds are over


def parse_address(address: str, *, where: str) -> tuple[str, int]:
    """ "127.0.0.1:8080" -> ("127.0.0.1", 8080); port 0 takes a free one."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(
            f"{address!r} is not HOST:PORT", where=where, fix="for example 127.0.0.1:8080; port 0 is free choice"
        )
    return host.strip("[]"), int(port)


def refuse_taken(address: str) -> None:
    """ConfigError when somebody listens there already.

    `sapo up` holds its ports with SO_REUSEPORT, so binding alone does not fail: the kernel would share requests out.
    """
    host, port = parse_address(address, where="--listen")
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1.0):
        raise ConfigError("another process listens there", where=address, fix="stop it, or choose another address")


def probe_app(lifecycle: Lifecycle, registry: CollectorRegistry) -> FastAPI:
    """/healthz (alive), /readyz (ready, or for what it waits), /metrics; and every error as JSON."""
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

    _answer_errors(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Every error, ours or not, as {"error": {kind, code, what, where, fix}}."""

    @app.exception_handler(SapoError)
    async def ours(_: Request, error: SapoError) -> JSONResponse:
        return _body(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        wrong = [f"{'.'.join(map(str, each['loc'])) or 'body'}: {each['msg']}" for each in error.errors()]
        return _body(ConfigError("; ".join(wrong), where=_place(request), fix="run both ends at the same version"))

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> JSONResponse:
        kind = NotFound if error.status_code == 404 else SapoError
        return _body(kind(str(error.detail), where=_place(request), fix="the API begins with /v1"), error.status_code)

    @app.exception_handler(ClientDisconnect)
    async def stopped(request: Request, error: ClientDisconnect) -> JSONResponse:
        return _body(ConfigError("the body stopped in its middle", where=_place(request), fix="send it again"), 408)

    @app.exception_handler(OSError)
    async def disk(request: Request, error: OSError) -> JSONResponse:
        # Unavailable, so that the caller tries again: a full disk slows the run and loses nothing.
        log.error("%s: %s", _place(request), error)
        return _body(Unavailable(str(error), where=_place(request), fix="make room on the disk"))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return _body(SapoError(f"{type(error).__name__}: {error}", where=_place(request), fix="see the service's log"))


def _body(error: SapoError, status: int | None = None) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthenticated) else None
    return JSONResponse({"error": to_parts(error)}, status_code=status or error.http_status, headers=headers)


def _place(request: Request) -> str:
    return f"{request.method} {request.url.path}"


class Door:
    """ASGI middleware before everything under /v1: the token first, then its role, then the body's size.

    A browser that has logged in has a cookie in the token's place. It opens what a viewer may read, whoever has logged
    in: so no other site can make the browser change anything.

    Before routing, because FastAPI reads and parses a body before it looks at a route's dependencies.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens) -> None:
        self._app, self._tokens, self._refusals = app, tokens, Refusals("HTTP")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" and scope["path"].startswith("/v1") else None
        await (self._app if refusal is None else _body(refusal))(scope, _unstalled(receive), send)

    def _refusal(self, scope: Scope) -> SapoError | None:
        headers = dict(scope["headers"])
        refused = self._refused(scope["method"], scope["path"], headers)
        if refused is not None:
            self._refusals.note(str((scope["client"] or ["somewhere"])[0]), str(refused)[:200], kind=refused.what)
            return refused
        if scope["method"] == "PUT":  # blobs go to a file as they come
            return None
        length = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return ConfigError(f"bodies state a length of at most {MAX_BODY_BYTES} bytes", where=scope["path"])
        return None

    def _refused(self, method: str, path: str, headers: dict[bytes, bytes]) -> SapoError | None:
        role = self._tokens.role(headers.get(b"authorization", b""))
        if role is None and method in ("GET", "HEAD") and self._tokens.has_cookie(headers.get(b"cookie", b"")):
            role = Role.VIEWER
        return wrong_token() if role is None else roles.refusal(role, roles.of_route(method, path), f"{method} {path}")


def _unstalled(receive: Receive) -> Receive:
    """As if the client had hung up when it stops in the middle of a body, or sends it drop by drop."""
    whole, since, received = False, time.monotonic(), 0

    async def bounded() -> Message:
        nonlocal whole, received
        if whole:
            return await receive()
        slowest = since + BODY_SECONDS + received / BODY_BYTES_PER_SECOND
        try:
            async with asyncio.timeout(min(BODY_SECONDS, slowest - time.monotonic())):
                message = await receive()
        except TimeoutError:
            whole = True
            return {"type": "http.disconnect"}
        whole, received = not message.get("more_body", False), received + len(message.get("body", b""))
        return message

    return bounded


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the process' own lifecycle handles them


class Front:
    """An ASGI application that can be replaced by another while it is being served."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, address: str, tls: Tls | None = None) -> AsyncIterator[str]:
    """Serve `app` while the block runs, maybe under TLS; yields the URL with the port that was really taken."""
    secure = tls is not None and tls.serves
    protocol: Any = BoundedProtocol
    if tls and secure:
        protocol = under_tls(BoundedProtocol, tls.server_contexts(), Refusals("HTTP"))
    listener = await asyncio.to_thread(_bind, address)
    config = uvicorn.Config(
        app, http=protocol, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=2,
        headers=[("X-Content-Type-Options", "nosniff")],
    )  # fmt: skip
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            if task.done():
                await task
                raise Unavailable("the HTTP server ended while it started", where=address)
            await asyncio.sleep(0.005)
        yield f"{'https' if secure else 'http'}://{address.rpartition(':')[0]}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


def _bind(address: str) -> socket.socket:
    refuse_taken(address)
    host, port = parse_address(address, where="--listen")
    # The protocol is named because asyncio turns Nagle's algorithm off only then: it costs 40 ms per answer.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # `sapo up` holds the port across restarts
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen: {error.strerror}", where=address, fix="choose another --listen address"
        ) from None
    return listener
