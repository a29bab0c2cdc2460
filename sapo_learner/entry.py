"""One entry of the run's log, and the chain that ties it to all before it. How entries lie on disk is `archive.py`'s.

Why the chain: each entry carries the hash of everything before it, so "the same position of the same log" is one
string comparison for archive, Redis and checkpoint. It finds mistakes, not attackers.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from sapo_learner.errors import Corrupt

GENESIS = "0" * 40
"""Chain before the first entry."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the log. `sequence` counts from 1 without gaps, `generation` rises when Redis was lost.

    draw: the draw that the payload answers, -1 when kind is not "group". chain: `link` of the previous entry's chain.
    """

    generation: int
    sequence: int
    kind: str
    draw: int
    chain: str
    payload: bytes

    @property
    def id(self) -> str:
        return f"{self.generation}-{self.sequence}"

    @property
    def position(self) -> "Head":
        return Head(self.generation, self.sequence, self.chain)

    @property
    def record(self) -> list[Any]:
        """What `Entry(*record)` gives back."""
        return [self.generation, self.sequence, self.kind, self.draw, self.chain, self.payload]


@dataclass(frozen=True, slots=True)
class Head:
    """Position of the last entry held; sequence 0 and GENESIS when there is none."""

    generation: int = 0
    sequence: int = 0
    chain: str = GENESIS

    @property
    def id(self) -> str:
        return f"{self.generation}-{self.sequence}"


def link(previous_chain: str, entry_id: str, kind: str, payload_sha256_hex: str) -> str:
    """Chain of an entry: SHA-1 hex, because Redis scripts can compute that too (`redis.sha1hex`), and must agree."""
    text = "\n".join((previous_chain, entry_id, kind, payload_sha256_hex))
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def check_follows(entry: Entry, last: Head, *, where: str) -> None:
    """Raises Corrupt unless `entry` is the one after `last`."""
    if entry.sequence != last.sequence + 1:
        fix = f"read again from {last.sequence}; if {last.sequence + 1} is gone, restore the archive from a copy"
        raise Corrupt(f"entry {entry.id} does not follow {last.id}", where=where, fix=fix)
    if entry.chain != link(last.chain, entry.id, entry.kind, hashlib.sha256(entry.payload).hexdigest()):
        fix = "its payload was altered, or it belongs to another log"
        raise Corrupt(f"entry {entry.id} does not chain to {last.id}", where=where, fix=fix)
