"""The small engine: BatchDecoder on a thread of its own, for CPUs, demos and tests.

The thread alternates between commands (add, abort, update, score) and decoding steps, so weights change exactly between
two steps. Deltas of one step reach the event loop in one call. What ends the thread ends everything that waits for it.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import torch

from sapo_learner.errors import ConfigError, SapoError, Unavailable
from sapo_learner.memory import enough_memory
from sapo_learner.policy import Policy
from services.rollout.engines import EngineHealth, PolicyVersion, SampleRequest, TokenDelta
from services.rollout.engines.busy import BusyTime
from services.rollout.engines.decoder import BatchDecoder

CLOSE_SECONDS = 10.0


class TorchEngine:
    def __init__(self, policy: Policy, version: PolicyVersion, *, slots: int = 256) -> None:
        """policy: becomes the engine's own. slots: responses decoded in one batch; more wait their turn."""
        self.name = f"torch {torch.__version__}"
        self._lower = f"lower engine.slots (now {slots}), or sampling.max_tokens in a new run"
        with enough_memory("making room for the responses", where=self.name, fix=self._lower):
            self._decoder = BatchDecoder(policy, version, slots=slots)
        self._context: int | None = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
        self._vocabulary = policy.vocabulary
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: list[SampleRequest] = []  # the thread's own
        self._outputs: dict[str, asyncio.Queue[TokenDelta | None]] = {}  # the loop's own, like _calls
        self._calls: set[asyncio.Future[Any]] = set()
        self._busy = BusyTime()
        self._sampled = 0
        self._ended: str | None = None  # why the thread is no more
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self._thread.start()

    @property
    def policy_version(self) -> PolicyVersion:
        return self._decoder.version

    async def generate(self, request: SampleRequest) -> AsyncIterator[TokenDelta]:
        self._check(request)
        output: asyncio.Queue[TokenDelta | None] = asyncio.Queue()
        self._send(lambda: self._waiting.append(request))
        self._outputs[request.id] = output
        try:
            while (delta := await output.get()) is not None:
                if delta.finish_reason is not None:
                    self._forget(request.id, output)  # the row is free already
                    yield delta
                    return
                yield delta
            if self._ended is not None:
                raise self._gone()
        finally:
            if self._forget(request.id, output):
                self._commands.put(lambda: self._abort(request.id))

    async def abort(self, request_id: str) -> None:
        output = self._outputs.get(request_id)
        if output is not None and self._forget(request_id, output):
            self._commands.put(lambda: self._abort(request_id))
            output.put_nowait(None)

    async def update_weights(self, tensors: Mapping[str, Any], policy: PolicyVersion) -> None:
        await self._call(lambda: self._deliver(self._decoder.update_weights(tensors, policy)))

    async def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        values: list[float] = await self._call(lambda: self._decoder.score(prompt_ids, token_ids))
        return values

    def busy_intervals(self) -> list[tuple[float, float]]:
        return self._busy.take()

    async def health(self) -> EngineHealth:
        return EngineHealth(self._ended is None, self._decoder.active, self._sampled, self._ended or "")

    async def close(self) -> None:
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, CLOSE_SECONDS)

    # ---- on the event loop

    def _check(self, request: SampleRequest) -> None:
        if request.id in self._outputs:
            raise ValueError(f"request {request.id} is in flight already")
        if (highest := max(request.prompt_ids)) >= self._vocabulary:
            raise ConfigError(
                f"the prompt has token id {highest}, the model knows only {self._vocabulary}",
                where="tokenizer",
                fix="take model and tokenizer from the same directory",
            )
        length = len(request.prompt_ids) + request.max_tokens
        if self._context is not None and length > self._context:
            raise ConfigError(
                f"{len(request.prompt_ids)} prompt and {request.max_tokens} response tokens exceed the model's context "
                f"of {self._context}",
                where="sampling.max_tokens",
                fix="lower it, or use a model with a longer context",
            )

    def _forget(self, request_id: str, output: asyncio.Queue[TokenDelta | None]) -> bool:
        """Take no more deltas for it; False when that is so already (the id may be another request's by now)."""
        known = self._outputs.get(request_id) is output
        if known:
            del self._outputs[request_id]
        return known

    def _gone(self) -> Unavailable:
        return Unavailable(f"the engine stopped: {self._ended}", where=self.name)

    def _send(self, command: Callable[[], None]) -> None:
        if self._ended is not None:
            raise self._gone()
        self._commands.put(command)

    async def _call(self, function: Callable[[], Any]) -> Any:
        """Run a function between two decoding steps; its result, or its exception, is the caller's."""
        future: asyncio.Future[Any] = self._loop.create_future()

        def settle(setter: Callable[[Any], None], value: Any) -> None:
            if not future.done():
                setter(value)

        def command() -> None:
            try:
                with enough_memory("taking over weights or scoring", where=self.name, fix=self._lower):
                    result = function()
            except Exception as error:
                self._loop.call_soon_threadsafe(settle, future.set_exception, error)
                if isinstance(error, Unavailable) or not isinstance(error, SapoError):
                    raise  # nobody knows what state it left behind
            else:
                self._loop.call_soon_threadsafe(settle, future.set_result, result)

        self._send(command)
        self._calls.add(future)
        try:
            return await future
        finally:
            self._calls.discard(future)

    def _put(self, deltas: Mapping[str, TokenDelta]) -> None:
        for request_id, delta in deltas.items():
            if request_id in self._outputs:
                self._outputs[request_id].put_nowait(delta)

    def _end_all(self) -> None:
        for output in self._outputs.values():
            output.put_nowait(None)
        for future in self._calls:
            if not future.done():
                future.set_exception(self._gone())

    # ---- on the thread

    def _run(self) -> None:
        ended = "closed"
        try:
            with enough_memory("sampling", where="", fix=self._lower):
                while self._take_commands():
                    self._admit()
                    if self._decoder.active:
                        self._decode()
        except Unavailable as error:
            ended = str(error)
        except BaseException as error:
            ended = f"{type(error).__name__}: {error}"
        finally:
            self._ended = ended
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                self._loop.call_soon_threadsafe(self._end_all)

    def _take_commands(self) -> bool:
        """Run what is queued, blocking when there is nothing else to do; False when asked to end."""
        while True:
            idle = not self._decoder.active and not self._waiting
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _admit(self) -> None:
        count = min(self._decoder.free, len(self._waiting))
        if count:
            self._decoder.add(self._waiting[:count])
            del self._waiting[:count]

    def _decode(self) -> None:
        started, rows = time.time(), self._decoder.active
        deltas = self._decoder.step()
        self._sampled += rows
        self._deliver(deltas)
        self._busy.add(started, time.time())

    def _abort(self, request_id: str) -> None:
        self._waiting = [each for each in self._waiting if each.id != request_id]
        self._decoder.abort(request_id)

    def _deliver(self, deltas: Mapping[str, TokenDelta]) -> None:
        if deltas:
            self._loop.call_soon_threadsafe(self._put, deltas)
