"""Evaluations on held-out problems, cut into chunks that workers lease and answer under one pinned version.

The first worker to take a chunk fixes the evaluation's version to the one it serves; others join while they serve the
same. When every worker that could finish it is gone, the evaluation starts over under a newer version.
"""

import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from services.control_plane.sampler import derive_seed
from services.runtime.api import ChunkResult, EvaluationChunk, ProblemBody
from services.tasks import Problem

CHUNK_PROBLEMS = 50


class Chunk(BaseModel):
    worker: str = ""  # who answers it; "" = nobody
    done: bool = False
    correct: int = 0
    responses: int = 0
    tokens: int = 0
    examples: list[str] = []


class Evaluation(BaseModel):
    id: str
    after_step: int
    samples: int  # responses per problem
    boundary: bool  # of the first or the last policy: never superseded
    version: int | None = None
    step: int | None = None
    chunks: list[Chunk]

    @property
    def done(self) -> bool:
        return all(chunk.done for chunk in self.chunks)

    def summary(self, problems: Sequence[Problem]) -> dict[str, Any]:
        """The line for the run's record: pass@1, its standard error over responses, one answer per problem."""
        responses = sum(chunk.responses for chunk in self.chunks)
        mean = sum(chunk.correct for chunk in self.chunks) / responses
        answers = [answer for chunk in self.chunks for answer in chunk.examples]
        return {
            "step": self.step,
            "version": self.version,
            "pass_at_1": mean,
            "standard_error": math.sqrt(mean * (1 - mean) / responses),
            "samples": responses,
            "mean_tokens": sum(chunk.tokens for chunk in self.chunks) / responses,
            "examples": [[problem.prompt, answer] for problem, answer in zip(problems, answers, strict=False)][:20],
        }


class Evaluations:
    """State machine over the evaluations that are not finished; the caller keeps it in Redis."""

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self.problems, self._seed = list(problems), seed
        self.open: list[Evaluation] = []

    def schedule(self, after_step: int, *, samples: int, boundary: bool) -> Evaluation | None:
        """Evaluate whatever is served from now on. An evaluation that nobody has begun gives way to the newer one."""
        if not self.problems or any(each.after_step == after_step for each in self.open):
            return None
        self.open = [each for each in self.open if each.boundary or each.version is not None]
        count = math.ceil(len(self.problems) / CHUNK_PROBLEMS)
        repeats = math.ceil(samples / len(self.problems))
        evaluation = Evaluation(
            id=f"step-{after_step:08d}", after_step=after_step, samples=repeats, boundary=boundary,
            chunks=[Chunk() for _ in range(count)],
        )  # fmt: skip
        self.open.append(evaluation)
        return evaluation

    def claim(self, worker: str, version: int, step: int, serving: dict[str, int]) -> EvaluationChunk | None:
        """A chunk for a worker that serves `version`. serving: version by name of every worker that is alive."""
        for evaluation in self.open:
            self._reclaim(evaluation, serving | {worker: version})
            if step < evaluation.after_step or evaluation.version not in (None, version):
                continue
            for index, chunk in enumerate(evaluation.chunks):
                if not chunk.done and chunk.worker in ("", worker):
                    chunk.worker, evaluation.version, evaluation.step = worker, version, step
                    return self._body(evaluation, index, version)
        return None

    def complete(self, result: ChunkResult) -> Evaluation | None:
        """Note a chunk's result; the evaluation is returned once it is done. Late or superseded results are dropped."""
        evaluation = next((each for each in self.open if each.id == result.evaluation), None)
        if evaluation is None or evaluation.version != result.version or evaluation.chunks[result.chunk].done:
            return None
        evaluation.chunks[result.chunk] = Chunk(
            worker=result.worker, done=True, correct=sum(result.correct), responses=result.samples,
            tokens=result.tokens, examples=result.examples,
        )  # fmt: skip
        if not evaluation.done:
            return None
        self.open.remove(evaluation)
        return evaluation

    @property
    def pinned(self) -> set[int]:
        return {each.version for each in self.open if each.version is not None}

    def _reclaim(self, evaluation: Evaluation, serving: dict[str, int]) -> None:
        """Free the chunks of workers that are gone; start over when nobody can finish under the fixed version."""
        for chunk in evaluation.chunks:
            if not chunk.done and chunk.worker and serving.get(chunk.worker) != evaluation.version:
                chunk.worker = ""
        if evaluation.version is not None and evaluation.version not in serving.values():
            evaluation.version = evaluation.step = None
            evaluation.chunks = [Chunk() for _ in evaluation.chunks]

    def _body(self, evaluation: Evaluation, index: int, version: int) -> EvaluationChunk:
        part = self.problems[index * CHUNK_PROBLEMS : (index + 1) * CHUNK_PROBLEMS]
        return EvaluationChunk(
            evaluation=evaluation.id, chunk=index, version=version, samples=evaluation.samples,
            seed=derive_seed(self._seed, 2, evaluation.after_step, index),
            problems=[ProblemBody(id=each.id, prompt=each.prompt, answer=each.answer) for each in part],
        )  # fmt: skip
