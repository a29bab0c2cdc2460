"""Does the log still hold what was acknowledged? A Redis that was killed may have forgotten it (design, I2)."""

from dataclasses import dataclass


@dataclass
class OwnAcks:
    """What this ingest was told by the log. Without losses its sequence only rises."""

    last: int = 0
    """Highest sequence acknowledged."""
    losses: int = 0
    """How often the log was found behind that."""

    def now(self) -> tuple[int, int]:
        """To be taken before a group is appended, and given to `note` with its sequence."""
        return self.last, self.losses

    def note(self, before: tuple[int, int], sequence: int) -> int:
        """How many acknowledged groups the log has forgotten, found out by the sequence of a new one; mostly 0.

        Another replica's are among them; each replica counts the same loss.
        """
        last, losses = before
        if losses == self.losses and sequence <= last:  # appended after `last` was acknowledged, and not behind it
            self.last, self.losses = sequence, self.losses + 1
            return last - sequence + 1
        self.last = max(self.last, sequence)
        return 0
