"""What an outsider can cause as often as it likes is logged seldom, with how often it was."""

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
