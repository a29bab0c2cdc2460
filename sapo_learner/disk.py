"""A disk that takes no more: how that is told from a mistake, and the sentence to say then. No torch.

It is Unavailable: nothing is wrong with the run, and it goes on once there is room.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sapo_learner.errors import Unavailable

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSING = frozenset({errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM})
_RUST = re.compile(r"os error (\d+)")  # safetensors passes the number on in its message alone


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block carries `path`, as one of `open` does: those of `write` and `fsync` name no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def as_unavailable(error: OSError) -> Unavailable | None:
    """The sentence for a disk that is full or refuses; None for any other OSError, such as one of the network."""
    number = error.errno
    if number is None and (match := _RUST.search(str(error))):
        number = int(match[1])
    where = str(error.filename or "")
    if number in _FULL:
        return Unavailable(error.strerror or str(error), where=where, fix="make room there; what is saved stays whole")
    if number in _REFUSING and (where or error.errno is None):
        return Unavailable(
            error.strerror or str(error), where=where, fix="is the disk in order, and may this user write there?"
        )
    return None
