"""The small engine: BatchDecoder on a thread of its own, for CPUs, demos and tests.

The thread alternates between commands (add, abort, update, score) and decoding steps, so weights change exactly between
two steps. Deltas of one step reach the event loop in one call.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import torch

from sapo_learner.errors import Unavailable
from sapo_learner.policy import Policy
from services.rollout.engines import EngineHealth, PolicyVersion, SampleRequest, TokenDelta
from services.rollout.engines.decoder import BatchDecoder

MERGE_SECONDS = 0.005  # decoding pauses shorter than this count as busy


class TorchEngine:
    def __init__(self, policy: Policy, version: PolicyVersion, *, slots: int = 256) -> None:
        """policy: becomes the engine's own. slots: responses decoded in one batch; more wait their turn."""
        self.name = f"torch {torch.__version__}"
        self._decoder = BatchDecoder(policy, version, slots=slots)
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: list[SampleRequest] = []
        self._outputs: dict[str, asyncio.Queue[TokenDelta | None]] = {}
        self._busy: list[tuple[float, float]] = []
        self._busy_lock = threading.Lock()
        self._sampled = 0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self._thread.start()

    @property
    def policy_version(self) -> PolicyVersion:
        return self._decoder.version

    async def generate(self, request: SampleRequest) -> AsyncIterator[TokenDelta]:
        output: asyncio.Queue[TokenDelta | None] = asyncio.Queue()
        self._outputs[request.id] = output
        self._send(lambda: self._waiting.append(request))
        try:
            while True:
                delta = await output.get()
                if delta is None:
                    if self._failure is not None:
                        raise Unavailable(f"the engine stopped: {self._failure}", where=self.name)
                    return
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            if self._outputs.pop(request.id, None) is not None and self._failure is None:
                self._send(lambda: self._abort(request.id))

    async def abort(self, request_id: str) -> None:
        if request_id in self._outputs:
            self._outputs[request_id].put_nowait(None)

    async def update_weights(self, tensors: Mapping[str, Any], policy: PolicyVersion) -> None:
        await self._call(lambda: self._deliver(self._decoder.update_weights(tensors, policy)))

    async def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int], temperature: float) -> list[float]:
        values: list[float] = await self._call(lambda: self._decoder.score(prompt_ids, token_ids, temperature))
        return values

    def busy_intervals(self) -> list[tuple[float, float]]:
        with self._busy_lock:
            intervals, self._busy = self._busy, []
        return intervals

    async def health(self) -> EngineHealth:
        alive = self._thread.is_alive() and self._failure is None
        return EngineHealth(alive, self._decoder.active, self._sampled, str(self._failure or ""))

    async def close(self) -> None:
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, 10)

    def _send(self, command: Callable[[], None]) -> None:
        if self._failure is not None:
            raise Unavailable(f"the engine stopped: {self._failure}", where=self.name)
        self._commands.put(command)

    async def _call(self, function: Callable[[], Any]) -> Any:
        """Run a function between two decoding steps; its result, or its exception, is the caller's."""
        future: asyncio.Future[Any] = self._loop.create_future()

        def settle(setter: Callable[[Any], None], value: Any) -> None:
            if not future.done():
                setter(value)

        def command() -> None:
            try:
                result = function()
            except Exception as error:
                self._loop.call_soon_threadsafe(settle, future.set_exception, error)
            else:
                self._loop.call_soon_threadsafe(settle, future.set_result, result)

        self._send(command)
        return await future

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._admit()
                if self._decoder.active:
                    self._decode()
        except BaseException as error:
            self._failure = error
        finally:
            if not self._loop.is_closed():
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
        self._deliver(self._decoder.step())
        self._sampled += rows
        ended = time.time()
        with self._busy_lock:
            if self._busy and started - self._busy[-1][1] < MERGE_SECONDS:
                started = self._busy.pop()[0]
            self._busy.append((started, ended))

    def _abort(self, request_id: str) -> None:
        self._waiting = [each for each in self._waiting if each.id != request_id]
        self._decoder.abort(request_id)

    def _deliver(self, deltas: Mapping[str, TokenDelta]) -> None:
        if deltas:
            self._loop.call_soon_threadsafe(self._put, deltas)

    def _put(self, deltas: Mapping[str, TokenDelta]) -> None:
        for request_id, delta in deltas.items():
            if request_id in self._outputs:
                self._outputs[request_id].put_nowait(delta)

    def _end_all(self) -> None:
        for output in self._outputs.values():
            output.put_nowait(None)
