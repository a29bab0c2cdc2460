"""Files that may be replaced while a process runs: tokens, certificates. Looked at when they are used."""

import hashlib
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from sapo_learner.errors import ConfigError, SapoError

T = TypeVar("T")
log = logging.getLogger(__name__)
LOOK_SECONDS = 1.0  # between two looks
MAX_BYTES = 1 << 20  # of one file


_all: "weakref.WeakSet[Watched[Any]]" = weakref.WeakSet()


def unusable() -> set[str]:
    """Paths of files that have changed, and with which nothing can be done."""
    for each in [*_all]:
        each.get()
    return {path for each in [*_all] if each.unusable for path in each.paths}


class Watched(Generic[T]):
    """What `make` makes of the contents of some files, made anew when they have changed.

    Raises at the start what is wrong with them. Later that is said once, and what was made before stays in force: a
    file may be seen half written.
    """

    def __init__(self, files: Sequence[tuple[str, str]], make: Callable[[list[bytes]], T]) -> None:
        """files: the environment variable that names each, and its path."""
        self._files, self._make, self._said = files, make, ""
        contents = self._read()
        self._seen, self._value = _digest(contents), make(contents)
        self._next_look = time.monotonic() + LOOK_SECONDS
        _all.add(self)

    @property
    def paths(self) -> list[str]:
        return [path for _, path in self._files]

    @property
    def unusable(self) -> bool:
        return bool(self._said)

    def get(self, *, now: bool = False) -> T:
        """now: also when the last look was a moment ago."""
        if now or time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_SECONDS
            self._look()
        return self._value

    def _look(self) -> None:
        try:
            contents = self._read()
            if (seen := _digest(contents)) != self._seen:
                self._value, self._seen = self._make(contents), seen
                log.info("read again, for it has changed: %s", ", ".join(self.paths))
            self._said = ""
        except SapoError as error:
            if self._said != str(error):
                log.error("%s; what was read before stays in force", error)
            self._said = str(error)

    def _read(self) -> list[bytes]:
        return [_content(variable, path) for variable, path in self._files]


def _content(variable: str, path: str) -> bytes:
    where = f"environment {variable}, {path}"
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise ConfigError(what, where=where, fix="the process must be allowed to read it") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"more than {MAX_BYTES} bytes", where=where, fix="is it the right file?")
    return content


def _digest(contents: list[bytes]) -> bytes:
    """Not the contents: they are secret."""
    return hashlib.sha256(b"".join(hashlib.sha256(each).digest() for each in contents)).digest()
