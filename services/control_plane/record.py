"""The run's record: one JSON line per step, evaluation and session, for views and summaries; never read by training.

A learner that was restored takes some steps again; the last line of a step is the one that counts.
"""

import json
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECENT = 512  # lines kept in memory per kind


class Record:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.recent: dict[str, deque[dict[str, Any]]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in read(path):
            self._remember(line)
        self._file = path.open("a", buffering=1)
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # or a line torn by a crash would swallow the next one

    def add(self, kind: str, **fields: Any) -> dict[str, Any]:
        line = {"kind": kind, "time": time.time(), **fields}
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._remember(line)
        return line

    def close(self) -> None:
        self._file.close()

    def last(self, kind: str) -> dict[str, Any] | None:
        lines = self.recent.get(kind)
        return lines[-1] if lines else None

    def _remember(self, line: dict[str, Any]) -> None:
        self.recent.setdefault(line["kind"], deque(maxlen=RECENT)).append(line)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line; a line torn by a crash is skipped."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue
