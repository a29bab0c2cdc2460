"""The log as every rank of the learner sees it: rank 0 reads it, the others get what it read.

So all ranks run the same loop over the same entries, and none of them but rank 0 needs an archive or a network.
"""

from sapo_learner.archive import Entry
from sapo_learner.parallel import Ranks
from sapo_learner.train import Log


class SharedLog:
    """sapo_learner.train.Log; its methods are called on all ranks."""

    def __init__(self, own: Log, ranks: Ranks) -> None:
        """own: asked on rank 0 only."""
        self._own, self._ranks = own, ranks

    def next(self, after: int, count: int) -> list[Entry] | None:
        return self._ranks.awaited(lambda: self._own.next(after, count))

    def controls(self, after: int, *, anywhere: bool = False) -> list[Entry]:
        return self._ranks.decided(lambda: self._own.controls(after, anywhere=anywhere))
