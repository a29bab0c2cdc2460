"""A process from start to exit: signals ask it to stop, it drains, it exits with the code of what went wrong.

A service is `async def serve(lifecycle)`; its background work lives in an `asyncio.TaskGroup`, so a task that dies
takes the process down. This is the one place that catches everything.
"""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Awaitable, Callable

from sapo_learner.disk import as_unavailable
from sapo_learner.errors import SapoError, Unavailable
from services.runtime import inspection

log = logging.getLogger(__name__)
START_GRACE_SECONDS, DRAIN_GRACE_SECONDS = 3.0, 60.0


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

    def peer(self, name: str) -> Callable[[str | None], None]:
        """For a client that repeats its calls: told why it does, and None when one has succeeded."""

        def waiting(reason: str | None) -> None:
            if reason is not None:
                self.wait_for(name, reason)
            elif name in self._waiting_for:
                log.info("%s answers", name)
                self.ready(name)

        return waiting

    @property
    def waiting_for(self) -> list[str]:
        return list(self._waiting_for.values())

    @property
    def starting(self) -> bool:
        """Whether the process has never been ready."""
        return "start" in self._waiting_for

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
        task = asyncio.current_task()
        assert task is not None

        def stop() -> None:
            lifecycle.stopping.set()
            if lifecycle.starting:
                task.cancel()  # nothing to drain yet, whatever it waits for
            _end_after(START_GRACE_SECONDS if lifecycle.starting else DRAIN_GRACE_SECONDS)

        inspection.install(loop)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        try:
            await serve(lifecycle)
        except asyncio.CancelledError:
            if not lifecycle.stopping.is_set():
                raise
        except BaseException:
            _end_after(DRAIN_GRACE_SECONDS)
            raise

    _take_all_descriptors()
    try:
        asyncio.run(main())
    except BaseException as error:
        return say_why(first_cause(error))
    finally:
        sys.stderr.flush()
    return 0


def say_why(cause: BaseException, *, aloud: bool = True) -> int:
    """What the process died of, in one sentence if it is no fault of ours; its exit code. aloud: else only that."""
    if isinstance(cause, OSError) and (full := as_unavailable(cause)):
        cause = full
    level = logging.ERROR if aloud else logging.DEBUG
    if isinstance(cause, SapoError):
        log.log(level, "%s", cause)
        return cause.exit_code
    if isinstance(cause, MemoryError):
        log.log(level, "out of memory: %s (give this process more, or lower the run's sizes)", cause)
        return Unavailable.exit_code
    log.log(level, "died of %s", cause, exc_info=cause)
    return 1


def _take_all_descriptors() -> None:
    """As many open files as this process may have: connections are files, and the usual soft limit is low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _end_after(seconds: float) -> None:
    """Whatever hangs (a thread, a peer that never answers): the process ends by then."""

    def end() -> None:
        log.error("still not stopped after %.0f s: ending", seconds)
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def first_cause(error: BaseException) -> BaseException:
    """The first leaf of nested exception groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
