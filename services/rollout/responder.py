"""Prompt in, responses and rewards out: prompts become token ids, the engine samples, the task replies and scores."""

import asyncio
import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sapo_learner.errors import Corrupt, Unavailable
from sapo_learner.trajectory import FinishReason
from services.rollout.chat import Chat
from services.rollout.engines import Engine, Sampled, SampleRequest, TokenDelta
from services.rollout.scoring import ReplyFailed, Rewards, Scorer
from services.runtime.metrics import RolloutMetrics
from services.runtime.sampling_settings import ChatSettings, SamplingSettings, ScoringSettings
from services.runtime.settings import RunConfig
from services.tasks import Prompt, Response


class Responder:
    def __init__(
        self, engine: Engine, tokenizer: Any, scorer: Scorer, config: RunConfig, metrics: RolloutMetrics
    ) -> None:
        self._engine, self._tokenizer, self._scorer, self._metrics = engine, tokenizer, scorer, metrics
        self._sampling: SamplingSettings = config.sampling
        self._scoring: ScoringSettings = config.scoring
        self._chat = Chat(tokenizer, config.chat)
        self._requests = itertools.count()

    def asking(
        self, *, temperature: float | None = None, max_tokens: int | None = None, chat: ChatSettings | None = None
    ) -> "Responder":
        """The same one, but for what is given: an evaluation may sample otherwise than training does."""
        changes = {"temperature": temperature, "max_tokens": max_tokens}
        other = copy.copy(self)
        other._sampling = self._sampling.model_copy(update={k: v for k, v in changes.items() if v is not None})
        other._chat = self._chat if chat is None else Chat(self._tokenizer, chat)
        return other

    def encode(self, task: str, prompt: Prompt) -> list[int]:
        return self._chat.encode(prompt, task=task)

    @property
    def failures(self) -> tuple[Counter[str], str]:
        """Responses that could not be scored or replied to so far, by reason, and the newest in words."""
        return Counter(self._scorer.failures), self._scorer.last_failure

    def text(self, sampled: Sampled) -> str:
        """All of a response, without special tokens."""
        return self._decode(sampled.token_ids)

    async def rewards(self, task: str, prompt: Prompt, sampled: Sequence[Sampled]) -> list[Rewards]:
        """What each response is worth to the task of that label, and, where it is asked for, how overlong it is."""
        responses = [None if each.failed else self._response(each) for each in sampled]
        rewards = await self._scorer.score(task, prompt, responses)
        if not self._scoring.overlong_buffer:
            return rewards
        lengths = [len(each.token_ids) for each in sampled]
        return [{**each, "overlong": self._overlong(length)} for each, length in zip(rewards, lengths, strict=True)]

    def correct(self, task: str, rewards: Rewards) -> bool:
        return self._scorer.tasks[task].correct(rewards)

    async def respond(
        self,
        task: str,
        prompt: Prompt,
        seed: int,
        count: int,
        progress: Callable[[int], None] = lambda _: None,
        prompt_ids: list[int] | None = None,
    ) -> list[Sampled]:
        """`count` responses, the same for the same seed and weights. progress: told the number of new tokens.
        prompt_ids: what `encode` has made of the prompt, by whoever needs it, too.

        Cancelling aborts them all. Raises Unavailable when the engine is gone, Corrupt when a log-prob is not finite.
        """
        prompt_ids = self.encode(task, prompt) if prompt_ids is None else prompt_ids
        seeds = np.random.SeedSequence(seed).generate_state(count, np.uint64).tolist()
        async with asyncio.TaskGroup() as group:
            responses = [group.create_task(self._one(task, prompt, prompt_ids, each, progress)) for each in seeds]
        return [each.result() for each in responses]

    async def _one(
        self, task: str, prompt: Prompt, prompt_ids: list[int], seed: int, progress: Callable[[int], None]
    ) -> Sampled:
        """Turn after turn, until the policy is cut off, the task has no reply, or there is no room for one."""
        sampled = Sampled()
        await self._turn(sampled, self._request(prompt_ids, seed, self._sampling.max_tokens), progress)
        for turn in range(1, self._scoring.max_turns):
            try:
                reply = None if sampled.finish_reason != "stop" else await self._reply(task, prompt, sampled)
            except ReplyFailed:
                sampled.failed = True
                break
            if reply is None:
                break
            room = self._sampling.max_tokens - len(sampled.token_ids) - len(reply)
            if room < 1:
                sampled.finish_reason = "length"
                break
            sampled.tell(reply)
            next_seed = int(np.random.SeedSequence([seed, turn]).generate_state(1, np.uint64)[0])
            await self._turn(sampled, self._request([*prompt_ids, *sampled.token_ids], next_seed, room), progress)
        return sampled

    async def _reply(self, task: str, prompt: Prompt, sampled: Sampled) -> list[int] | None:
        text = await self._scorer.reply(task, prompt, [self._decode(each) for each in sampled.turns])
        return None if text is None else self._chat.reply(text, self._scorer.tasks[task].replies_as)

    def _request(self, prompt_ids: list[int], seed: int, max_tokens: int) -> SampleRequest:
        return SampleRequest(
            f"response-{next(self._requests)}", prompt_ids, seed, max_tokens, self._sampling.temperature
        )

    async def _turn(self, sampled: Sampled, request: SampleRequest, progress: Callable[[int], None]) -> None:
        async for delta in self._engine.generate(request):
            self._require_finite(delta)
            sampled.add(delta)
            self._metrics.tokens.inc(len(delta.token_ids))
            progress(len(delta.token_ids))
        if sampled.finish_reason is None:
            raise Unavailable(f"{request.id} ended after {len(sampled.token_ids)} tokens", where=self._engine.name)

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

    def _response(self, sampled: Sampled) -> Response:
        turns = tuple(self._decode(each) for each in sampled.turns)
        return Response(self.text(sampled), ended(sampled), turns)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def _overlong(self, length: int) -> float:
        """DAPO arXiv 2503.14476, Eq. 13: 0 up to the buffer, then linearly to -penalty at the token limit."""
        buffer, limit = self._scoring.overlong_buffer, self._sampling.max_tokens
        return -self._scoring.overlong_penalty * max(0, length - (limit - buffer)) / buffer


def ended(sampled: Sampled) -> FinishReason:
    """Why a whole response ended."""
    assert sampled.finish_reason is not None
    return sampled.finish_reason
