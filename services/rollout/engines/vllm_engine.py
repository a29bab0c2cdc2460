"""vLLM in this process (`AsyncLLM`), behind the Engine protocol.

New weights arrive between two engine steps: pause (running responses keep their place, every cache is cleared), stage,
apply, resume. After it the caches of running responses are computed anew under the new weights, so every log-prob
belongs to one policy, which the engine core itself labels each token with.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from sapo_learner.errors import ConfigError, Mismatch, SapoError, Unavailable
from sapo_learner.policy import PolicyDescription
from sapo_learner.snapshot import save_tensors
from sapo_learner.trajectory import LogprobMode
from services.rollout.engines import EngineHealth, PolicyVersion, SampleRequest, TokenDelta, vllm_adapter
from services.rollout.engines.busy import BusyTime
from services.runtime.engine_settings import EngineSettings

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]
RESTART = "the worker is restarted and loads the policy afresh"


class VllmEngine:
    def __init__(
        self, llm: Any, description: PolicyDescription, shapes: Shapes, policy: PolicyVersion, scratch: Path,
        settings: EngineSettings, context: int | None,
    ) -> None:  # fmt: skip
        """Use `start`. shapes: of every tensor of the policy. scratch: where weights are handed over."""
        self.name = f"vllm {vllm_adapter.require_vllm()}"
        self._llm, self._description, self._shapes, self._policy = llm, description, shapes, policy
        self._scratch, self._context = scratch, context
        self._call_seconds = settings.vllm.call_seconds
        self._dead_errors = vllm_adapter.dead_errors()
        self._live: set[str] = set()
        self._busy = BusyTime()
        self._updating = asyncio.Lock()
        self._sampled = 0
        self._ended: str | None = None
        self.pause_seconds = 0.0  # of the last update

    @classmethod
    async def start(
        cls, model: Path, description: PolicyDescription, shapes: Shapes, policy: PolicyVersion, *,
        settings: EngineSettings, dtype: str, mode: LogprobMode, scratch: Path,
    ) -> "VllmEngine":  # fmt: skip
        """Serve a model directory as `policy`.

        dtype: to compute in, if the settings do not say. mode: which log-probs are recorded. Raises ConfigError for
        settings or a version that cannot be served, Unavailable when vLLM does not start.
        """
        vllm_adapter.require_vllm()
        context = settings.vllm.max_model_len or description.context
        try:
            llm = await asyncio.to_thread(vllm_adapter.start, model, settings, dtype=dtype, mode=mode, context=context)
        except RuntimeError as error:
            raise Unavailable(
                f"vLLM did not start: {error}", where="rollout worker", fix="see its log above"
            ) from error
        engine = cls(llm, description, shapes, policy, scratch, settings, context)
        await engine._within(llm.update_weight_version(vllm_adapter.label(policy)), "naming the policy")
        return engine

    @property
    def policy_version(self) -> PolicyVersion:
        return self._policy

    async def generate(self, request: SampleRequest) -> AsyncIterator[TokenDelta]:
        self._check(request)
        params = vllm_adapter.sampling(request, sorted(self._description.end_ids))
        prompt = vllm_adapter.prompt(request.prompt_ids, self._policy)
        self._live.add(request.id)
        self._busy.begin()
        try:
            async with aclosing(self._llm.generate(prompt, params, request.id)) as outputs:
                seen = 0
                async for output in outputs:
                    for delta in self._deltas(output, seen):
                        seen += len(delta.token_ids)
                        yield delta
        except self._dead_errors as error:
            self._end(str(error) or type(error).__name__)
            raise self._gone() from error
        finally:
            self._live.discard(request.id)
            self._busy.end()

    async def abort(self, request_id: str) -> None:
        if request_id in self._live:
            await self._within(self._llm.abort(request_id), "aborting a response")

    async def update_weights(self, tensors: Mapping[str, Tensor], policy: PolicyVersion) -> None:
        self._check_shapes(tensors)
        path = self._scratch / f"weights-{secrets.token_hex(4)}.safetensors"
        try:
            await asyncio.to_thread(save_tensors, tensors, path)
            async with self._updating:
                await self._swap(path, policy)
        finally:
            path.unlink(missing_ok=True)

    async def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        ids = [*prompt_ids, *token_ids]
        request_id = f"score-{secrets.token_hex(8)}"
        outputs = self._llm.generate(vllm_adapter.prompt(ids, self._policy), vllm_adapter.scoring(), request_id)
        last = await self._within(_last(outputs), "scoring")
        entries = last.prompt_logprobs[len(prompt_ids) :]
        return [entry[token].logprob for entry, token in zip(entries, token_ids, strict=True)]

    def busy_intervals(self) -> list[tuple[float, float]]:
        return self._busy.take()

    async def health(self) -> EngineHealth:
        if self._ended is None and self._llm.errored:
            self._end("its core process died; its log says why")
        return EngineHealth(self._ended is None, len(self._live), self._sampled, self._ended or "")

    async def close(self) -> None:
        self._end("closed")
        await asyncio.to_thread(self._llm.shutdown)

    # ---- inside

    def _deltas(self, output: Any, seen: int) -> list[TokenDelta]:
        """The output's tokens, cut where the policy changed; `seen` tokens came before."""
        (completion,) = output.outputs
        ids, reason = list(completion.token_ids), completion.finish_reason
        logprobs = [entry[token].logprob for entry, token in zip(completion.logprobs or (), ids, strict=True)]
        self._sampled += len(ids)
        deltas = []
        starts = vllm_adapter.spans_so_far(self._llm, output)  # of all tokens, also of those not seen here yet
        ends = [start for _, start in starts[1:]] + [seen + len(ids)]
        for (policy, start), end in zip(starts, ends, strict=False):
            part = slice(max(start - seen, 0), max(end - seen, 0))
            if ids[part]:
                deltas.append(TokenDelta(ids[part], logprobs[part], policy))
        if sum(len(each.token_ids) for each in deltas) != len(ids):
            self._end(f"it did not say which policy its tokens were sampled under: {starts}")
            raise self._gone()
        if reason is not None and reason != "abort":
            last = deltas.pop() if deltas else TokenDelta([], [], self._policy)
            deltas.append(replace(last, finish_reason=reason))
        return deltas

    async def _swap(self, path: Path, policy: PolicyVersion) -> None:
        """From the moment that a worker begins to change its model there is no way back: what fails then ends the
        engine. Whatever happens, it is not left paused."""
        began = time.monotonic()
        await self._within(self._llm.pause_generation(mode="keep", clear_cache=True), "pausing")
        try:
            try:
                await self._within(vllm_adapter.stage_weights(self._llm, path), "reading new weights")
            except Unavailable:
                raise
            except Exception as error:  # vLLM passes on what its workers raised as bare Exceptions
                raise Mismatch(f"vLLM's workers refuse the weights: {error}", where=self.name) from error
            try:
                await self._within(self._llm.finish_weight_update(vllm_adapter.label(policy)), "applying new weights")
            except asyncio.CancelledError:  # new weights may be there under the old name
                self._end("it was interrupted while changing its weights")
                raise
            except Exception as error:
                self._end(f"it failed while changing its weights: {error}")
                raise self._gone() from error
            self._policy = policy
        finally:
            if self._ended is None:
                await self._within(self._llm.resume_generation(), "resuming")
            self.pause_seconds = time.monotonic() - began

    def _check(self, request: SampleRequest) -> None:
        if self._ended is not None:
            raise self._gone()
        if request.id in self._live:
            raise ValueError(f"request {request.id} is in flight already")
        if (highest := max(request.prompt_ids)) >= self._description.vocabulary:
            raise ConfigError(
                f"the prompt has token id {highest}, the model knows only {self._description.vocabulary}",
                where="tokenizer", fix="take model and tokenizer from the same directory",
            )  # fmt: skip
        length = len(request.prompt_ids) + request.max_tokens
        if self._context is not None and length > self._context:
            raise ConfigError(
                f"{len(request.prompt_ids)} prompt and {request.max_tokens} response tokens exceed the context of "
                f"{self._context}",
                where="sampling.max_tokens", fix="lower it, raise engine.vllm.max_model_len, or use another model",
            )  # fmt: skip

    def _check_shapes(self, tensors: Mapping[str, Tensor]) -> None:
        """vLLM would load what is there and keep the old policy's for the rest."""
        fix = "is it a snapshot of another model?"
        if tensors.keys() != self._shapes.keys():
            odd = sorted(tensors.keys() ^ self._shapes.keys())
            raise Mismatch(f"tensors differ in names: {', '.join(odd[:5])}", where=self.name, fix=fix)
        for name, shape in self._shapes.items():
            if tuple(tensors[name].shape) != tuple(shape):
                shapes = f"{list(tensors[name].shape)}, the model's is {list(shape)}"
                raise Mismatch(f"tensor {name!r} has shape {shapes}", where=self.name, fix=fix)

    async def _within(self, call: Awaitable[T], what: str) -> T:
        """Every call into vLLM has a time limit: one that its core died under never returns."""
        if self._ended is not None:
            raise self._gone()
        try:
            async with asyncio.timeout(self._call_seconds):
                return await call
        except TimeoutError:
            self._end(f"{what} took more than {self._call_seconds:.0f} s")
        except self._dead_errors as error:
            self._end(str(error) or type(error).__name__)
        raise self._gone()

    def _end(self, why: str) -> None:
        if self._ended is None:
            self._ended = why
            vllm_adapter.end_everything(self._llm, self._dead_errors[0]())

    def _gone(self) -> SapoError:
        return Unavailable(f"the engine stopped: {self._ended}", where=self.name, fix=RESTART)


async def _last(outputs: AsyncIterator[Any]) -> Any:
    every = [output async for output in outputs]
    return every[-1]
