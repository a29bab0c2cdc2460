"""Problem in, responses and rewards out: prompts become token ids, the engine samples, the task scores."""

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sapo_learner.errors import Corrupt, Unavailable
from sapo_learner.trajectory import FinishReason
from services.rollout.engines import Engine, Sampled, SampleRequest, TokenDelta
from services.runtime.api import ProblemBody
from services.runtime.metrics import RolloutMetrics
from services.runtime.settings import SamplingSettings
from services.tasks import Problem, Response, Task


class Responder:
    def __init__(
        self, engine: Engine, tokenizer: Any, task: Task, sampling: SamplingSettings, metrics: RolloutMetrics
    ) -> None:
        self._engine, self._tokenizer, self.task, self._sampling = engine, tokenizer, task, sampling
        self._metrics = metrics
        self._requests = itertools.count()

    def encode(self, problem: ProblemBody) -> list[int]:
        ids: list[int] = self._tokenizer.encode(problem.prompt)
        return ids

    def text(self, sampled: Sampled) -> str:
        text: str = self._tokenizer.decode(sampled.token_ids, skip_special_tokens=True)
        return text

    async def rewards(self, problem: ProblemBody, sampled: Sequence[Sampled]) -> list[dict[str, float]]:
        """What each response is worth. The task scores on a thread: it may take its time; the tokenizer stays here."""
        body = Problem(problem.id, problem.prompt, problem.answer)
        responses = [Response(self.text(each), ended(each)) for each in sampled]
        return await asyncio.to_thread(lambda: [self.task.score(body, response) for response in responses])

    async def respond(
        self, prompt_ids: list[int], seed: int, count: int, progress: Callable[[int], None] = lambda _: None
    ) -> list[Sampled]:
        """`count` responses, the same for the same seed and weights. progress: told the number of new tokens.

        Cancelling aborts them all. Raises Unavailable when the engine is gone, Corrupt when a log-prob is not finite.
        """
        seeds = np.random.SeedSequence(seed).generate_state(count, np.uint64).tolist()
        async with asyncio.TaskGroup() as group:
            responses = [group.create_task(self._one(self._request(prompt_ids, each), progress)) for each in seeds]
        return [each.result() for each in responses]

    def _request(self, prompt_ids: list[int], seed: int) -> SampleRequest:
        name = f"response-{next(self._requests)}"
        return SampleRequest(name, prompt_ids, seed, self._sampling.max_tokens, self._sampling.temperature)

    async def _one(self, request: SampleRequest, progress: Callable[[int], None]) -> Sampled:
        sampled = Sampled()
        async for delta in self._engine.generate(request):
            self._require_finite(delta)
            sampled.add(delta)
            self._metrics.tokens.inc(len(delta.token_ids))
            progress(len(delta.token_ids))
        if sampled.finish_reason is None:
            raise Unavailable(f"{request.id} ended after {len(sampled.token_ids)} tokens", where=self._engine.name)
        return sampled

    def _require_finite(self, delta: TokenDelta) -> None:
        """One NaN stays in an engine's cache and comes back in later responses, so only a fresh engine may go on."""
        if all(map(math.isfinite, delta.logprobs)):
            return
        self._metrics.dropped.labels("not finite").inc()
        raise Corrupt(
            f"a log-prob sampled under version {delta.policy.version} is not finite; the response is dropped",
            where=self._engine.name,
            fix="the worker ends, to start with a fresh engine; when it comes again, look at the engine's dtype",
        )


def ended(sampled: Sampled) -> FinishReason:
    """Why a whole response ended."""
    assert sampled.finish_reason is not None
    return sampled.finish_reason
