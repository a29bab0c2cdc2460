"""The archive: the durable prefix of the run's log, on disk. Only the learner appends; anyone may read.

Layout. One segment per writer, `segment-<fencing token>.zst`. A segment is a row of zstandard frames, each with its
own checksum; one append is one frame, so a crash tears at most the last one. The first frame holds the header
[FORMAT, token]; every other holds msgpack records [generation, sequence, kind, draw, chain, payload].
`zstdcat segment-00000001.zst` gives the plain records.

Why a segment per token: a writer that was replaced while it slept (I7) can then only ever touch a file of its own.
Segments are read in the order of their tokens and the newest wins: where two hold the same entry nothing happens, and
where they differ the older segment's branch ends. An older writer cannot have removed its branch from Redis, since
that trim is fenced, so nothing that is ended here is lost. For this the token must be taken before opening.

Why the chain: each entry carries the hash of everything before it, so "the same position of the same log" is one
string comparison for archive, Redis and checkpoint. It finds mistakes, not attackers.
"""

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sapo_learner.errors import Corrupt, Fenced
from sapo_learner.segment import Damaged, FrameIndex, decode, encode, frames, fsync, is_whole, next_frame, read_frame

GENESIS = "0" * 40
"""Chain before the first entry."""

FORMAT = "sapo-archive-1"  # heads every segment, beside its token


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the log. `sequence` counts from 1 without gaps, `generation` rises when Redis was lost.

    draw: the draw that the payload answers, -1 when kind is not "group". chain: `link` of the previous entry's chain.
    """

    generation: int
    sequence: int
    kind: str
    draw: int
    chain: str
    payload: bytes

    @property
    def id(self) -> str:
        return f"{self.generation}-{self.sequence}"


@dataclass(frozen=True, slots=True)
class Head:
    """Position of the last entry held; sequence 0 and GENESIS when there is none."""

    generation: int = 0
    sequence: int = 0
    chain: str = GENESIS


def link(previous_chain: str, entry_id: str, kind: str, payload_sha256_hex: str) -> str:
    """Chain of an entry: SHA-1 hex, because Redis scripts can compute that too (`redis.sha1hex`), and must agree."""
    text = "\n".join((previous_chain, entry_id, kind, payload_sha256_hex))
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Archive:
    """All segments of `directory` as one log. With a `token` it may append, with None it only reads.

    Opening reads and checks everything once. In memory stay 32 bytes per append and the last decoded frame. One thread
    may append while others read and wait. Tokens are unique: two writers with the same one are not guarded against.

    Raises Corrupt for damage that a crash cannot explain, Fenced when a newer token has opened the archive.
    """

    def __init__(self, directory: Path, token: int | None) -> None:
        self.directory, self.token = Path(directory), token
        self._writing = threading.Lock()  # held over disk writes, so that readers never wait for an fsync
        self._changed = threading.Condition()  # guards everything below
        self._index = FrameIndex()
        self._head = Head()
        self._ends: dict[int, int] = {}  # token -> byte up to which the segment was read
        self._frame: tuple[tuple[int, int], list[Entry]] | None = None
        self._closed = False
        self._file = -1  # descriptor of our segment
        if token is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._refuse_if_fenced()
        self.refresh()
        if token is not None:
            self._open_segment(token)

    # ---- reading

    @property
    def head(self) -> Head:
        with self._changed:
            return self._head

    @property
    def size_bytes(self) -> int:
        """Bytes of all segments on disk."""
        return sum(self._path(token).stat().st_size for token in self._tokens())

    def read(self, after: int, limit: int) -> list[Entry]:
        """At most `limit` entries with sequence > `after`, in order."""
        return list(islice(self.entries(after), limit))

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """Every entry with sequence > `after`, in order, one frame in memory at a time."""
        while True:
            with self._changed:
                if after >= self._head.sequence:
                    return
                frame = self._from(after + 1)
            yield from frame
            after = frame[-1].sequence

    def wait(self, after: int, timeout: float) -> bool:
        """Block for at most `timeout` seconds until this object holds an entry beyond `after`; whether it does."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._head.sequence > after, timeout)
            return self._head.sequence > after

    def refresh(self) -> None:
        """Take in what other processes appended (for readers). The head steps back where a newer branch won."""
        with self._changed:
            live = max((token for token, end in self._ends.items() if end), default=0)
            for token in self._tokens():
                if token >= live:  # what a replaced writer adds behind a newer one's back does not count
                    self._scan(token)
            self._changed.notify_all()

    # ---- writing

    def append(self, entries: Iterable[Entry]) -> int:
        """Add entries strictly by sequence and return the last sequence held; durable (fsync) on return.

        Entries already held are no-ops. Raises Corrupt (a gap, a chain that does not link, another entry than the one
        held), Fenced (a newer token opened the archive), OSError (disk full: nothing of these entries stays behind).
        """
        with self._writing:
            if self._file < 0 or self.token is None:
                raise RuntimeError("this archive is closed or open for reading only")
            self._refuse_if_fenced()
            fresh = self._unheld(entries)
            if fresh:
                start, size = self._write_frame(self.token, [_record(entry) for entry in fresh])
                with self._changed:
                    self._index.push(fresh[0].sequence, self.token, start, size)
                    self._head = _position(fresh[-1])
                    self._changed.notify_all()
            return self._head.sequence

    def close(self) -> None:
        with self._writing, self._changed:
            self._closed = True
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            self._changed.notify_all()

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside

    def _path(self, token: int) -> Path:
        return self.directory / f"segment-{token:08d}.zst"

    def _tokens(self) -> list[int]:
        stems = (path.stem.removeprefix("segment-") for path in self.directory.glob("segment-*.zst"))
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def _refuse_if_fenced(self) -> None:
        newest = max(self._tokens(), default=0)
        if self.token is not None and newest > self.token:
            raise Fenced(
                f"a learner with token {newest} writes this archive, ours is {self.token}",
                where=str(self.directory),
                fix="stop this process; the newer one goes on",
            )

    def _open_segment(self, token: int) -> None:
        """Create our segment, or cut its torn tail. From here on older writers see it, and a lost Redis its token."""
        self._file = os.open(self._path(token), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(self._file, self._ends.setdefault(token, 0))
            if self._ends[token] == 0:
                self._write_frame(token, [[FORMAT, token]])
            os.fsync(self._file)
            fsync(self.directory)
        except OSError:
            self.close()
            raise

    def _unheld(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those beyond the head, after checking that all of them continue or repeat the log."""
        fresh: list[Entry] = []
        last = self._head
        for entry in entries:
            if 1 <= entry.sequence <= self._head.sequence:
                with self._changed:
                    held = self._from(entry.sequence)[0]
                if held.chain != entry.chain:
                    raise Corrupt(
                        f"entry {entry.id} differs from the archived {held.id}",
                        where=str(self.directory),
                        fix="the log in Redis belongs to another run or was rewritten: rebuild it from the archive",
                    )
                continue
            _check(entry, last, where=str(self.directory))
            fresh.append(entry)
            last = _position(entry)
        return fresh

    def _write_frame(self, token: int, records: list[list[Any]]) -> tuple[int, int]:
        """Write, fsync and account for one frame of our segment; its (offset, size) in bytes."""
        blob, start, written = encode(records), self._ends[token], 0
        try:
            while written < len(blob):
                written += os.pwrite(self._file, memoryview(blob)[written:], start + written)
            os.fsync(self._file)
        except BaseException:
            os.ftruncate(self._file, start)  # also when interrupted: what is half written must not be built upon
            raise
        self._ends[token] = start + len(blob)
        return start, len(blob)

    def _scan(self, token: int) -> None:
        """Take in what a segment holds beyond what was read of it before; a torn tail is left alone."""
        path = self._path(token)
        try:
            for start, end, content in frames(path, self._ends.get(token, 0)):
                if start:
                    self._take(_entries(content, path), token, start, end - start)
                elif decode(content, width=2, where=str(path)) != [[FORMAT, token]]:
                    raise Corrupt(f"not a {FORMAT} segment of token {token}", where=str(path), fix="move it away")
                self._ends[token] = end
        except Damaged as damage:
            # A crash tears only what comes last. A whole frame behind the damage proves that it is not a torn tail.
            following = next_frame(path, damage.offset)
            if following is not None and not is_whole(path, damage.offset):  # or its writer has just completed it
                raise Corrupt(
                    f"damaged at byte {damage.offset} ({damage}), with whole entries from byte {following} on",
                    where=str(path),
                    fix="restore the file from a copy; without one, move it and all newer segments away: the log then "
                    f"ends at entry {self._head.sequence}, and only checkpoints up to there can be resumed",
                ) from None

    def _take(self, entries: list[Entry], token: int, start: int, size: int) -> None:
        """Add a frame read from disk: skip what is held, end an older branch where this newer segment differs."""
        for entry in entries:
            if 1 <= entry.sequence <= self._head.sequence:
                if entry.chain == self._from(entry.sequence)[0].chain:
                    continue
                self._index.cut(entry.sequence)
                before = entry.sequence - 1
                self._head = _position(self._from(before)[0]) if before else Head()
            _check(entry, self._head, where=f"{self._path(token)}, byte {start}")
            self._index.push(entry.sequence, token, start, size)
            self._head = _position(entry)

    def _from(self, sequence: int) -> list[Entry]:
        """Entries of one frame from `sequence`, which is held, up to where a later frame takes over."""
        token, start, size, until = self._index.find(sequence)
        if self._frame is None or self._frame[0] != (token, start):
            path = self._path(token)
            self._frame = (token, start), _entries(read_frame(path, start, size), path)
        entries = self._frame[1]
        first = entries[0].sequence
        return entries[sequence - first : (until or self._head.sequence + 1) - first]


def _check(entry: Entry, last: Head, *, where: str) -> None:
    if entry.sequence != last.sequence + 1:
        fix = f"read again from {last.sequence}; if {last.sequence + 1} is gone, restore the archive from a copy"
        raise Corrupt(f"entry {entry.id} does not follow {last.generation}-{last.sequence}", where=where, fix=fix)
    if entry.chain != link(last.chain, entry.id, entry.kind, hashlib.sha256(entry.payload).hexdigest()):
        fix = "its payload was altered, or it belongs to another log"
        raise Corrupt(f"entry {entry.id} does not chain to {last.generation}-{last.sequence}", where=where, fix=fix)


def _position(entry: Entry) -> Head:
    return Head(entry.generation, entry.sequence, entry.chain)


def _entries(content: bytes, path: Path) -> list[Entry]:
    return [Entry(*record) for record in decode(content, width=6, where=str(path))]


def _record(entry: Entry) -> list[Any]:
    return [entry.generation, entry.sequence, entry.kind, entry.draw, entry.chain, entry.payload]
