"""What was deleted from the front of an archive, in `pruned.json`: all that recovery and the ledger still need of it.

It is written before anything is deleted, and says where reading begins: whatever lies before that is leftovers.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sapo_learner import formats
from sapo_learner.disk import naming
from sapo_learner.entry import Entry, Head
from sapo_learner.errors import Corrupt
from sapo_learner.segment import Name, fsync

FILE = "pruned.json"
BEGINNING = Name(0, 0)


@dataclass(frozen=True)
class Pruned:
    """head: position of the last pruned entry, sequence 0 when none was. first: the first segment that counts.

    ranges: draws of all pruned groups, as sorted pairs [start, stop). controls: pruned entries that are no groups.
    """

    head: Head = field(default_factory=Head)
    first: Name = BEGINNING
    ranges: tuple[tuple[int, int], ...] = ()
    controls: int = 0

    def draws(self) -> Iterator[int]:
        """Of all pruned groups, ascending."""
        for start, stop in self.ranges:
            yield from range(start, stop)

    def holds(self, draw: int) -> bool:
        return any(start <= draw < stop for start, stop in self.ranges)

    def extended(self, entries: Iterable[Entry], head: Head, first: Name) -> "Pruned":
        """The record once `entries`, which end at `head`, are pruned too. Raises Corrupt for a draw that comes twice:
        ranges could not tell of it, and nobody should delete what proves it."""
        found, controls = [], self.controls
        for entry in entries:
            if entry.draw < 0:
                controls += 1
            else:
                found.append((entry.draw, entry.draw + 1))
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self.ranges, *found]):
            if merged and start < merged[-1][1]:
                raise Corrupt(f"draw {start} was accepted twice", fix="`sapo ledger` tells more; nothing was pruned")
            if merged and start == merged[-1][1]:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        return Pruned(head, first, tuple(merged), controls)


def read(archive: Path) -> Pruned:
    """Raises Corrupt for a file that does not check out, Mismatch for one of another version."""
    path = archive / FILE
    try:
        facts = json.loads(path.read_bytes())
        digest = facts.pop("digest")
        if digest == _digest(facts):
            formats.PRUNED.check(facts["format"], where=str(path))
            ranges = tuple((start, stop) for start, stop in facts["ranges"])
            return Pruned(Head(**facts["head"]), Name(*facts["first"]), ranges, facts["controls"])
    except FileNotFoundError:
        return Pruned()
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    raise Corrupt(
        "does not check out", where=str(path),
        fix="restore it from a copy: without it nobody knows where the archive begins",
    )  # fmt: skip


def write(archive: Path, pruned: Pruned) -> None:
    """Replace the record at once; durable on return. Raises OSError, and nothing has changed then."""
    facts: dict[str, Any] = asdict(pruned) | {"format": formats.PRUNED.newest}
    path = archive / FILE
    temporary = path.with_suffix(".tmp")
    try:
        with naming(temporary):
            temporary.write_text(json.dumps(facts | {"digest": _digest(facts)}))
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(archive)


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
