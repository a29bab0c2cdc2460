"""Entries that a person took out of training: records of the archive, because a replay must leave them out, too.

One JSON line each in `skips.jsonl` beside the segments. A skipped entry still counts towards its step, with the outcome
`skipped`. Only an entry that no checkpoint has consumed may be skipped, and only while no learner runs: whoever trained
on it would have another history than whoever replays.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sapo_learner.errors import Corrupt, Unavailable
from sapo_learner.segment import fsync

FILE, LOCK = "skips.jsonl", "learner.lock"


def read(archive: Path) -> dict[str, str]:
    """Entry id -> why it was taken out. Raises Corrupt."""
    path, skips = archive / FILE, dict[str, str]()
    if not path.exists():
        return skips
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
            skips[record["entry"]] = record["reason"]
        except (ValueError, KeyError, TypeError):
            raise Corrupt("not a record of a skipped entry", where=f"{path}:{number}", fix="mend the line") from None
    return skips


def add(archive: Path, entry_id: str, reason: str, *, check: Callable[[], None] = lambda: None) -> None:
    """Durable on return. check: may refuse; no learner can start meanwhile. Raises Unavailable while one runs."""
    with no_learner(archive):
        check()
        line = json.dumps({"entry": entry_id, "reason": reason, "time": time.time()})
        before = (archive / FILE).read_text() if (archive / FILE).exists() else ""
        temporary = archive / f"{FILE}.tmp"
        temporary.write_text(f"{before}{line}\n")
        fsync(temporary)
        os.replace(temporary, archive / FILE)
        fsync(archive)


@contextmanager
def no_learner(archive: Path) -> Iterator[None]:
    """Held while a person changes the archive. Raises Unavailable while a learner runs, or another person does so."""
    with _lock(archive, fcntl.LOCK_EX):
        yield


@contextmanager
def learning(archive: Path) -> Iterator[None]:
    """Held by a learner while it lives; several may, since the newest fences the others."""
    with _lock(archive, fcntl.LOCK_SH):
        yield


@contextmanager
def _lock(archive: Path, kind: int) -> Iterator[None]:
    archive.mkdir(parents=True, exist_ok=True)
    with (archive / LOCK).open("a") as file:  # the kernel lets go of it when the process dies, however
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            what = (
                "a learner runs on this archive" if kind == fcntl.LOCK_EX else "this archive is being changed by hand"
            )
            raise Unavailable(what, where=str(archive), fix="stop the run first, or try again") from None
        yield
