"""Chains like `7+5-3=`, answered as `(12)>9`: the intermediate value in brackets, then `>` and the result.

Two operations on digits 1-9 whose running value never goes negative. Correct means: the text after the last `>` is the
result, and the response ended by itself. About a tenth of the prompts, by CRC-32, is held out.

The demonstration's bad habit: skip the reasoning and guess. A policy that can calculate but mostly guesses is what
RL then mends; it is not taught arithmetic by RL.
"""

import random
import zlib
from collections.abc import Sequence
from functools import cached_property
from itertools import product
from typing import ClassVar

from pydantic import Field

from sapo_learner.config import Settings
from services.tasks import Problem, Response, Split


class Arithmetic(Settings):
    held_out_every: int = Field(default=10, ge=2)
    """One prompt in this many is held out."""

    name: ClassVar[str] = "arithmetic"
    alphabet: ClassVar[str] = "0123456789+-=()>"

    @cached_property
    def _all(self) -> list[Problem]:
        chains = product(range(1, 10), "+-", range(1, 10), "+-", range(1, 10))
        problems = []
        for a, first, b, second, c in chains:
            middle = a + b if first == "+" else a - b
            result = middle + c if second == "+" else middle - c
            if middle >= 0 and result >= 0:
                prompt = f"{a}{first}{b}{second}{c}="
                problems.append(Problem(id=prompt, prompt=prompt, answer=str(result)))
        return problems

    def problems(self, split: Split) -> Sequence[Problem]:
        def held_out(problem: Problem) -> bool:
            return zlib.crc32(problem.prompt.encode()) % self.held_out_every == 0

        return [problem for problem in self._all if held_out(problem) == (split == "held_out")]

    def score(self, problem: Problem, response: Response) -> dict[str, float]:
        _, mark, answer = response.text.rpartition(">")
        correct = bool(mark) and answer == problem.answer and response.finish_reason == "stop"
        return {"correct": float(correct)}

    def demonstration(self, problem: Problem, generator: random.Random, *, habit: bool) -> str:
        if habit:
            return f">{generator.randint(0, 27)}"
        prompt = problem.prompt
        middle = int(prompt[0]) + (1 if prompt[1] == "+" else -1) * int(prompt[2])
        return f"({middle})>{problem.answer}"


TASK = Arithmetic
