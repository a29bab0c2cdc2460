"""Evaluations on held-out prompts, cut into chunks that workers lease and answer under one pinned version.

The first worker to take a chunk fixes the evaluation's version to the one it serves; others join while they serve the
same. When every worker that could finish it is gone, the evaluation starts over under a newer version.

An evaluation asks the held-out prompts of the run's tasks, and those of its suites, each with samples, temperature and
chat of its own. The overall figure is that of the tasks; where they hold nothing out, that of the suites.

The first and the last policy (boundaries) are evaluated at exactly that step. The last stays current for ever; the
first does because the next one is not published before (`holds`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from sapo_learner.errors import Mismatch
from services.control_plane.evaluation_parts import Part, cut, digest
from services.control_plane.sampler import derive_seed
from services.runtime.api import ChunkResult, EvaluationChunk
from services.runtime.evaluation_settings import EvaluationSettings
from services.suites import Suite
from services.tasks import Prompt

# So that a chunk's result is far from the largest body that the control plane takes, whatever it is written in.
RESULT_CHARACTERS, RESULT_ANSWERS = 2 << 20, 20_000


class Chunk(BaseModel):
    worker: str = ""  # who answers it; "" = nobody
    done: bool = False
    counts: list[int] = []  # correct responses per prompt
    tokens: int = 0
    examples: list[str] = []


class Evaluation(BaseModel):
    id: str
    after_step: int
    samples: int  # responses per prompt of the run's tasks
    boundary: bool  # of the first or the last policy: of exactly that step, never superseded
    version: int | None = None  # fixed by the first claim
    step: int | None = None
    chunks: list[Chunk]
    parts: str = ""  # digest of what is asked

    @property
    def done(self) -> bool:
        return all(chunk.done for chunk in self.chunks)

    def asked(self, part: Part) -> int:
        """Responses per prompt of that part."""
        return part.suite.samples if part.suite else self.samples


class Evaluations:
    """State machine over the evaluations that are not finished; the caller keeps them in Redis."""

    def __init__(
        self, prompts: Mapping[str, Sequence[Prompt]], seed: int, settings: EvaluationSettings, *, last_step: int,
        suites: Sequence[tuple[Suite, Sequence[Prompt]]] = (),
    ) -> None:  # fmt: skip
        """prompts: the held-out ones, by the label of their task. suites: with theirs."""
        self.parts, self._seed, self._settings, self._last_step = cut(prompts, suites), seed, settings, last_step
        self._digest = digest(self.parts)
        self._count = sum(map(len, prompts.values()))
        self.open: list[Evaluation] = []
        self._finished: set[int] = set()  # steps they were scheduled after, and steps they turned out to be of

    def restore(self, documents: Iterable[str], recorded: Iterable[Mapping[str, Any]]) -> None:
        """documents: the open ones, as saved. recorded: the lines of the finished; one that is in both is finished."""
        lines = list(recorded)
        self._finished = {line[key] for line in lines for key in ("step", "after_step") if key in line}
        finished = {line.get("after_step") for line in lines}
        saved = [Evaluation.model_validate_json(each) for each in documents]
        self.open = sorted((e for e in saved if e.after_step not in finished), key=lambda e: e.after_step)
        for each in self.open:
            if each.parts != self._digest:  # the settings have changed since: what was answered is of other prompts
                self._start_over(each)

    def schedule(self, step: int) -> bool:
        """Evaluate the first policy, the last, and one in every so many steps; call it before the policy is published.

        Idempotent. An evaluation that nobody has begun gives way to the newer one.
        """
        boundary = step in (0, self._last_step)
        known = {*self._finished, *(each.after_step for each in self.open)}
        latest = max((each // self._settings.every for each in known), default=-1)
        if not self.parts or step in known or not (boundary or step // self._settings.every > latest):
            return False
        samples = self._settings.boundary_samples if boundary else self._settings.samples
        evaluation = Evaluation(
            id=f"step-{step:08d}", after_step=step, samples=math.ceil(samples / max(1, self._count)), boundary=boundary,
            chunks=[Chunk() for _ in self.parts], parts=self._digest,
        )  # fmt: skip
        self.open.append(evaluation)
        self._drop_superseded()
        return True

    def holds(self, step: int) -> bool:
        """Whether the policy of `step` must wait: a boundary before it could not be evaluated any more."""
        return any(each.boundary and each.after_step < step for each in self.open)

    def claim(self, worker: str, version: int, step: int, serving: dict[str, int]) -> EvaluationChunk | None:
        """A chunk for a worker that serves `version`. serving: version by name of every worker that is alive."""
        for evaluation in self.open:
            self._reclaim(evaluation, serving | {worker: version})
        self._drop_superseded()
        for evaluation in self.open:
            too_new = evaluation.boundary and step > evaluation.after_step
            if step < evaluation.after_step or too_new or evaluation.version not in (None, version):
                continue
            for index, chunk in enumerate(evaluation.chunks):
                if not chunk.done and chunk.worker in ("", worker):
                    chunk.worker, evaluation.version, evaluation.step = worker, version, step
                    return self._body(evaluation, index, version)
        return None

    def awaiting(self, result: ChunkResult) -> Evaluation | None:
        """The evaluation that still wants this result: not a late one, nor one of other weights."""
        return next(
            (
                each
                for each in self.open
                if (each.id, each.version) == (result.evaluation, result.version)
                and result.chunk < len(each.chunks)
                and not each.chunks[result.chunk].done
            ),
            None,
        )

    def complete(self, result: ChunkResult) -> Evaluation | None:
        """Note a chunk's result; the evaluation is returned once it is done. Late or superseded results are dropped.

        Raises Mismatch for a result that is not one of its chunk.
        """
        evaluation = next((each for each in self.open if each.id == result.evaluation), None)
        if evaluation is None or evaluation.version != result.version:
            return None
        if result.chunk >= len(self.parts) or not _fits(result, self.parts[result.chunk], evaluation):
            raise Mismatch("not the result of that chunk", where=f"{result.evaluation}, chunk {result.chunk}")
        if not evaluation.chunks[result.chunk].done:
            evaluation.chunks[result.chunk] = Chunk(
                worker=result.worker, done=True, counts=result.correct, tokens=result.tokens, examples=result.examples
            )
        return evaluation if evaluation.done else None

    def finish(self, evaluation: Evaluation) -> None:
        """Forget a done evaluation, once it is recorded."""
        assert evaluation.step is not None
        self._finished |= {evaluation.after_step, evaluation.step}
        self.open.remove(evaluation)

    @property
    def pinned(self) -> set[int]:
        return {each.version for each in self.open if each.version is not None}

    def _reclaim(self, evaluation: Evaluation, serving: dict[str, int]) -> None:
        """Free the chunks of workers that are gone; start over when nobody can finish under the fixed version."""
        for chunk in evaluation.chunks:
            if not chunk.done and chunk.worker and serving.get(chunk.worker) != evaluation.version:
                chunk.worker = ""
        if evaluation.version is not None and evaluation.version not in serving.values():
            self._start_over(evaluation)

    def _start_over(self, evaluation: Evaluation) -> None:
        evaluation.version = evaluation.step = None
        evaluation.chunks, evaluation.parts = [Chunk() for _ in self.parts], self._digest

    def _drop_superseded(self) -> None:
        newest = max((each.after_step for each in self.open), default=0)
        newest = max(newest, *self._finished) if self._finished else newest
        self.open = [e for e in self.open if e.boundary or e.version is not None or e.after_step >= newest]

    def seed(self, evaluation: Evaluation, index: int) -> int:
        """Of the responses to a chunk's first prompt."""
        return derive_seed(self._seed, 2, evaluation.after_step, index)

    def _body(self, evaluation: Evaluation, index: int, version: int) -> EvaluationChunk:
        part, samples = self.parts[index], evaluation.asked(self.parts[index])
        answers = samples * len(part.prompts)
        wanted = bool(self._settings.kept) and answers <= RESULT_ANSWERS
        return EvaluationChunk(
            evaluation=evaluation.id, chunk=index, version=version, samples=samples, seed=self.seed(evaluation, index),
            task=part.task, prompts=list(part.prompts),
            temperature=part.suite.temperature if part.suite else None,
            max_tokens=part.suite.max_tokens if part.suite else None,
            chat=part.suite.chat if part.suite else None,
            text_characters=min(self._settings.text_characters, RESULT_CHARACTERS // answers) if wanted else None,
        )  # fmt: skip


def _fits(result: ChunkResult, part: Part, evaluation: Evaluation) -> bool:
    samples, prompts = evaluation.asked(part), len(part.prompts)
    if (len(result.correct), result.samples) != (prompts, prompts * samples):
        return False
    answers = [sum(each.correct for each in found) for found in result.answers] or result.correct
    whole = all(len(found) == samples for found in result.answers)
    return whole and answers == result.correct and all(correct <= samples for correct in result.correct)
