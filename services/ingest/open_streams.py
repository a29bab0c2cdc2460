"""How many streams may be open, so that those who only connect take nothing from those who work."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator

from sapo_learner.errors import Unavailable
from services.runtime.seldom import Seldom

log = logging.getLogger(__name__)
MAX_SILENT, MAX_STREAMS = 64, 512  # that have not said hello, and that have
_STREAM = "StreamTrajectoryGroups"


class Counted(Unavailable):
    """Refusals that may come a thousand times: the log says how many."""


class OpenStreams:
    def __init__(self) -> None:
        self._silent: dict[asyncio.Timeout, None] = {}  # of streams before their hello, the oldest first
        self._greeted, self._silent_note, self._full_note = 0, Seldom(), Seldom()

    @contextlib.asynccontextmanager
    async def before_hello(self, seconds: float) -> AsyncIterator[None]:
        """Raises Counted when the block takes longer, and at once in the oldest of too many such blocks."""
        try:
            async with asyncio.timeout(seconds) as timeout:
                self._silent[timeout] = None
                if len(self._silent) > MAX_SILENT:
                    oldest = next(iter(self._silent))
                    del self._silent[oldest]
                    oldest.reschedule(asyncio.get_running_loop().time())
                try:
                    yield
                finally:
                    self._silent.pop(timeout, None)
        except TimeoutError:
            if count := self._silent_note.due():
                log.warning("%d streams ended: no hello in time, or the oldest of more than %d", count, MAX_SILENT)
            what, fix = f"no hello within {seconds:g} s", "connect again, and say hello first"
            raise Counted(what, where=_STREAM, fix=fix) from None

    @contextlib.contextmanager
    def greeted(self, worker: str) -> Iterator[None]:
        """A stream that said hello. Raises Counted when there are too many."""
        if self._greeted >= MAX_STREAMS:
            if count := self._full_note.due():
                log.warning("%d streams are open: %d refused, the last of %s", self._greeted, count, worker)
            raise Counted(f"{MAX_STREAMS} streams are open already", where=_STREAM, fix="start another ingest")
        self._greeted += 1
        try:
            yield
        finally:
            self._greeted -= 1
