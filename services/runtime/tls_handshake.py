"""A server's connections under TLS, made so that a handshake that fails is in the log, with its peer.

asyncio tells nobody of a handshake that fails on a server's socket: the connection is gone, and neither protocol nor
exception handler has heard of it. So the socket is a plain one to it, and TLS starts here.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Any

from services.runtime.seldom import Refusals, Seldom
from services.runtime.tls import meaning_for_server

log = logging.getLogger(__name__)
HANDSHAKE_SECONDS = 10.0
MAX_HANDSHAKES = 256  # under way at once
FAREWELL_SECONDS = 1.0  # for the peer of a connection that is closed to say so, too: one that is idle does not


class Handshake(asyncio.Protocol):
    """Shakes hands, then leaves the connection to `inner`."""

    def __init__(self, inner: asyncio.Protocol, context: Callable[[], ssl.SSLContext], refusals: Refusals) -> None:
        self._inner, self._context, self._refusals = inner, context, refusals
        self._early: list[bytes] = []  # came with the handshake's last bytes
        self._lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        _under_way[self] = transport
        if len(_under_way) > MAX_HANDSHAKES:
            _end_oldest()
        self._task = asyncio.get_running_loop().create_task(self._shake(transport))

    def data_received(self, data: bytes) -> None:
        self._early.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True

    async def _shake(self, transport: asyncio.Transport) -> None:
        host, loop = str((transport.get_extra_info("peername") or ["somewhere"])[0]), asyncio.get_running_loop()
        try:
            secure = await loop.start_tls(
                transport, self, self._context(), server_side=True,
                ssl_handshake_timeout=HANDSHAKE_SECONDS, ssl_shutdown_timeout=FAREWELL_SECONDS,
            )  # fmt: skip
        except OSError as error:
            said = str(error) or type(error).__name__
            what, fix = meaning_for_server(said) or (said, "")
            self._refusals.note(host, f"no TLS: {what}" + (f" ({fix})" if fix else ""))
            return
        finally:
            _under_way.pop(self, None)
        if secure is None or self._lost:
            return
        secure.set_protocol(self._inner)
        self._inner.connection_made(secure)
        for data in self._early:
            self._inner.data_received(data)


_under_way: dict[Handshake, asyncio.Transport] = {}  # the oldest first
_note = Seldom()


def _end_oldest() -> None:
    """So that those who connect and say nothing take no connection from those who ask."""
    oldest = next(iter(_under_way))
    transport = _under_way.pop(oldest)
    if count := _note.due():
        peer = transport.get_extra_info("peername")
        log.warning("more than %d TLS handshakes under way: %d ended, the last with %s", MAX_HANDSHAKES, count, peer)
    transport.abort()


def under_tls(
    protocol: Callable[..., asyncio.Protocol], context: Callable[[], ssl.SSLContext], refusals: Refusals
) -> Callable[..., asyncio.Protocol]:
    """What makes the protocol of a server's next connection, as uvicorn calls it."""

    def make(**options: Any) -> asyncio.Protocol:
        return Handshake(protocol(**options), context, refusals)

    return make
