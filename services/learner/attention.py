"""What the learner is working on, on a page that survives its death: who is found there three times killed it.

The page is memory-mapped, so writing it costs nothing and kill -9 loses nothing of it; only a power cut may.
"""

import contextlib
import json
import mmap
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sapo_learner.errors import Corrupt

DEATHS = 3
PAGE_BYTES = 4096
NAMED = 64  # entries of a microbatch on the page, at most


@dataclass(frozen=True)
class _Place:
    """What somebody was doing with which entries, and how many died there before."""

    doing: str = ""
    entries: tuple[str, ...] = ()
    deaths: int = 0


def forget(path: Path) -> None:
    """Clear a page that another process has open, if it is there: what it works on is not to blame."""
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        file.write(bytes(PAGE_BYTES))


class Attention:
    """Call it before anything is done with entries; `done` when a step is complete."""

    def __init__(self, path: Path, skips: Collection[str] = ()) -> None:
        """Raises Corrupt, naming the entry, when it has killed DEATHS learners in a row and is not in `skips`."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.truncate(PAGE_BYTES)
            self._page = mmap.mmap(file.fileno(), PAGE_BYTES)
        found = self._read()
        if not set(skips).isdisjoint(found.entries):
            found = _Place()
        self._suspect = replace(found, deaths=found.deaths + 1) if found.entries else found
        if self._suspect.deaths >= DEATHS:  # the page stays as it is: this is no death of theirs
            raise self._accusation()

    def __call__(self, doing: str, entries: Sequence[str]) -> None:
        place = _Place(doing, tuple(entries[:NAMED]))
        again = (place.doing, place.entries) == (self._suspect.doing, self._suspect.entries)
        self._write(self._suspect if again else place)

    def done(self) -> None:
        """A step is complete, or the learner ends in peace."""
        self._page[:] = bytes(PAGE_BYTES)

    def _accusation(self) -> Corrupt:
        suspect, run = self._suspect, self._path.parent
        first, *others = suspect.entries
        also = f" (or one of {', '.join(others[:5])}{', ...' if len(others) > 5 else ''})" if others else ""
        return Corrupt(
            f"the learner died {suspect.deaths} times while {suspect.doing} entry {first}{also}",
            where=str(run),
            fix=f"look at it with `sapo archive {run} --show {first}`; `sapo skip {run} {first}` takes it out of "
            f"training; delete {self._path.name} there to try it once more",
        )

    def _write(self, place: _Place) -> None:
        self._page[:] = json.dumps(asdict(place)).encode().ljust(PAGE_BYTES, b"\0")

    def _read(self) -> _Place:
        try:
            found = json.loads(self._page[:].rstrip(b"\0"))
            return _Place(str(found["doing"]), tuple(found["entries"]), int(found["deaths"]))
        except (ValueError, KeyError, TypeError):  # empty, or torn by a power cut
            return _Place()
