"""The bytes of one archive segment: zstandard frames of msgpack records. What the records mean is `archive.py`'s.

Each frame carries a checksum (XXH64) and its content size. `zstdcat` reads a segment like any .zst file.
"""

import contextlib
import os
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import zstandard

from sapo_learner.disk import naming
from sapo_learner.errors import Corrupt

_CHUNK = 1 << 16


class Name(NamedTuple):
    """Whose segment, and which of that writer's; ordered as the log is."""

    token: int
    number: int

    def path(self, directory: Path) -> Path:
        return directory / f"segment-{self.token:08d}-{self.number:06d}.zst"


def names(directory: Path) -> list[Name]:
    """Of all segments there, in order."""
    matches = (re.fullmatch(r"segment-(\d{8,})-(\d{6,})\.zst", path.name) for path in directory.glob("segment-*.zst"))
    return sorted(Name(int(match[1]), int(match[2])) for match in matches if match)


class Damaged(Exception):
    """A frame that is incomplete or does not check out, at byte `offset` of its file."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.offset = offset


class FrameIndex:
    """Which frame holds a sequence: five columns of 8 bytes per frame, ordered by first sequence. A frame answers for
    its first sequence up to the next frame's, so cutting the list also shortens the frame before the cut."""

    def __init__(self) -> None:
        self._first, self._token, self._number, self._start, self._size = (array("Q") for _ in range(5))

    def push(self, first: int, name: Name, start: int, size: int) -> None:
        """Add the frame at bytes [start, start + size) of a segment; a no-op when it was the last one added."""
        if not self._first or (self._name(-1), self._start[-1]) != (name, start):
            for column, value in zip(self._columns(), (first, *name, start, size), strict=True):
                column.append(value)

    def find(self, sequence: int) -> tuple[Name, int, int, int | None]:
        """(segment, start, size, first sequence that the frame no longer answers for, None = the last frame)."""
        at = bisect_right(self._first, sequence) - 1
        until = self._first[at + 1] if at + 1 < len(self._first) else None
        return self._name(at), self._start[at], self._size[at], until

    def first_of(self, name: Name) -> int | None:
        """The first sequence that a frame of this segment, or of a later one, answers for."""
        at = bisect_left(range(len(self._first)), name, key=self._name)
        return self._first[at] if at < len(self._first) else None

    def cut(self, sequence: int) -> None:
        """Forget `sequence` and all behind it."""
        while self._first and self._first[-1] >= sequence:
            for column in self._columns():
                column.pop()

    def drop_before(self, name: Name) -> None:
        """Forget the frames of all segments before this one."""
        at = bisect_left(range(len(self._first)), name, key=self._name)
        for column in self._columns():
            del column[:at]

    def _name(self, at: int) -> Name:
        return Name(self._token[at], self._number[at])

    def _columns(self) -> tuple["array[int]", ...]:
        return self._first, self._token, self._number, self._start, self._size


def encode(records: list[list[Any]]) -> bytes:
    """One frame that holds `records`."""
    content = b"".join(msgpack.packb(record) for record in records)
    return zstandard.ZstdCompressor(write_checksum=True, write_content_size=True).compress(content)


def decode(content: bytes, *, width: int, where: str) -> list[list[Any]]:
    """The records, each with `width` fields, of a frame's content.

    Raises Corrupt for anything else: the frame's checksum held, so the file was written like that.
    """
    try:
        unpacker = msgpack.Unpacker(max_buffer_size=max(len(content), 1))
        unpacker.feed(content)
        records = list(unpacker)
        if all(isinstance(record, list) and len(record) == width for record in records):
            return records
    except (ValueError, msgpack.UnpackException):
        pass
    raise Corrupt("not a frame of archive records", where=where, fix="is it the work of another version of sapo?")


def read_frame(path: Path, start: int, size: int) -> bytes:
    """Content of the frame at bytes [start, start + size). Raises Corrupt when it no longer checks out."""
    with path.open("rb") as file:
        file.seek(start)
        blob = file.read(size)
    try:
        return zstandard.ZstdDecompressor().decompress(blob)
    except zstandard.ZstdError as error:
        raise Corrupt(f"byte {start}: {error}", where=str(path), fix="restore the file from a copy") from None


def frames(path: Path, offset: int) -> Iterator[tuple[int, int, bytes]]:
    """(start, end, content) of each frame from byte `offset` on. Raises Damaged at the first that is not whole."""
    decompressor = zstandard.ZstdDecompressor()
    with path.open("rb") as file:
        file.seek(offset)
        rest = file.read(_CHUNK)
        while rest:
            decoder, parts, end = decompressor.decompressobj(), [], offset
            while not decoder.eof:
                if not rest:
                    raise Damaged("the frame is incomplete", offset)
                try:
                    parts.append(decoder.decompress(rest))
                except zstandard.ZstdError as error:
                    raise Damaged(str(error), offset) from None
                end += len(rest)
                rest = b"" if decoder.eof else file.read(_CHUNK)
            rest = decoder.unused_data
            end -= len(rest)
            yield offset, end, b"".join(parts)
            offset, rest = end, rest or file.read(_CHUNK)


def next_frame(path: Path, damaged: int) -> int | None:
    """Start of the first whole frame behind the one at byte `damaged`; None: that one is the torn tail of the file."""
    with path.open("rb") as file:
        base, block = damaged + 1, b""
        file.seek(base)
        while more := file.read(_CHUNK):
            block += more
            at = block.find(zstandard.FRAME_HEADER)
            while at >= 0:
                if is_whole(path, base + at):
                    return base + at
                at = block.find(zstandard.FRAME_HEADER, at + 1)
            base, block = base + len(block[:-3]), block[-3:]  # the four bytes may straddle two reads
    return None


def is_whole(path: Path, start: int) -> bool:
    """Whether a frame begins at byte `start` and checks out."""
    try:
        next(frames(path, start))
    except Damaged:  # the first bytes of a frame occurred by chance
        return False
    return True


class Writer:
    """The segment that a writer appends to. size: bytes of it, all durable. Not for several threads at once."""

    def __init__(self, directory: Path, name: Name, size: int, header: str) -> None:
        """Create the segment, or cut its torn tail behind `size`; durable, so that a lost Redis finds the token."""
        self._directory, self._header = directory, header
        self._descriptor, self.name, self.size = -1, name, size
        self._open(name, size)

    def append(self, records: list[list[Any]]) -> tuple[int, int]:
        """Add one frame, durably; (offset, size) in bytes. Raises OSError that names the file."""
        start = self.size
        size = add_frame(self._descriptor, start, records, where=self.name.path(self._directory))
        self.size = start + size
        return start, size

    def begin_next(self) -> None:
        """From here on append to a new segment. Raises OSError, and may be called again then."""
        path = self.name.path(self._directory)
        with naming(path):
            if os.fstat(self._descriptor).st_size != self.size:  # left by an append that failed; only the last segment
                os.ftruncate(self._descriptor, self.size)  # of a writer may have a torn tail
                os.fsync(self._descriptor)
        self._open(Name(self.name.token, self.name.number + 1), 0)

    def close(self) -> None:
        os.close(self._descriptor)

    def _open(self, name: Name, size: int) -> None:
        path = name.path(self._directory)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with naming(path):
                os.ftruncate(descriptor, size)
                if size == 0:
                    size = add_frame(descriptor, 0, [[self._header, *name]], where=path)
                os.fsync(descriptor)
            fsync(self._directory)
        except OSError:
            os.close(descriptor)
            raise
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self.name, self.size = descriptor, name, size


def add_frame(descriptor: int, start: int, records: list[list[Any]], *, where: Path) -> int:
    """Make a frame of `records` the file's end, from byte `start` on, durably; returns its size.

    What an append that failed left behind `start` is cut off first. Raises OSError that names the file.
    """
    blob, written = encode(records), 0
    with naming(where):
        if os.fstat(descriptor).st_size != start:
            os.ftruncate(descriptor, start)
        try:
            while written < len(blob):
                written += os.pwrite(descriptor, memoryview(blob)[written:], start + written)
            os.fsync(descriptor)
        except BaseException:  # also when interrupted: what is half written must not be built upon
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, start)
            raise
    return len(blob)


def fsync(path: Path) -> None:
    """Force a file's bytes, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
