"""A disk that is full, made by the kernel itself: no file of this process may grow beyond a size.

with no_file_beyond(1000) as room: ...      a write beyond raises OSError (EFBIG), like ENOSPC on a full disk
room.make()                                 lifts the limit before the block ends

Keep the block short: pytest's own files are bound by it, too.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


class Room:
    def __init__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def take(self, size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, self._before[1]))

    def make(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


@contextmanager
def no_file_beyond(size: int) -> Iterator[Room]:
    room = Room()
    room.take(size)
    try:
        yield room
    finally:
        room.make()


@contextmanager
def no_memory_beyond(extra: int) -> Iterator[None]:
    """Let this process map at most `extra` more bytes."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
