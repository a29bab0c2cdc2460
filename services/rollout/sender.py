"""Sends groups to ingest over one stream and keeps each until its ack is final; after a reconnect, sends them again."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from protos.sapo.v1 import ingest_pb2 as pb
from protos.sapo.v1 import ingest_pb2_grpc as pb_grpc
from protos.sapo.v1 import trajectory_pb2
from sapo_learner import errors
from sapo_learner.trajectory import TrajectoryGroup
from services.runtime.auth import Credential
from services.runtime.grpc_errors import answered, from_rpc
from services.runtime.tls import Tls
from services.wire import MAX_MESSAGE_BYTES, to_message

log = logging.getLogger(__name__)
Key = tuple[int, int]  # draw, attempt
_RETRIED = (pb.Ack.STATUS_FULL, pb.Ack.STATUS_NOT_READY)
# The worker itself is what is wrong: connecting again cannot help.
_FATAL = (errors.Unauthenticated, errors.Forbidden, errors.Mismatch, errors.InvalidTrajectory, errors.ConfigError)
_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.1, 5.0


@dataclass
class _Pending:
    message: trajectory_pb2.TrajectoryGroup
    ack: asyncio.Future[pb.Ack]


@dataclass
class _Stream:
    """One connection: what it still has to send (None: it is over), and whether ingest has answered the hello."""

    outbox: asyncio.Queue[Key | None] = field(default_factory=asyncio.Queue)
    welcomed: asyncio.Event = field(default_factory=asyncio.Event)


class GroupSender:
    def __init__(
        self,
        address: str,
        token: str | Credential,
        hello: pb.Hello,
        *,
        tls: Tls | None = None,
        answer_seconds: float = 60.0,
        patience: float = 600.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """answer_seconds: a connection on which ingest owes an answer for longer is given up for a new one.

        patience: how long, in seconds, ingest is tried to be reached before `run` gives up.
        """
        self._address, self._hello = address, hello
        self._answer_seconds, self._patience, self._max_bytes = answer_seconds, patience, max_message_bytes
        self._unreached: float | None = None  # since when nothing has come from ingest; None: it answers
        self._credential = Credential(token) if isinstance(token, str) else token
        self._tls = tls or Tls()
        self._pending: dict[Key, _Pending] = {}  # in the order they were sent first
        self._stream = _Stream()
        self.credits = 0
        """Groups that ingest lets this worker have unacknowledged."""
        self._changed = asyncio.Event()  # credits, or what is pending

    @property
    def unacknowledged(self) -> int:
        return len(self._pending)

    async def send(self, group: TrajectoryGroup) -> pb.Ack:
        """Wait for a credit, send, and return the final ack. Cancelling gives the group up.

        Raises InvalidTrajectory at once for a group that does not fit into one message.
        """
        message, key = to_message(group, max_bytes=self._max_bytes), (group.draw, group.attempt)
        while len(self._pending) >= self.credits:
            self._changed.clear()
            await self._changed.wait()
        pending = self._pending[key] = _Pending(message, asyncio.get_running_loop().create_future())
        self._stream.outbox.put_nowait(key)
        try:
            return await pending.ack
        finally:
            del self._pending[key]
            self._changed.set()

    async def run(self) -> None:
        """Keep a stream open. Raises when ingest refuses this worker for good, or cannot be reached for too long."""
        backoff, said = FIRST_BACKOFF_SECONDS, ""
        while True:
            if self._unreached is None:
                self._unreached = time.monotonic()
            try:
                async for _ in self._answers():
                    backoff, said, self._unreached = FIRST_BACKOFF_SECONDS, "", None
                problem = "it closed the stream"
            except grpc.aio.AioRpcError as error:
                problem = self._judged(error)
            except ConnectionError as error:
                problem = str(error)
            if problem != said:
                log.warning("ingest %s: %s; trying again", self._address, problem)
                said = problem
            await asyncio.sleep(max(0.0, min(backoff * random.uniform(0.5, 1.0), self._patience_left())))
            if self._patience_left() <= 0:
                raise self._gave_up(problem)
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    def _judged(self, failure: grpc.aio.AioRpcError) -> str:
        """Raises what is for good; else says why the stream ended."""
        error = from_rpc(failure, where=f"ingest {self._address}")
        if isinstance(error, errors.Unauthenticated) and self._credential.refused():
            self._unreached = None  # ingest is there
            return str(error)
        if isinstance(error, _FATAL):
            raise error from None
        if answered(failure) is None:
            return error.what
        if isinstance(error, errors.Unavailable):
            self._unreached = None  # ingest is there, and says what it waits for
        return str(error)

    def _patience_left(self) -> float:
        return self._patience - (0.0 if self._unreached is None else time.monotonic() - self._unreached)

    def _gave_up(self, problem: str) -> errors.Unavailable:
        return errors.Unavailable(
            f"ingest cannot be reached, tried for {self._patience:g} s: {problem}",
            where=self._address,
            fix="is it running, and is SAPO_INGEST_ADDRESS its address?",
        )

    async def _answers(self) -> AsyncIterator[None]:
        """One connection; yields after every message from ingest."""
        async with self._tls.channel(self._address, _OPTIONS) as channel:
            stub = pb_grpc.TrajectoryIngestServiceStub(channel)  # type: ignore[no-untyped-call]
            stream = self._stream = _Stream()
            for key in self._pending:
                stream.outbox.put_nowait(key)
            metadata = (("authorization", self._credential.header),)
            call = stub.StreamTrajectoryGroups(self._requests(stream), metadata=metadata)
            try:
                while (response := await self._read(call, stream)) is not grpc.aio.EOF:
                    self._take(response, stream)
                    self._credential.accepted()
                    yield
            finally:
                call.cancel()
                stream.outbox.put_nowait(None)  # gRPC does not end the request iterator of a call that is over
                stream.welcomed.set()

    async def _requests(self, stream: _Stream) -> AsyncIterator[pb.StreamTrajectoryGroupsRequest]:
        yield pb.StreamTrajectoryGroupsRequest(hello=self._hello)
        await stream.welcomed.wait()
        while (key := await stream.outbox.get()) is not None:
            pending = self._pending.get(key)
            if pending is not None:
                yield pb.StreamTrajectoryGroupsRequest(group=pending.message)

    async def _read(self, call: Any, stream: _Stream) -> Any:
        """The next message, or EOF. Raises ConnectionError when ingest owes one for too long."""
        read = asyncio.ensure_future(call.read())
        try:
            while True:
                oldest = next(iter(self._pending), None)
                limit = max(0.0, min(self._answer_seconds, self._patience_left()))
                done, _ = await asyncio.wait([read], timeout=limit)
                if read.cancelled():  # by gRPC; as a CancelledError it would be taken for ours
                    raise ConnectionError("the call was cancelled")
                if done:
                    return read.result()
                if not stream.welcomed.is_set() or oldest in self._pending:
                    raise ConnectionError(f"no answer for {limit:.3g} s")
        finally:
            read.cancel()

    def _take(self, response: pb.StreamTrajectoryGroupsResponse, stream: _Stream) -> None:
        match response.WhichOneof("message"):
            case "welcome":
                self.credits = response.welcome.credits
                self._changed.set()
                stream.welcomed.set()
            case "credits":
                self.credits = response.credits.limit
                self._changed.set()
            case "ack":
                self._settle(response.ack, stream)

    def _settle(self, ack: pb.Ack, stream: _Stream) -> None:
        key = (ack.draw, ack.attempt)
        pending = self._pending.get(key)
        if ack.status in _RETRIED:
            asyncio.get_running_loop().call_later(ack.retry_after_ms / 1000, stream.outbox.put_nowait, key)
        elif pending is not None and not pending.ack.done():
            pending.ack.set_result(ack)
