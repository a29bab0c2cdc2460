"""A memory that is full, in one sentence: what was being done, and which setting to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sapo_learner.errors import Unavailable

# torch raises a plain RuntimeError when the CPU's allocator fails; the wording differs between systems.
_ALLOCATOR = ("not enough memory", "can't allocate memory", "cannot allocate memory", "out of memory")


@contextmanager
def enough_memory(doing: str, *, where: str, fix: str) -> Iterator[None]:
    """Turn what Python, numpy or torch raises when memory runs out into Unavailable.

    Unavailable, because another process may have taken the memory: a supervisor tries again, and gives up when it
    makes no progress.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0].rstrip(". ") or "no detail"
        raise Unavailable(f"out of memory while {doing}: {reason}", where=where, fix=fix) from None


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _ALLOCATOR)
