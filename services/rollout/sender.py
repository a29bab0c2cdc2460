"""Sends groups to ingest over one stream and keeps each until its ack is final; after a reconnect, sends them again."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from protos.sapo.v1 import ingest_pb2 as pb
from protos.sapo.v1 import ingest_pb2_grpc as pb_grpc
from protos.sapo.v1 import trajectory_pb2
from sapo_learner import errors
from sapo_learner.trajectory import TrajectoryGroup
from services.wire import MAX_MESSAGE_BYTES, to_message

log = logging.getLogger(__name__)
Key = tuple[int, int]  # draw, attempt
_RETRIED = (pb.Ack.STATUS_FULL, pb.Ack.STATUS_NOT_READY)
_FATAL = {
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Mismatch,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidTrajectory,
}
MAX_BACKOFF_SECONDS = 5.0


@dataclass
class _Pending:
    message: trajectory_pb2.TrajectoryGroup
    ack: asyncio.Future[pb.Ack]


class GroupSender:
    def __init__(self, address: str, token: str, hello: pb.Hello) -> None:
        self._address, self._hello = address, hello
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._pending: dict[Key, _Pending] = {}  # in the order they were sent first
        self._outbox: asyncio.Queue[Key] = asyncio.Queue()
        self._credits = 0
        self._changed = asyncio.Condition()

    @property
    def unacknowledged(self) -> int:
        return len(self._pending)

    async def send(self, group: TrajectoryGroup) -> pb.Ack:
        """Wait for a credit, send, and return the final ack."""
        message = to_message(group)
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._pending) < self._credits)
            key = (group.draw, group.attempt)
            pending = self._pending[key] = _Pending(message, asyncio.get_running_loop().create_future())
        self._outbox.put_nowait(key)
        return await pending.ack

    async def run(self) -> None:
        """Keep a stream open. Raises when ingest refuses this worker for good."""
        backoff, said = 0.1, False
        while True:
            try:
                async for _ in self._stream():
                    backoff, said = 0.1, False
            except grpc.aio.AioRpcError as error:
                if error.code() in _FATAL:
                    raise _FATAL[error.code()](error.details() or "refused", where=f"ingest {self._address}") from None
                if not said:
                    log.warning("ingest %s: %s; trying again", self._address, error.details())
                said = True
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    async def _stream(self) -> AsyncIterator[None]:
        """One connection; yields after every message from ingest."""
        options = [("grpc.max_send_message_length", MAX_MESSAGE_BYTES), ("grpc.keepalive_time_ms", 30_000),
                   ("grpc.keepalive_timeout_ms", 10_000)]  # fmt: skip
        async with grpc.aio.insecure_channel(self._address, options=options) as channel:
            stub = pb_grpc.TrajectoryIngestServiceStub(channel)  # type: ignore[no-untyped-call]
            self._outbox = asyncio.Queue()
            for key in self._pending:
                self._outbox.put_nowait(key)
            welcomed = asyncio.Event()
            call = stub.StreamTrajectoryGroups(self._requests(self._outbox, welcomed), metadata=self._metadata)
            async for response in call:
                match response.WhichOneof("message"):
                    case "welcome":
                        await self._set_credits(response.welcome.credits)
                        welcomed.set()
                    case "credits":
                        await self._set_credits(response.credits.limit)
                    case "ack":
                        await self._settle(response.ack)
                yield

    async def _requests(
        self, outbox: asyncio.Queue[Key], welcomed: asyncio.Event
    ) -> AsyncIterator[pb.StreamTrajectoryGroupsRequest]:
        yield pb.StreamTrajectoryGroupsRequest(hello=self._hello)
        await welcomed.wait()
        while True:
            pending = self._pending.get(await outbox.get())
            if pending is not None:
                yield pb.StreamTrajectoryGroupsRequest(group=pending.message)

    async def _set_credits(self, credits: int) -> None:
        async with self._changed:
            self._credits = credits
            self._changed.notify_all()

    async def _settle(self, ack: pb.Ack) -> None:
        key = (ack.draw, ack.attempt)
        if ack.status in _RETRIED:
            asyncio.get_running_loop().call_later(ack.retry_after_ms / 1000, self._outbox.put_nowait, key)
            return
        async with self._changed:
            pending = self._pending.pop(key, None)
            self._changed.notify_all()
        if pending is not None and not pending.ack.done():
            pending.ack.set_result(ack)
