"""Tasks: problems, and what a response to one is worth. One small file each, found by its file name; no torch.

A task is a class with `problems(split)` and `score(problem, response)`; a file of that name in this folder exports it
as `TASK`. A task that can teach a base policy (the built-in demonstration) also has `demonstration`.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from sapo_learner.config import did_you_mean, parse
from sapo_learner.errors import ConfigError
from sapo_learner.trajectory import FinishReason

Split = Literal["train", "held_out"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt and what is needed to score a response to it. `id` is unique within the task."""

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Response:
    """What the policy answered: its text without special tokens, and why it ended."""

    text: str
    finish_reason: FinishReason


class TaskSettings(BaseModel):
    """`task: {name: arithmetic, ...}`: every key but `name` is an option of that task."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = "arithmetic"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Task(Protocol):
    name: str

    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of a split, always in the same order; the splits share none."""

    def score(self, problem: Problem, response: Response) -> dict[str, float]:
        """Named reward components; "correct" (0 or 1) is what evaluation counts as pass@1."""


@runtime_checkable
class Teacher(Protocol):
    """A task that can write demonstrations, to warm-start a base policy from nothing."""

    alphabet: str

    def demonstration(self, problem: Problem, generator: Any, *, habit: bool) -> str:
        """A response to imitate: a clean one, or one with the bad habit that RL is to remove."""


def available() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def task_class(name: str) -> Any:
    """The class of that name; an unknown one raises ConfigError."""
    if name not in available():
        raise ConfigError(f"unknown task {name!r}, {did_you_mean(name, available())}", where="task")
    return importlib.import_module(f"{__name__}.{name}").TASK


def build(settings: TaskSettings) -> Task:
    """The task of that name; unknown names and options raise ConfigError."""
    task: Task = parse(task_class(settings.name), settings.options, where=f"task {settings.name}")
    return task
