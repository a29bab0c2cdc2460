"""Programming problems: the response's program is run with their tests, in a sandbox (`services.task_parts.sandbox`).

    task: {name: code, path: problems.jsonl}

    {"prompt": "Write add(a, b).", "tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}
    {"prompt": "Read two numbers, print their sum.", "tests": [{"input": "1 2\\n", "output": "3\\n"}]}

Tests are pieces of Python, run after `setup` where a problem has it, or pairs of input and output, compared line by
line without white space at the ends of lines. The program is the last block that is fenced as ```python, or else all of
the response. Correct means that every test passes; docs/code-task.md says what a response cannot do, and what it can.
"""

import codecs
import json
import re
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sapo_learner.errors import ConfigError
from services.task_parts import answer_task
from services.task_parts.sandbox import Isolation, Limits, Sandbox
from services.tasks import Prompt, Response, Split, Task

_FENCE = "```"
_OPENING = re.compile(r"```[ \t]*(?:python3?|py)", re.IGNORECASE)
_OUTPUT_BYTES = 1 << 16  # that a program may print beyond twice what it should

EXAMPLE = 'a line is like {"prompt": "Write add(a, b).", "tests": ["assert add(1, 2) == 3"]}'


class Pair(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str
    output: str


class Problem(BaseModel):
    """One line of the file; further keys are left alone."""

    prompt: str = Field(min_length=1)
    tests: tuple[str, ...] | tuple[Pair, ...] = Field(min_length=1)
    setup: str = ""


class Code(Task):
    path: Path
    """File with one JSON object per line: prompt, tests and perhaps setup; relative to the working directory."""
    held_out_path: Path | None = None
    """File with the held-out problems; default: a fraction of `path`."""
    held_out_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of `path` that is held out, by the hash of the prompt, without held_out_path."""
    partial: bool = False
    """Add a component `passed`: the share of the tests that pass."""
    seconds: float = Field(default=10, gt=0)
    """For all tests of a response together; stay below scoring.timeout_seconds, which would count it as an error."""
    memory_mib: int = Field(default=512, ge=64)
    """Address space of each process of a response."""
    disk_mib: int = Field(default=64, ge=1)
    """Files that a response may write."""
    processes: int = Field(default=16, ge=2)
    """Processes and threads of a response."""
    sandbox: Isolation = "bubblewrap"
    """none: run what the policy writes with the rights of the worker, where bubblewrap does not work. It can then read
    and delete your files."""

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return self._splits[split]

    def ready(self) -> None:
        self._sandbox.require(otherwise="sandbox: none")

    def score(self, prompt: Prompt, response: Response) -> dict[str, float]:
        problem = Problem.model_validate({"prompt": "?", **prompt.info})
        passed = self._passed(program(response.final), problem)
        rewards = {"correct": float(all(passed))}
        return rewards | {"passed": sum(passed) / len(passed)} if self.partial else rewards

    def _passed(self, code: str, problem: Problem) -> list[bool]:
        if not code.strip():
            return [False] * len(problem.tests)
        deadline = time.monotonic() + self.seconds
        texts = [each for each in problem.tests if isinstance(each, str)]
        if texts:
            return self._sandbox.check(code, problem.setup, texts, self.seconds)
        return [self._prints(code, each, deadline) for each in problem.tests if isinstance(each, Pair)]

    def _prints(self, code: str, pair: Pair, deadline: float) -> bool:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            return False
        limit = 2 * len(pair.output.encode()) + _OUTPUT_BYTES
        outcome = self._sandbox.run(code, pair.input, seconds, limit)
        return outcome.code == 0 and _lines(outcome.output.decode(errors="replace")) == _lines(pair.output)

    @cached_property
    def _sandbox(self) -> Sandbox:
        cpu = int(self.seconds) + 1
        return Sandbox(self.sandbox, Limits(self.memory_mib, self.disk_mib, self.processes, cpu))

    @cached_property
    def _splits(self) -> dict[Split, list[Prompt]]:
        everything = list(_read(self.path, "task.path"))
        if self.held_out_path:
            return {"train": everything, "held_out": list(_read(self.held_out_path, "task.held_out_path"))}
        return answer_task.split_by_prompt(everything, self.held_out_fraction, where=f"task.path {self.path}")


def program(text: str) -> str:
    """The last block fenced as Python, or else all of it."""
    lines, first, found = text.split("\n"), None, text
    for number, line in enumerate(lines):  # not one pattern: of many fences that never close that takes for ever
        mark = line.strip(" \t")
        if first is None:
            first = number + 1 if _OPENING.fullmatch(mark) else None
        elif mark == _FENCE:
            found, first = "".join(f"{each}\n" for each in lines[first:number]), None
    return found


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _read(path: Path, key: str) -> Iterator[Prompt]:
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise ConfigError(
            f"not readable: {error.strerror}", where=f"{key} {path}", fix="paths are relative to the working directory"
        ) from None
    if not any(map(bytes.strip, lines)):
        raise ConfigError("no problem in the file", where=f"{key} {path}", fix=EXAMPLE)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _prompt(line, f"{path}:{number}", f"{path.name}:{number}")


def _prompt(line: bytes, where: str, identifier: str) -> Prompt:
    try:
        data: Any = json.loads(line)
        problem = Problem.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the line"
        raise ConfigError(f"{key}: {first['msg'].lower()}", where=where, fix=EXAMPLE) from None
    except ValueError as error:
        raise ConfigError(f"not JSON: {error}", where=where, fix=EXAMPLE) from None
    return Prompt(
        id=identifier, content=problem.prompt, info=problem.model_dump(mode="json", include={"tests", "setup"})
    )
