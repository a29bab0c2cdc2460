"""What an outsider can cause as often as it likes is logged seldom, with how often it was."""

import logging
import math
import time
from collections import OrderedDict

log = logging.getLogger(__name__)
NOTE_SECONDS = 60.0  # between two lines of the log about the same
MAX_KINDS = 256  # that are told apart; a peer can invent reasons


class Seldom:
    def __init__(self, seconds: float = NOTE_SECONDS) -> None:
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

    def __init__(self) -> None:
        super().__init__()
        self._notes = dict[str, Seldom]()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        count = self._notes.setdefault(str(record.msg), Seldom()).due()
        record.msg = f"{record.msg}{_more(count)}"
        return count > 0


class Refusals:
    """Who is turned away at a door, and why: each peer and reason at once, and then once a minute."""

    def __init__(self, door: str) -> None:
        """door: how it is called in the log."""
        self._door = door
        self._notes = OrderedDict[tuple[str, str], Seldom]()

    def note(self, peer: str, reason: str, kind: str = "") -> None:
        """peer: its address, without the port: that is another one every time.

        kind: what is counted as the same, where the reason names what the peer asked for.
        """
        key = (peer, kind or reason)
        count = self._notes.setdefault(key, Seldom(NOTE_SECONDS)).due()
        self._notes.move_to_end(key)
        if len(self._notes) > MAX_KINDS:
            self._notes.popitem(last=False)
        if count:
            log.warning("%s refused %s: %s%s", self._door, peer, ascii(reason)[1:-1], _more(count))


def _more(count: int) -> str:
    return f" ({count - 1} more since it was said last)" if count > 1 else ""
