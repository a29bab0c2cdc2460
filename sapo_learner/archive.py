"""The archive: the durable prefix of the run's log, on disk. Only the learner appends; anyone may read.

Layout. Each writer has segments of its own, `segment-<fencing token>-<number>.zst`, and begins the next one when one is
full. A segment is a row of zstandard frames, each with its own checksum; one append is one frame, so a crash tears at
most the last one of a writer. A segment's first frame holds the header [FORMAT, token, number]; every other holds
msgpack records [generation, sequence, kind, draw, chain, payload]. `zstdcat segment-*.zst` gives the plain records.

Why segments of one's own: a writer that was replaced while it slept (I7) can then only ever touch files of its own, and
the newest wins (`held.py`). An older writer cannot have removed its branch from Redis, since that trim is fenced, so
nothing that is ended here is lost. For this the token must be taken before opening, and a writer's first segment is
there before it reads the others.

Whole segments may be deleted from the front (`prune`); `pruned.json` then says where reading begins (`pruned.py`).
"""

import contextlib
import os
import threading
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile
from pathlib import Path

from sapo_learner import pruned as records
from sapo_learner.entry import GENESIS, Entry, Head, check_follows, link
from sapo_learner.errors import Corrupt, Fenced
from sapo_learner.held import FORMAT, Held, Segment, gone
from sapo_learner.pruned import Pruned
from sapo_learner.segment import Name, Writer, fsync, names

__all__ = ["FORMAT", "GENESIS", "Archive", "Entry", "Head", "Segment", "link", "newest_token"]

SEGMENT_BYTES = 256 << 20


def newest_token(directory: Path) -> int:
    """Newest fencing token that an archive segment carries; 0 without one. Survives the loss of Redis."""
    return max((name.token for name in names(directory)), default=0)


class Archive:
    """All segments of `directory` as one log. With a `token` it may append, with None it only reads (and may prune).

    Opening reads and checks everything once. In memory stay 40 bytes per append and the last decoded frame. One thread
    may append and one prune while others read and wait. Tokens are unique: two writers with the same one are not
    guarded against.

    Raises Corrupt for damage that a crash cannot explain, Fenced when a newer token has opened the archive.
    """

    def __init__(self, directory: Path, token: int | None, segment_bytes: int = SEGMENT_BYTES) -> None:
        """segment_bytes: a segment that has reached this size is followed by the next one."""
        self.directory, self.token, self._limit = Path(directory), token, segment_bytes
        self._writing = threading.Lock()  # held over disk writes, so that readers never wait for an fsync
        self._pruning = threading.Lock()
        self._changed = threading.Condition()  # guards everything below; taken last
        self._held = Held(self.directory)
        self.closed = False
        self._writer: Writer | None = None
        if token is None:
            self.refresh()
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self._refuse_if_fenced()
        name = max((name for name in names(self.directory) if name.token == token), default=Name(token, 1))
        name.path(self.directory).touch()  # from here on older writers are refused
        self.refresh()
        self._writer = Writer(self.directory, name, self._held.ends.get(name, 0), FORMAT)
        self._delete_before(self.pruned.first)  # what a prune that was killed left

    # ---- reading

    @property
    def head(self) -> Head:
        with self._changed:
            return self._held.head

    @property
    def pruned(self) -> Pruned:
        """What was deleted from the front."""
        with self._changed:
            return self._held.pruned

    @property
    def size_bytes(self) -> int:
        """Bytes of all segments on disk."""
        return sum(segment.bytes for segment in self.segments())

    @property
    def controls(self) -> int:
        """How many entries are no groups, pruned ones included."""
        with self._changed:
            return self._held.pruned.controls + len(self._held.controls)

    def draws(self) -> Iterator[int]:
        """The draw of every group, pruned ones included; takes 8 bytes each in memory."""
        with self._pruning:
            found = array("q", self.pruned.draws())
            found.extend(entry.draw for entry in self.entries(self.pruned.head.sequence) if entry.draw >= 0)
        return iter(found)

    def segments(self) -> list[Segment]:
        """Those on disk, in order."""
        with self._changed:
            return self._held.segments()

    def chain_at(self, sequence: int) -> str | None:
        """The log's chain there, GENESIS at 0; None where it is not held, or pruned."""
        with self._changed:
            return self._held.chain_at(sequence)

    def read(self, after: int, limit: int) -> list[Entry]:
        """At most `limit` entries with sequence > `after`, in order. Raises NotFound when they were pruned."""
        return list(islice(self.entries(after), limit))

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """Every entry with sequence > `after`, in order, one frame in memory at a time. Raises NotFound as `read`."""
        while True:
            with self._changed:
                if after < self._held.pruned.head.sequence:
                    raise gone(self._held.pruned.head, self.directory)
                if after >= self._held.head.sequence:
                    return
                frame = self._held.frame_from(after + 1)
            yield from frame
            after = frame[-1].sequence

    def wait(self, after: int, timeout: float) -> bool:
        """Block for at most `timeout` seconds until this object holds an entry beyond `after`; whether it does."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or self._held.head.sequence > after, timeout)
            return self._held.head.sequence > after

    def refresh(self) -> None:
        """Take in what other processes did (for readers). The head steps back where a newer branch won."""
        with self._changed:
            self._held.refresh(warn=self.token is not None)  # a reader may meet an append that is just being written
            self._changed.notify_all()

    # ---- writing

    def append(self, entries: Iterable[Entry]) -> int:
        """Add entries strictly by sequence and return the last sequence held; durable (fsync) on return.

        Entries already held are no-ops. Raises Corrupt (a gap, a chain that does not link, another entry than the one
        held), Fenced (a newer token opened the archive), OSError (disk full: nothing of these entries stays behind).
        """
        with self._writing:
            if self._writer is None:
                raise RuntimeError("this archive is closed or open for reading only")
            self._refuse_if_fenced()
            fresh = self._unheld(entries)
            if fresh:
                if self._writer.size >= self._limit:
                    self._writer.begin_next()
                start, size = self._writer.append([entry.record for entry in fresh])
                with self._changed:
                    self._held.add(fresh, self._writer.name, start, size)
                    self._changed.notify_all()
            return self.head.sequence

    def prune(self, through: int) -> int:
        """Delete the oldest segments, those that answer for nothing beyond sequence `through`; returns bytes freed.

        Never the newest one, so this may stop far before `through`. Safe beside an append and beside readers, which at
        worst get NotFound. Without a token of our own the caller sees to it that nobody writes. Raises Fenced, Corrupt
        (a draw twice), OSError (then nothing is lost, and the next prune goes on).
        """
        with self._pruning:
            self._refuse_if_fenced()
            before, present = self.pruned, names(self.directory)
            ours = [name for name in present if self.token is None or name.token <= self.token]
            if not ours:
                return 0
            with self._changed:
                first, head = self._held.prunable(through, newest=ours[-1])
            if first > max(before.first, ours[0]):
                doomed = takewhile(lambda each: each.sequence <= head.sequence, self.entries(before.head.sequence))
                after = before.extended(doomed, head, first)
                records.write(self.directory, after)
                with self._changed:
                    self._held.forget(after)
            return self._delete_before(self.pruned.first)

    def claim_generation(self) -> int:
        """A generation of the log that was never begun before; durable on return."""
        path = self.directory / "generation"
        last = int(path.read_text()) if path.exists() else 0
        generation = max(last, self.head.generation) + 1
        temporary = path.with_suffix(".tmp")
        temporary.write_text(str(generation))
        fsync(temporary)
        os.replace(temporary, path)
        fsync(self.directory)
        return generation

    def close(self) -> None:
        with self._writing, self._changed:
            self.closed = True
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            self._changed.notify_all()

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside

    def _refuse_if_fenced(self) -> None:
        newest = newest_token(self.directory)
        if self.token is not None and newest > self.token:
            raise Fenced(
                f"a learner with token {newest} writes this archive, ours is {self.token}",
                where=str(self.directory),
                fix="stop this process; the newer one goes on",
            )

    def _unheld(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those beyond the head, after checking that all of them continue or repeat the log."""
        fresh: list[Entry] = []
        head = last = self.head
        for entry in entries:
            if 1 <= entry.sequence <= head.sequence:
                with self._changed:
                    agrees = self._held.agrees(entry)
                if not agrees:
                    raise Corrupt(
                        f"entry {entry.id} differs from the archived one",
                        where=str(self.directory),
                        fix="the log in Redis belongs to another run or was rewritten: rebuild it from the archive",
                    )
                continue
            check_follows(entry, last, where=str(self.directory))
            fresh.append(entry)
            last = entry.position
        return fresh

    def _delete_before(self, first: Name) -> int:
        """Returns the bytes freed."""
        freed = 0
        for name in names(self.directory):
            path = name.path(self.directory)
            if name < first:
                with contextlib.suppress(FileNotFoundError):  # of two learners that follow one another, both tidy up
                    size = path.stat().st_size
                    path.unlink()
                    freed += size
        return freed
