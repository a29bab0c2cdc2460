"""Every record writer in its own thread, behind a bounded queue: whatever becomes of it, the run does not notice."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from services.record_writers import Line, RecordWriter, Run, writer_classes
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.run_identity import identity
from services.runtime.settings import RunConfig

log = logging.getLogger(__name__)
REASONS = SLOW, FAILED = ("too slow", "failed")
WAITING = 1024  # lines that wait for a slow writer; older ones are lost to it
CLOSE_SECONDS = 5.0


class WriterThread:
    """open: makes the writer. lost: told, with a reason, of every line that the writer has not taken."""

    def __init__(self, name: str, open: Callable[[], RecordWriter], lost: Callable[[str], None]) -> None:
        self.name, self._open, self._lost = name, open, lost
        self._lines: deque[Line] = deque()
        self._changed = threading.Condition()
        self._closing = self._failing = False
        self._lost_meanwhile = 0
        # A daemon: one that hangs in a server that is gone does not keep the process.
        self._thread = threading.Thread(target=self._run, name=f"writer {name}", daemon=True)
        self._thread.start()

    def put(self, line: Line) -> None:
        """Never blocks, never fails."""
        with self._changed:
            if len(self._lines) >= WAITING:
                self._lines.popleft()
                self._lost(SLOW)
            self._lines.append(line)
            self._changed.notify()

    def close(self) -> None:
        """Let it write what waits, but not for long."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("record writer %s did not end in time: its last lines may be missing", self.name)

    def _run(self) -> None:
        writer: RecordWriter | None = None
        while (line := self._next()) is not None:
            try:
                writer = writer or self._open()
                writer.write(line)
            except Exception as error:  # of somebody else's code, which may raise anything
                self._failed(error)
            else:
                self._works()
        if writer:
            try:
                writer.close()
            except Exception as error:
                log.warning("record writer %s did not close: %s", self.name, _sentence(error))

    def _next(self) -> Line | None:
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closing)
            return self._lines.popleft() if self._lines else None

    def _failed(self, error: Exception) -> None:
        self._lost(FAILED)
        self._lost_meanwhile += 1
        if not self._failing:
            log.error("record writer %s: %s; the run goes on, and lines are lost to it", self.name, _sentence(error))
        self._failing = True

    def _works(self) -> None:
        if self._failing:
            log.info("record writer %s writes again; %d lines were lost to it", self.name, self._lost_meanwhile)
        self._failing, self._lost_meanwhile = False, 0


def started(config: RunConfig, metrics: ControlPlaneMetrics) -> list[WriterThread]:
    """The writers that run.yaml names. Raises ConfigError as `writer_classes` does."""
    name, directory = config.run.name, config.run.directory
    run = Run(name, f"{name}-{identity(directory)}", directory, config.model_dump(mode="json"))

    def thread(name: str, kind: type[RecordWriter]) -> WriterThread:
        for reason in REASONS:
            metrics.writer_lost.labels(name, reason)  # there at 0, before the first is lost
        return WriterThread(name, lambda: kind(run), lambda reason: metrics.writer_lost.labels(name, reason).inc())

    return [thread(*each) for each in writer_classes(config.record.writers).items()]


async def ended(threads: Sequence[WriterThread]) -> None:
    await asyncio.gather(*(asyncio.to_thread(each.close) for each in threads))


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
