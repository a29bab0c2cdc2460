"""Every response of an evaluation, one JSON line each, behind a header: what figures can be computed from again.

    {"kind": "header", "format": 1, "policy": "<digest>", "settings": {...}, "time": ...}
    {"kind": "sample", "task": "gsm8k", "problem": "17", "sample": 0, "seed": 93, "text": "...", "tokens": 61,
     "finish_reason": "stop", "rewards": {"correct": 1.0}, "correct": true}

Times stand in the header alone. `seed` is that of the problem's responses: with `sample`, the index among them, it
names one.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from sapo_learner import formats
from sapo_learner.errors import ConfigError, Corrupt
from services.runtime.api import Answer

Line = dict[str, Any]
Key = tuple[str, str]  # task, problem


def header(**facts: Any) -> Line:
    return {"kind": "header", "format": formats.EVALUATION.newest, **facts}


def sample_lines(task: str, problem: str, seed: int, answers: Sequence[Answer]) -> list[Line]:
    """The lines of one problem."""
    return [
        {"kind": "sample", "task": task, "problem": problem, "sample": index, "seed": seed, **answer.model_dump()}
        for index, answer in enumerate(answers)
    ]


def dump(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"


def read(path: Path) -> tuple[Line, list[Line]]:
    """The header, and every whole line behind it. Raises Corrupt when it does not begin with one, Mismatch for one of
    another version."""
    lines = list(_whole(path))
    if not lines or lines[0].get("kind") != "header":
        raise Corrupt("does not begin with the header of an evaluation", where=str(path), fix="remove it")
    formats.EVALUATION.check(lines[0].get("format"), where=str(path))
    return lines[0], lines[1:]


def by_problem(lines: Iterable[Line]) -> dict[Key, list[Line]]:
    """Of a problem that is there twice, the last response of each index; in the order of the indices."""
    problems: dict[Key, dict[int, Line]] = {}
    for line in lines:
        problems.setdefault((line["task"], line["problem"]), {})[line["sample"]] = line
    return {key: [found[index] for index in sorted(found)] for key, found in problems.items()}


def write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(map(dump, lines))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _whole(path: Path) -> Iterator[Line]:
    """Lines that end; the last one may have been torn by whatever ended the writer."""
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError:
                raise Corrupt("a line in its middle is not JSON", where=str(path), fix="remove the file") from None


class AnswerFile:
    """DIR/samples.jsonl, written problem by problem; what an earlier process wrote of the same evaluation is kept.

    found: the lines of every problem that is whole. Use as a context manager: nobody else writes there meanwhile.
    """

    def __init__(self, directory: Path | None, header: Line) -> None:
        """directory: None keeps the lines in memory alone."""
        self._directory, self._header = directory, header
        self.found: dict[Key, list[Line]] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> "AnswerFile":
        if self._directory is None:
            return self
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._directory, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._path.exists():
                self._go_on()
            write(self._path, [self._header, *(line for lines in self.found.values() for line in lines)])
            self._file = self._path.open("a", encoding="utf-8")
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(
                "another evaluation writes there", where=str(self._directory), fix="wait for it, or give another --out"
            ) from None
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()
            os.close(self._lock)

    @property
    def _path(self) -> Path:
        assert self._directory is not None
        return self._directory / "samples.jsonl"

    def _go_on(self) -> None:
        """Take over what is there. Raises ConfigError when it is of another evaluation."""
        earlier, lines = read(self._path)
        differ = [key for key in sorted(earlier.keys() | self._header.keys()) if key != "time"]
        differ = [key for key in differ if earlier.get(key) != self._header.get(key)]
        if differ:
            said = "; ".join(f"{key} {earlier.get(key)!r:.200} -> {self._header.get(key)!r:.200}" for key in differ)
            raise ConfigError(
                f"another evaluation is there: {said}", where=str(self._directory), fix="give another --out"
            )
        self._header = earlier
        count = self._header["settings"]["samples_per_problem"]
        self.found = {key: found for key, found in by_problem(lines).items() if len(found) == count}

    def add(self, lines: Sequence[Line]) -> None:
        """All of one problem."""
        self.found |= by_problem(lines)
        if self._file:
            self._file.writelines(map(dump, lines))
            self._file.flush()

    def finish(self, order: Sequence[Key]) -> dict[Key, list[Line]]:
        """All lines by problem, in that order, which the file gets as well: not that in which they were answered."""
        self.found = {key: self.found[key] for key in order}
        if self._file:
            write(self._path, [self._header, *(line for lines in self.found.values() for line in lines)])
        return self.found
