"""What an outsider can cause as often as it likes is logged seldom, with how often it was."""

import logging
import math
import time


class Seldom:
    def __init__(self, seconds: float) -> None:
        """seconds: between two lines of the log."""
        self._seconds, self._count, self._next = seconds, 0, -math.inf

    def due(self) -> int:
        """Count one more; how many there were since the last line when it is time for another, else 0."""
        self._count += 1
        if (now := time.monotonic()) < self._next:
            return 0
        count, self._count, self._next = self._count, 0, now + self._seconds
        return count


class SeldomWarnings(logging.Filter):
    """The same for a library's logger whose warnings (of fixed texts) outsiders cause; all else passes."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds, self._notes = seconds, dict[str, Seldom]()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        count = self._notes.setdefault(str(record.msg), Seldom(self._seconds)).due()
        if count > 1:
            record.msg = f"{record.msg} ({count} times since it was said last)"
        return count > 0
