"""A process from start to exit: signals ask it to stop, it drains, it exits with the code of what went wrong.

A service is `async def serve(lifecycle)`; its background work lives in an `asyncio.TaskGroup`, so a task that dies
takes the process down. This is the one place that catches everything.
"""

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable

from sapo_learner.errors import SapoError

log = logging.getLogger(__name__)


class Lifecycle:
    """Whether the process shall stop, and what it still waits for before it is ready."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self._waiting_for: dict[str, str] = {"start": "the process is starting"}

    def wait_for(self, name: str, reason: str) -> None:
        """Not ready: say for what, once per change."""
        if self._waiting_for.get(name) != reason:
            log.info("waiting: %s", reason)
        self._waiting_for[name] = reason

    def ready(self, name: str = "start") -> None:
        self._waiting_for.pop(name, None)

    @property
    def waiting_for(self) -> list[str]:
        return list(self._waiting_for.values())

    async def sleep(self, seconds: float) -> bool:
        """Sleep, but no longer than until the process shall stop; returns whether it shall."""
        try:
            await asyncio.wait_for(self.stopping.wait(), seconds)
        except TimeoutError:
            return False
        return True


def run(serve: Callable[[Lifecycle], Awaitable[None]]) -> int:
    """Run a service to its end; returns the exit code (sapo_learner.errors)."""

    async def main() -> None:
        lifecycle = Lifecycle()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lifecycle.stopping.set)
        await serve(lifecycle)

    try:
        asyncio.run(main())
    except BaseException as error:
        cause = first_cause(error)
        if isinstance(cause, SapoError):
            log.error("%s", cause)
            return cause.exit_code
        log.error("died of %s", cause, exc_info=cause)
        return 1
    finally:
        sys.stderr.flush()
    return 0


def first_cause(error: BaseException) -> BaseException:
    """The first leaf of nested exception groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
