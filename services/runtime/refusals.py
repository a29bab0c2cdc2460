"""Who is turned away at a door, in the log: at once, and then once a minute with how many there were."""

import logging
import time
from collections import OrderedDict

log = logging.getLogger(__name__)
NOTE_SECONDS = 60.0
MAX_KINDS = 256  # that are told apart; a peer can invent reasons


class Refusals:
    def __init__(self, door: str) -> None:
        """door: how it is called in the log."""
        self._door = door
        self._next: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()

    def note(self, peer: str, reason: str) -> None:
        """peer: its address, without the port: that is another one every time."""
        (due, unsaid), now = self._next.pop((peer, reason), (0.0, 0)), time.monotonic()
        if now < due:
            self._next[peer, reason] = (due, unsaid + 1)
            return
        self._next[peer, reason] = (now + NOTE_SECONDS, 0)
        if len(self._next) > MAX_KINDS:
            self._next.popitem(last=False)
        more = f" ({unsaid} more since it was said last)" if unsaid else ""
        log.warning("%s refused %s: %s%s", self._door, peer, ascii(reason)[1:-1], more)
