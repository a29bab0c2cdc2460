"""The bytes of one archive segment: zstandard frames of msgpack records. What the records mean is `archive.py`'s.

Each frame carries a checksum (XXH64) and its content size. `zstdcat` reads a segment like any .zst file.
"""

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import zstandard

from sapo_learner.errors import Corrupt

_CHUNK = 1 << 16


class Damaged(Exception):
    """A frame that is incomplete or does not check out, at byte `offset` of its file."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.offset = offset


class FrameIndex:
    """Which frame holds a sequence: four columns of 8 bytes per frame, ordered by first sequence. A frame answers for
    its first sequence up to the next frame's, so cutting the list also shortens the frame before the cut."""

    def __init__(self) -> None:
        self._first, self._token, self._start, self._size = (array("Q") for _ in range(4))

    def push(self, first: int, token: int, start: int, size: int) -> None:
        """Add the frame at bytes [start, start + size) of segment `token`; a no-op when it was the last one added."""
        if not self._first or (self._token[-1], self._start[-1]) != (token, start):
            for column, value in zip(self._columns(), (first, token, start, size), strict=True):
                column.append(value)

    def find(self, sequence: int) -> tuple[int, int, int, int | None]:
        """(token, start, size, first sequence that the frame no longer answers for, None = the last frame)."""
        at = bisect_right(self._first, sequence) - 1
        until = self._first[at + 1] if at + 1 < len(self._first) else None
        return self._token[at], self._start[at], self._size[at], until

    def cut(self, sequence: int) -> None:
        """Forget `sequence` and all behind it."""
        while self._first and self._first[-1] >= sequence:
            for column in self._columns():
                column.pop()

    def _columns(self) -> tuple["array[int]", ...]:
        return self._first, self._token, self._start, self._size


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


def fsync(path: Path) -> None:
    """Force a file's bytes, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
