"""HTTP connections, and what one may cost that asks nothing, or takes nothing of what it asked for."""

import asyncio
import fcntl
import logging
import socket
import struct
import termios
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from services.runtime.seldom import Seldom, SeldomWarnings

log = logging.getLogger(__name__)
HEAD_SECONDS = 20.0  # for a connection's first request head
TAKE_SECONDS = 30.0  # in which a client takes a piece of what waits for it
MAX_STRANGERS = 256  # connections that have not asked for anything yet


class BoundedProtocol(H11Protocol):
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
        before, self._taken_when_idle = self._taken_when_idle, taken_bytes(self.transport)
        if not on_its_way(self.transport) or self._taken_when_idle == before:
            super().timeout_keep_alive_handler()
            return
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


def on_its_way(transport: asyncio.Transport) -> bool:
    """Whether something waits that the peer's system has not acknowledged."""
    queued = bytearray(4)
    try:
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
    except (OSError, AttributeError):
        return transport.get_write_buffer_size() > 0
    return any(queued)


_ACKED = 120  # where Linux' struct tcp_info has tcpi_bytes_acked
_strangers: dict[BoundedProtocol, None] = {}  # of which no request has come yet, the oldest first
_note, _unread_note = Seldom(), Seldom()
logging.getLogger("uvicorn.error").addFilter(SeldomWarnings())


def _send_away(stranger: BoundedProtocol) -> None:
    """So that those who connect and ask nothing take no connection from those who ask."""
    del _strangers[stranger]
    if count := _note.due():
        log.warning(
            "more than %d connections that ask nothing: %d closed, the oldest first, the last from %s",
            MAX_STRANGERS, count, stranger.client,
        )  # fmt: skip
    stranger.transport.abort()
