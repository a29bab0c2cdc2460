"""Copies the log from Redis to the archive, and hands the archive to the training loop as its log.

Append strictly by id, fsync, then one fenced trim of Redis up to there: whatever dies in between, the next reader finds
every entry in one of the two places, and a repeat is a no-op. When Redis was lost, emptied or replaced by an older one,
the reader (and only it) rebuilds the log from the archive.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import takewhile

from sapo_learner.archive import Archive, Entry
from sapo_learner.control import GROUP
from sapo_learner.errors import Corrupt, Unavailable
from services.runstore import RunStore

log = logging.getLogger(__name__)
READ_COUNT = 64
FRAME_BYTES = 32 << 20  # entries archived at once, bounding memory
BLOCK_MS = 500
RETRY_SECONDS = 2.0


class Reader:
    def __init__(
        self,
        store: RunStore,
        archive: Archive,
        token: int,
        *,
        patience: float = 60.0,
        waiting: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        """patience: seconds without Redis before `run` gives up; waiting: told of them, and None when they are over."""
        self._store, self._archive, self._token = store, archive, token
        self._patience, self._waiting = patience, waiting
        self._said = False  # that the disk is full
        self._trimmed = -1  # up to which sequence Redis was trimmed by us
        self.archive_seconds = 0.0
        """Spent on writing to the archive, so far."""

    async def mend(self) -> None:
        """Rebuild the log in Redis if it does not go on from the archive."""
        reason = await self._store.needs_rebuild(self._archive.head)
        if reason is None:
            return
        head = self._archive.head
        if head.sequence or "generation" not in reason:
            log.warning("rebuilding the log in Redis from entry %d of the archive: %s", head.sequence, reason)
        draws = await asyncio.to_thread(lambda: list(self._archive.draws()))
        # Never the same number twice, also when nothing was archived under it: attempts are counted from it.
        generation = await asyncio.to_thread(self._archive.claim_generation)
        behind = replace(head, generation=generation - 1)
        await self._store.rebuild(self._token, behind, draws, uncounted=self._archive.controls)

    async def count_controls(self) -> None:
        """Tell pacing how many entries are no groups, and hence count towards no step."""
        await self._store.set_uncounted(self._token, self._archive.controls)

    async def run(self) -> None:
        """Read for ever; training goes on with what is archived while Redis is away."""
        answered = time.monotonic()
        while True:
            try:
                await self.read(BLOCK_MS)
            except Unavailable as error:
                if time.monotonic() - answered > self._patience:
                    raise
                self._waiting(str(error))
                await asyncio.sleep(BLOCK_MS / 1000)
            else:
                answered = time.monotonic()
                self._waiting(None)

    async def settle(self) -> None:
        """Read until the archive holds everything that is in the log now."""
        while True:
            await self.read(0)
            state = await self._store.state()
            if state.generation is not None and self._archive.head.sequence >= state.sequence:
                return

    async def read(self, block_ms: int) -> None:
        """Move what is there; waits up to `block_ms` for something."""
        entries = await self._store.read(self._archive.head.sequence, READ_COUNT, block_ms)
        if not entries:
            await self.mend()
            await self._trim()  # a learner before us may have died before it did
            return
        try:
            for part in _frames(entries):
                started = time.monotonic()
                await asyncio.to_thread(self._archive.append, part)
                _tell(part)
                self.archive_seconds += time.monotonic() - started
            self._said = False
        except Corrupt:
            if await self._store.needs_rebuild(self._archive.head) is None:
                raise
            await self.mend()
        except OSError as error:
            if not self._said:
                log.error("archive %s: %s; reading stops until there is room", self._archive.directory, error)
            self._said = True
            await asyncio.sleep(RETRY_SECONDS)
            return
        await self._trim()

    async def _trim(self) -> None:
        """Have Redis forget what is archived, unless it has."""
        head = self._archive.head
        if head.sequence == self._trimmed:
            return
        try:
            await self._store.trim(self._token, head)
            self._trimmed = head.sequence
        except Corrupt:  # Redis was set back since these entries were read
            if await self._store.needs_rebuild(self._archive.head) is None:
                raise
            await self.mend()


def _tell(archived: list[Entry]) -> None:
    for each in archived if log.isEnabledFor(logging.DEBUG) else ():
        if each.kind == GROUP:
            fields = {"entry": each.id, "draw": each.draw}
            log.debug("draw %d is archived as entry %s", each.draw, each.id, extra=fields)


def _frames(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Consecutive entries, together at most FRAME_BYTES, or a single larger one."""
    part: list[Entry] = []
    size = 0
    for entry in entries:
        if part and size + len(entry.payload) > FRAME_BYTES:
            yield part
            part, size = [], 0
        part.append(entry)
        size += len(entry.payload)
    yield part


class ArchiveLog:
    """sapo_learner.train.Log over the archive: blocks the training thread until a step's entries are there."""

    def __init__(self, archive: Archive | None) -> None:
        """archive: None on a rank of the learner that is told of entries by another, and never asks here."""
        self._given = archive
        self._stopping = threading.Event()
        self._waited_seconds = 0.0
        self._waiting_since: float | None = None
        self.waiting_for = ""

    @property
    def _archive(self) -> Archive:
        assert self._given is not None, "only the first rank has an archive"
        return self._given

    @property
    def waited_seconds(self) -> float:
        """Spent in `next` so far, a call that goes on included; from any thread."""
        since = self._waiting_since
        return self._waited_seconds + (0.0 if since is None else time.monotonic() - since)

    def next(self, after: int, count: int) -> list[Entry] | None:
        started = self._waiting_since = time.monotonic()
        try:
            while not self._stopping.is_set():
                have = self._archive.head.sequence - after
                if have >= count:
                    return self._archive.read(after, count)
                self.waiting_for = f"groups: {have} of {count}"
                self._archive.wait(after + count - 1, timeout=0.2)
            return None
        finally:
            self._waiting_since = None
            self._waited_seconds += time.monotonic() - started
            self.waiting_for = ""

    def controls(self, after: int, *, anywhere: bool = False) -> list[Entry]:
        entries = self._archive.entries(after)
        if anywhere:
            return [entry for entry in entries if entry.kind != GROUP]
        return list(takewhile(lambda entry: entry.kind != GROUP, entries))

    def pause(self, seconds: float) -> bool:
        """Let the training thread wait; returns whether it shall stop."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._archive.closed:
            if self._stopping.wait(0.1):
                return True
        return self._archive.closed

    def stop(self) -> None:
        """Let `next` return None, now and from now on."""
        self._stopping.set()
