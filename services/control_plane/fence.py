"""Two control planes: the newest wins at once, the older one's writes are refused.

That refusal is no fault of whoever asked: it is told to try again, and finds the newer one. `ControlPlane.watch` sees
the bare refusal and ends the older process with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from sapo_learner.errors import Fenced, Unavailable


@contextmanager
def our_fence() -> Iterator[None]:
    """Around writes under the control plane's own token."""
    try:
        yield
    except Fenced as error:
        raise Unavailable("a newer control plane has taken over", where=error.where, fix="try again") from error
