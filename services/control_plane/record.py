"""The run's record: one JSON line per step, evaluation and session, for views and summaries; never read by training.

A learner that was restored takes some steps again; the last line of a step is the one that counts. While the disk
takes nothing, lines wait in memory: a view's figures are no reason to hold training up.
"""

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
RECENT = 512  # lines kept in memory per kind
WAITING = 4096  # lines that wait for room on the disk; older ones are dropped


class Record:
    def __init__(
        self,
        path: Path,
        heard: Callable[[dict[str, Any]], None] = lambda _: None,
        added: Sequence[Callable[[dict[str, Any]], None]] = (),
    ) -> None:
        """heard: is told every line, those that are there already first, so that nobody need read them again. added:
        are told only what comes from now on."""
        self._path, self._heard, self._added = path, heard, added
        self.recent: dict[str, deque[dict[str, Any]]] = {}
        self._waiting: deque[bytes] = deque()
        self._dropped = 0
        self._full = False  # the disk, and that it has been said
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in read(path):
            self._remember(line)
        self._torn = not _ends_with_newline(path)

    def add(self, kind: str, /, **fields: Any) -> dict[str, Any]:
        """Never fails for the disk's sake."""
        line = {**fields, "kind": kind, "time": time.time()}
        self._waiting.append(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._flush()
        self._remember(line)
        for tell in self._added:
            tell(line)
        return line

    def close(self) -> None:
        """Try to write what still waits."""
        self._flush()

    @property
    def full(self) -> bool:
        """Whether lines wait in memory, because the disk takes none."""
        return self._full

    def last(self, kind: str) -> dict[str, Any] | None:
        lines = self.recent.get(kind)
        return lines[-1] if lines else None

    def _flush(self) -> None:
        try:
            if self._waiting:
                with self._path.open("ab", buffering=0) as file:  # anew each time: no buffer outlives a failure
                    while self._waiting:
                        self._write(file.fileno(), self._waiting[0])
                        self._waiting.popleft()
        except OSError as error:
            if not self._full:
                log.error("record %s: %s; lines wait in memory until there is room", self._path, error)
            self._full = True
            while len(self._waiting) > WAITING:
                self._waiting.popleft()
                self._dropped += 1
        else:
            if self._full:
                log.info("record %s: written again, %d lines were dropped", self._path, self._dropped)
            self._full, self._dropped = False, 0

    def _write(self, descriptor: int, line: bytes) -> None:
        """One whole line; one that was torn before is ended first, or it would swallow this one."""
        if self._torn:
            os.write(descriptor, b"\n")
            self._torn = False
        written = 0
        try:
            while written < len(line):
                written += os.write(descriptor, line[written:])
        except OSError:
            self._torn = written > 0
            if written < len(line) - 1:  # else only its end is missing, and the line is there
                raise

    def _remember(self, line: dict[str, Any]) -> None:
        self.recent.setdefault(line["kind"], deque(maxlen=RECENT)).append(line)
        self._heard(line)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line; a line torn by a crash or a full disk is skipped."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _ends_with_newline(path: Path) -> bool:
    """Or has nothing in it yet."""
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"
