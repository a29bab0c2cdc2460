"""What a task is: prompts, and what a response to one is worth. One small class; no torch.

    class Capitals(Task):
        path: Path = Path("capitals.jsonl")                     # its options in run.yaml

        def prompts(self, split: Split) -> Sequence[Prompt]:
            return [Prompt(id="fr", content="Capital of France?", answer="Paris")]

        def score(self, prompt: Prompt, response: Response) -> dict[str, float]:
            return {"correct": float(prompt.answer in response.text)}

To add one that comes along, add one file here; its name in run.yaml is the name of the file. Nothing is registered. One
that is not part of this package is named by its file or module instead: `task: {name: ./capitals.py}`.
"""

import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from sapo_learner.config import Settings, parse
from sapo_learner.errors import ConfigError
from sapo_learner.plugins import find_class
from sapo_learner.trajectory import FinishReason

Split = Literal["train", "held_out"]
END_OF_TURN = "\N{SYMBOL FOR END OF TRANSMISSION}"  # in a demonstration; in no prompt


class Message(BaseModel):
    """One message of a chat, as chat templates take it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str
    content: str


class Prompt(BaseModel):
    """What the policy answers, and what is needed to score a response to it. Crosses the wire as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1)
    """Unique within the task."""
    content: str | tuple[Message, ...] = Field(min_length=1)
    """A text, or a chat of several messages (`services.rollout.chat` says what becomes of either)."""
    answer: str = ""
    info: dict[str, JsonValue] = {}
    """Whatever else `score` needs."""

    @property
    def text(self) -> str:
        """For people: the text, or the chat's last message."""
        return self.content if isinstance(self.content, str) else self.content[-1].content


@dataclass(frozen=True, slots=True)
class Response:
    """What the policy answered, without special tokens, and why it ended.

    text: all of it, what the task replied in between included. turns: the policy's own, one after the other; a response
    in a single turn, and most are, has one, which is `text`. finish_reason: of the whole, "length" also where a turn
    had ended, and there was no room left for what the task replied: like a text that is cut off, it does not show what
    the policy would have answered.
    """

    text: str
    finish_reason: FinishReason
    turns: tuple[str, ...] = ()

    @property
    def final(self) -> str:
        """The policy's last turn."""
        return self.turns[-1] if self.turns else self.text


class TaskSettings(BaseModel):
    """`task: {name: jsonl, path: ...}`: every key but those below is an option of that task."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str = "arithmetic"
    """File name of the task in services/tasks; or one of your own: a file such as ./mine.py, relative to the working
    directory, or module:ClassName."""
    label: str = Field(default="", pattern=r"^[\w.-]{0,60}$")
    """What records and figures call it; default: the last part of its name. Of several tasks each needs its own."""
    share: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of several tasks: how much of every step's groups it gets, relative to the others."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @property
    def called(self) -> str:
        """The label, or the last part of the name."""
        return self.label or self.name.removesuffix(".py").replace(":", "/").rpartition("/")[2]


class Task(Settings, ABC):
    """Base of every task. Fields are its options, checked on construction.

    `score` and `reply` run in processes of their own, each with its own copy of the task, within
    `scoring.timeout_seconds`; `prompts` runs once, where the run is controlled.
    """

    inline: ClassVar[bool] = False
    """Whether `score` is so quick and so harmless that it may run in the worker itself."""
    replies_as: ClassVar[str] = "user"
    """The role of what `reply` says, in a chat template: user, or tool."""

    @abstractmethod
    def prompts(self, split: Split) -> Sequence[Prompt]:
        """All prompts of a split, always in the same order; the splits share none. No held-out ones: no pass@1."""

    @abstractmethod
    def score(self, prompt: Prompt, response: Response) -> Mapping[str, float]:
        """Named reward components, whose sum is the reward; the same names for every response."""

    def correct(self, rewards: Mapping[str, float]) -> bool:
        """Whether pass@1 counts a response: component "correct" is 1 or more, or where there is none, the sum is."""
        return rewards.get("correct", sum(rewards.values())) >= 1

    def reply(self, prompt: Prompt, turns: Sequence[str]) -> str | None:
        """What the policy is told after these turns of its own, such as a tool's output; None: the response is over."""
        return None

    def ready(self) -> None:
        """Raises ConfigError for what the task cannot do without on the machine where it scores."""


@runtime_checkable
class Teacher(Protocol):
    """A task that can write demonstrations, to warm-start a base policy from nothing."""

    alphabet: str

    def demonstration(self, prompt: Prompt, generator: Any, *, habit: bool) -> str | tuple[str, str]:
        """A response to imitate: a clean one, or one with the bad habit that RL is to remove.

        Of a response in several turns: one of them, after what stands between it and the prompt. There, END_OF_TURN is
        where the policy has ended an earlier turn.
        """


def available() -> list[str]:
    """Names of all tasks that come along, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def task_class(name: str) -> type[Task]:
    """A name from `available`, a file such as "./mine.py", or "module:ClassName"; else ConfigError."""
    return find_class(name, Task, package=sys.modules[__name__], kind="task")  # type: ignore[type-abstract]


def build(settings: TaskSettings) -> Task:
    """The task of that name; unknown names and options raise ConfigError."""
    return parse(task_class(settings.name), settings.options, where=f"task {settings.name}")


def build_all(settings: Sequence[TaskSettings]) -> dict[str, Task]:
    """Tasks in order, by what they are called. Raises ConfigError also where two are called the same."""
    labels = [each.called for each in settings]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{label!r} is there {labels.count(label)} times", where="tasks", fix="give each a label")
    return {each.called: build(each) for each in settings}
