"""Where else the lines of a run's record go: one class per file, named by `record: {writers: [tensorboard]}`.

A writer is given every line of the record as it comes. It lives in a thread of its own, beside the control plane: it
may block, be slow, or fail; then lines are lost to it, which is said once and counted, and nothing else notices.

To add one, add one file here, or name one of your own as ./mine.py or module:ClassName. It holds one subclass of
`RecordWriter`. It has no torch: the control plane starts without it.
"""

import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from sapo_learner.config import Settings
from sapo_learner.errors import ConfigError
from sapo_learner.plugins import find_class, split

Line = Mapping[str, Any]
_NO_FIGURES = ("kind", "time", "step", "started", "ended")


class RecordSettings(Settings):
    writers: list[str] = Field(default=[])
    """Where else the lines of the run's record go, as they come: tensorboard, wandb, ./mine.py or module:ClassName."""


@dataclass(frozen=True)
class Run:
    """What a writer may want to know of the run. id: its name, and what tells it from others of that name."""

    name: str
    id: str
    directory: Path
    config: Mapping[str, Any]


class RecordWriter(ABC):
    module: ClassVar[str] = ""
    """What must be installed for it; of a writer here, by the extra of its name."""

    @abstractmethod
    def __init__(self, run: Run) -> None:
        """Called in the writer's thread, once the first line is there; if it raises, again with the next one."""

    @abstractmethod
    def write(self, line: Line) -> None:
        """One line of the record: `kind`, `time` (Unix seconds), and what lines of that kind hold.

        May raise anything: the line is lost to this writer then, and the next one is tried.
        """

    @abstractmethod
    def close(self) -> None:
        """The run's session is over. Not waited for long."""


def writer_class(name: str) -> type[RecordWriter]:
    """The writer of that name; ConfigError where there is none, or where what it needs is not installed."""
    found = find_class(name, RecordWriter, package=sys.modules[__name__], kind="writer")  # type: ignore[type-abstract]
    if found.module and importlib.util.find_spec(found.module) is None:
        package = f"'sapo[{name}]'" if found.__module__.startswith(__name__) else found.module
        raise ConfigError(
            f"{found.module} is not installed", where=f"record.writers {name}", fix=f"pip install {package}"
        )
    return found


def writer_classes(names: Sequence[str]) -> dict[str, type[RecordWriter]]:
    """All of them, by what they are called in logs and metrics. Raises ConfigError also for one that comes twice."""
    called = [split(name)[0] for name in names]
    if twice := [name for name in called if called.count(name) > 1]:
        raise ConfigError(f"{twice[0]!r} comes twice", where="record.writers", fix="name each once")
    return {name: writer_class(name) for name in names}


def figures(line: Line) -> dict[str, float]:
    """The numbers of a line that belongs to a step, by names like step/reward, seconds/forward or evaluation/pass_at_1;
    {} of another line."""
    if not isinstance(line.get("step"), int):
        return {}
    found = dict(_numbers({name: value for name, value in line.items() if name not in _NO_FIGURES}, ""))
    kind = line["kind"]
    return {name if kind == "step" and "/" in name else f"{kind}/{name}": value for name, value in found.items()}


def _numbers(values: Mapping[str, Any], place: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{place}{name}/")
        elif isinstance(value, int | float):
            yield f"{place}{name}", float(value)
