"""HTTP parts that every process shares: probes, the bearer token, errors as JSON, and the server itself."""

import asyncio
import contextlib
import logging
import socket
import struct
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
from uvicorn.protocols.http.h11_impl import H11Protocol

from sapo_learner.errors import ConfigError, NotFound, SapoError, Unauthenticated, Unavailable
from services.runtime import roles
from services.runtime.auth import Tokens, wrong_token
from services.runtime.error_parts import to_parts
from services.runtime.lifecycle import Lifecycle
from services.runtime.roles import Role
from services.runtime.seldom import Refusals, Seldom, SeldomWarnings
from services.runtime.tls import Tls
from services.runtime.tls_handshake import under_tls

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 16 << 20
HEAD_SECONDS = 20.0  # for a connection's first request head
BODY_SECONDS = 60.0  # without another piece of a body
BODY_BYTES_PER_SECOND = 4096  # that a body comes with at least, once those seconds are over
TAKE_SECONDS = 30.0  # in which a client takes a piece of what waits for it
MAX_STRANGERS = 256  # connections that have not asked for anything yet


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


class _Protocol(H11Protocol):
    """A connection whose request head is not whole HEAD_SECONDS after it was opened, or after the head's first byte, is
    closed, and so is the oldest of too many without a first one. One whose client takes nothing of its answers for
    TAKE_SECONDS is ended. One that is idle between two requests is uvicorn's to close."""

    _head_timer: asyncio.TimerHandle
    _head_after: Any = None  # the request before the head that the timer is for
    _take_timer: asyncio.TimerHandle | None = None  # while more waits for the client than buffers should hold
    _taken_when_idle = -1

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _strangers[self] = None
        if len(_strangers) > MAX_STRANGERS:
            _send_away(next(iter(_strangers)))
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None:
            _strangers.pop(self, None)
        between = self.cycle is None or self.cycle.response_complete
        if between and self._head_after is not self.cycle:
            self._head_timer.cancel()
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        self._taken()
        _strangers.pop(self, None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_taking()

    def resume_writing(self) -> None:
        self._taken()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """An answer that is still on its way is no idle connection: under TLS, closing would cut it."""
        if (taken := taken_bytes(self.transport)) == self._taken_when_idle:
            super().timeout_keep_alive_handler()
            return
        self._taken_when_idle = taken
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _await_taking(self) -> None:
        taken = taken_bytes(self.transport)
        self._take_timer = self.loop.call_later(TAKE_SECONDS, self._end_unless_more_than, taken)

    def _taken(self) -> None:
        if self._take_timer:
            self._take_timer.cancel()

    def _end_unless_more_than(self, taken: int) -> None:
        if taken_bytes(self.transport) > taken:
            self._await_taking()
            return
        if count := _unread_note.due():
            log.warning("%d connections ended: nothing was read for %g s, by %s", count, TAKE_SECONDS, self.client)
        self.transport.abort()

    def _await_head(self) -> None:
        self._head_after = self.cycle
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close_unless_asked)

    def _close_unless_asked(self) -> None:
        if self.cycle is self._head_after and not self.transport.is_closing():
            self.transport.close()


def taken_bytes(transport: asyncio.Transport) -> int:
    """How many the peer's system has acknowledged. Where ours does not tell: less, the more waits here.

    What waits here is not enough to tell a slow peer: it shrinks when the kernel's buffer, of megabytes, is far enough
    down, and under TLS there is another below it.
    """
    try:
        told = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED + 8)
        return int(struct.unpack_from("Q", told, _ACKED)[0])
    except (OSError, AttributeError, struct.error):
        return -transport.get_write_buffer_size()


_ACKED = 120  # where Linux' struct tcp_info has tcpi_bytes_acked
_strangers: dict[_Protocol, None] = {}  # of which no request has come yet, the oldest first
_note, _unread_note = Seldom(), Seldom()
logging.getLogger("uvicorn.error").addFilter(SeldomWarnings())


def _send_away(stranger: _Protocol) -> None:
    """So that those who connect and ask nothing take no connection from those who ask."""
    del _strangers[stranger]
    if count := _note.due():
        log.warning(
            "more than %d connections that ask nothing: %d closed, the oldest first, the last from %s",
            MAX_STRANGERS, count, stranger.client,
        )  # fmt: skip
    stranger.transport.abort()


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
    protocol: Any = under_tls(_Protocol, tls.server_contexts(), Refusals("HTTP")) if tls and secure else _Protocol
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
