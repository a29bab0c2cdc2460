"""When an engine was sampling, for the views: wall-clock intervals that somebody takes away now and then."""

import threading
import time
from collections import deque

MERGE_SECONDS = 0.005  # pauses shorter than this count as busy
INTERVALS_KEPT = 4096  # of busy time that nobody has asked for


class BusyTime:
    """From any thread."""

    def __init__(self) -> None:
        self._intervals: deque[tuple[float, float]] = deque(maxlen=INTERVALS_KEPT)
        self._lock = threading.Lock()
        self._running, self._since = 0, 0.0

    def add(self, started: float, ended: float) -> None:
        """Unix times."""
        with self._lock:
            self._add(started, ended)

    def begin(self) -> None:
        """Something is being sampled from now on, until as many `end`s."""
        with self._lock:
            if not self._running:
                self._since = time.time()
            self._running += 1

    def end(self) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                self._add(self._since, time.time())

    def take(self) -> list[tuple[float, float]]:
        """Everything since the last call, up to now."""
        with self._lock:
            if self._running:
                now = time.time()
                self._add(self._since, now)
                self._since = now
            intervals = list(self._intervals)
            self._intervals.clear()
        return intervals

    def _add(self, started: float, ended: float) -> None:
        if self._intervals and started - self._intervals[-1][1] < MERGE_SECONDS:
            started = self._intervals.pop()[0]
        self._intervals.append((started, ended))
