"""What an archive's segments hold, as one log: where each entry lies, and which of two branches counts.

Segments are read in the order of their names, and the newest token wins: where two hold the same entry nothing happens,
and where they differ the older one's branch ends. Not for several threads at once; `archive.py` sees to that.
"""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sapo_learner import formats, pruned
from sapo_learner.entry import Entry, Head, check_follows
from sapo_learner.errors import Corrupt, NotFound
from sapo_learner.pruned import Pruned
from sapo_learner.segment import Damaged, FrameIndex, Name, decode, frames, is_whole, names, next_frame, read_frame

log = logging.getLogger(__name__)

_PREFIX = "sapo-archive-"
FORMAT = f"{_PREFIX}{formats.ARCHIVE.newest}"  # heads every segment, beside its token and number


@dataclass(frozen=True, slots=True)
class Segment:
    """A file of the archive. first, last: the sequences that it answers for; None when other segments hold them all."""

    name: Name
    path: Path
    bytes: int
    first: int | None
    last: int | None


class Held:
    """40 bytes per append, and the last decoded frame.

    head: position of the last entry. pruned: what was deleted from the front. ends: byte up to which a segment was
    read. controls: sequences of the entries that are no groups.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.pruned, self.head = Pruned(), Head()
        self.ends: dict[Name, int] = {}
        self.controls: list[int] = []
        self._index = FrameIndex()
        self._frame: tuple[tuple[Name, int], list[Entry]] | None = None

    def chain_at(self, sequence: int) -> str | None:
        """The log's chain there, GENESIS at 0; None where it is not held, or pruned."""
        if sequence == self.pruned.head.sequence:
            return self.pruned.head.chain
        if self.pruned.head.sequence < sequence <= self.head.sequence:
            return self.frame_from(sequence)[0].chain
        return None

    def agrees(self, entry: Entry) -> bool:
        """Whether the entry held at its sequence is this one; of those that were pruned, only the last can tell."""
        return entry.sequence < self.pruned.head.sequence or self.chain_at(entry.sequence) == entry.chain

    def frame_from(self, sequence: int) -> list[Entry]:
        """Entries of one frame from `sequence`, which is held, up to where a later frame takes over.

        Raises NotFound when another process has pruned it, Corrupt when it no longer checks out.
        """
        name, start, size, until = self._index.find(sequence)
        if self._frame is None or self._frame[0] != (name, start):
            path = name.path(self._directory)
            try:
                self._frame = (name, start), _entries(read_frame(path, start, size), path)
            except FileNotFoundError:
                raise gone(pruned.read(self._directory).head, path) from None
        entries = self._frame[1]
        first = entries[0].sequence
        return entries[sequence - first : (until or self.head.sequence + 1) - first]

    def add(self, entries: Sequence[Entry], name: Name, start: int, size: int) -> None:
        """Entries that follow the head, now in the frame at bytes [start, start + size) of a segment."""
        for entry in entries:
            self._index.push(entry.sequence, name, start, size)
            if entry.draw < 0:
                self.controls.append(entry.sequence)
            self.head = entry.position

    def segments(self) -> list[Segment]:
        """Those on disk, in order."""
        present = [name for name in names(self._directory) if name >= self.pruned.first]
        end = self.head.sequence + 1
        begins = [self._index.first_of(name) or end for name in present]
        found = []
        for name, first, after in zip(present, begins, [*begins[1:], end], strict=False):
            path = name.path(self._directory)
            sequences = (first, after - 1) if first < after else (None, None)
            with contextlib.suppress(FileNotFoundError):  # another process has just pruned it
                found.append(Segment(name, path, path.stat().st_size, *sequences))
        return found

    # ---- pruning

    def prunable(self, through: int, newest: Name) -> tuple[Name, Head]:
        """The first segment that answers for anything beyond `through`, or `newest`; and the position before it."""
        through = max(through, self.pruned.head.sequence)
        first = newest if self.head.sequence <= through else self._index.find(through + 1)[0]
        begin = self._index.first_of(first)
        last = self.head.sequence if begin is None else begin - 1
        if last == self.pruned.head.sequence:
            return first, self.pruned.head
        return first, self.frame_from(last)[0].position

    def forget(self, record: Pruned) -> None:
        """Go on without what `record` says is pruned."""
        self.pruned = record
        self._index.drop_before(record.first)
        self.controls = [each for each in self.controls if each > record.head.sequence]

    # ---- reading segments

    def refresh(self, *, warn: bool) -> None:
        """Take in what the segments hold beyond what was read of them before. warn: say so where one is cut short.

        Raises Corrupt for damage that a crash cannot explain.
        """
        while True:
            try:
                return self._scan_all(warn)
            except (FileNotFoundError, NotFound):  # pruned while we looked
                if pruned.read(self._directory) == self.pruned:
                    raise

    def _begin_at(self, record: Pruned) -> None:
        """Know nothing but what was pruned."""
        self.pruned, self.head = record, record.head
        self.ends, self.controls, self._index, self._frame = {}, [], FrameIndex(), None

    def _scan_all(self, warn: bool) -> None:
        present = names(self._directory)  # before the record, which is written before anything is deleted
        record = pruned.read(self._directory)
        if record != self.pruned:
            self._begin_at(record)
        live = max((name for name, end in self.ends.items() if end), default=record.first)
        for name, following in zip_longest(present, present[1:]):
            if name >= live:  # what a replaced writer adds behind a newer one's back does not count
                self._scan(name, last=following is None or following.token != name.token, warn=warn)

    def _scan(self, name: Name, *, last: bool, warn: bool) -> None:
        """Take in one segment, the last of its writer or not; a torn tail is left alone."""
        path = name.path(self._directory)
        try:
            for start, end, content in frames(path, self.ends.get(name, 0)):
                if start:
                    self._take(_entries(content, path), name, start, end - start)
                else:
                    _check_header(decode(content, width=3, where=str(path)), name, path)
                self.ends[name] = end
        except Damaged as damage:
            self._refuse_unless_torn(path, damage, last=last)
            if warn:
                said = "%s: cut short at byte %d (%s); whole up to entry %d, what follows is read again"
                log.warning(said, path, damage.offset, damage, self.head.sequence)

    def _refuse_unless_torn(self, path: Path, damage: Damaged, *, last: bool) -> None:
        """Whole frames behind the damage, or a next segment, prove that no crash tore it."""
        following = next_frame(path, damage.offset)
        if last and (following is None or is_whole(path, damage.offset)):  # or its writer has just completed it
            return
        behind = f"from byte {following} on" if following is not None else "in the next segment"
        raise Corrupt(
            f"damaged at byte {damage.offset} ({damage}), with whole entries {behind}",
            where=str(path),
            fix="restore the file from a copy; without one, move it and all newer segments away: the log then "
            f"ends at entry {self.head.sequence}, and only checkpoints up to there can be resumed",
        ) from None

    def _take(self, entries: list[Entry], name: Name, start: int, size: int) -> None:
        """Add a frame read from disk: skip what is held, end an older branch where this newer segment differs."""
        where = f"{name.path(self._directory)}, byte {start}"
        for entry in entries:
            if 1 <= entry.sequence <= self.head.sequence:
                if self.agrees(entry):
                    continue
                self._end_branch(entry.sequence, where)
            check_follows(entry, self.head, where=where)
            self.add([entry], name, start, size)

    def _end_branch(self, sequence: int, where: str) -> None:
        """Forget `sequence` and all behind it."""
        begin, before = self.pruned.head, sequence - 1
        if before < begin.sequence:
            raise Corrupt(f"entry {begin.id} is not the one that was pruned", where=where, fix="move the file away")
        self._index.cut(sequence)
        self.controls = [each for each in self.controls if each < sequence]
        self.head = self.frame_from(before)[0].position if before > begin.sequence else begin


def gone(begin: Head, where: Path) -> NotFound:
    """What to say to whoever asks for entries that were pruned up to `begin`."""
    fix = f"resume or replay from a checkpoint whose cursor is {begin.sequence} or later"
    return NotFound(f"the archive was pruned up to entry {begin.id}", where=str(where), fix=fix)


def _check_header(records: list[list[Any]], name: Name, path: Path) -> None:
    """Raises Mismatch for a segment of another version, Corrupt for what is not this segment."""
    for form, *numbers in records[:1]:
        version = str(form).removeprefix(_PREFIX)
        if len(records) == 1 and numbers == [*name] and form == f"{_PREFIX}{version}" and version.isdecimal():
            return formats.ARCHIVE.check(int(version), where=str(path))
    what = f"not a {FORMAT} segment {name.number} of token {name.token}"
    raise Corrupt(what, where=str(path), fix="move it away")


def _entries(content: bytes, path: Path) -> list[Entry]:
    return [Entry(*record) for record in decode(content, width=6, where=str(path))]
