"""A TCP proxy that can be a bad network, and one reader of what passes: the acknowledgements that ingest gave."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from protos.sapo.v1 import ingest_pb2 as pb

CHUNK = 1 << 16
_FRAME_HEADER, _MESSAGE_HEADER, _DATA, _PADDED = 9, 5, 0, 0x8
Watch = Callable[[bytes], None]


@dataclass(frozen=True)
class SeenAck:
    """An answer of ingest on its way to a worker; time in Unix seconds."""

    time: float
    draw: int
    attempt: int
    status: int
    entry_id: str


class Proxy:
    """Passes bytes between its own address and `target`, both HOST:PORT.

    listen: an address that its owner keeps reserved (SO_REUSEPORT), so that it is ours again after a refusal.
    answers: called once per connection, for what shall see the bytes that come back from the target.
    delay: seconds that everything takes, each way.
    """

    def __init__(
        self, listen: str, target: str, answers: Callable[[], Watch] = lambda: lambda _: None, delay: float = 0
    ) -> None:
        self.address, self.target, self._answers, self._delay = listen, target, answers, delay
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._passing = asyncio.Event()
        self._passing.set()

    async def accept(self) -> None:
        """Take connections, from now on."""
        if self._server is None:
            host, _, port = self.address.rpartition(":")
            self._server = await asyncio.start_server(self._serve, host, int(port), reuse_port=True)

    def refuse(self) -> None:
        """No new connections; those there are live on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def cut(self) -> None:
        """Reset every connection."""
        for writer in self._writers:
            writer.transport.abort()

    def silence(self) -> None:
        """Accept and pass nothing on; what is held goes on its way with `speak`."""
        self._passing.clear()

    def speak(self) -> None:
        self._passing.set()

    async def close(self) -> None:
        self.refuse()
        self.cut()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        self._writers.add(writer)
        try:
            host, _, port = self.target.rpartition(":")
            there, back = await asyncio.open_connection(host, int(port))
            self._writers.add(back)
            try:
                ways = [self._pass(reader, back, lambda _: None), self._pass(there, writer, self._answers())]
                _, pending = await asyncio.wait(
                    [asyncio.ensure_future(way) for way in ways], return_when=asyncio.FIRST_COMPLETED
                )
                for each in pending:
                    each.cancel()
            finally:
                self._writers.discard(back)
                back.transport.abort()
        except (OSError, asyncio.CancelledError):
            pass  # the target is not there: neither are we
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, watch: Watch) -> None:
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                await asyncio.sleep(self._delay)
                await self._passing.wait()
                watch(data)
                writer.write(data)
                await writer.drain()
            writer.write_eof()
            await asyncio.sleep(0.05)  # what is still buffered, before the connection is aborted


class AckReader:
    """Reads acknowledgements out of one connection's HTTP/2 frames, server to client.

    Whatever passes here was said by ingest, whether or not the worker lives to hear it: the strictest list of groups
    that must not be lost, and one that survives the death of every process of the run.
    """

    def __init__(self, take: Callable[[SeenAck], None]) -> None:
        self._take = take
        self._frames = bytearray()
        self._messages: dict[int, bytearray] = {}  # stream -> what came of it and is no whole message yet

    def __call__(self, data: bytes) -> None:
        self._frames += data
        while len(self._frames) >= _FRAME_HEADER:
            end = _FRAME_HEADER + int.from_bytes(self._frames[:3], "big")
            if len(self._frames) < end:
                return
            kind, flags, stream = self._frames[3], self._frames[4], int.from_bytes(self._frames[5:9], "big")
            if kind == _DATA:
                assert not flags & _PADDED, "gRPC does not pad its frames"
                self._data(stream & 0x7FFFFFFF, bytes(self._frames[_FRAME_HEADER:end]))
            del self._frames[:end]

    def _data(self, stream: int, payload: bytes) -> None:
        rest = self._messages.setdefault(stream, bytearray())
        rest += payload
        while len(rest) >= _MESSAGE_HEADER:
            assert not rest[0], "nobody asked for compressed messages"
            end = _MESSAGE_HEADER + int.from_bytes(rest[1:5], "big")
            if len(rest) < end:
                return
            response = pb.StreamTrajectoryGroupsResponse.FromString(bytes(rest[_MESSAGE_HEADER:end]))
            if response.WhichOneof("message") == "ack":
                ack = response.ack
                self._take(SeenAck(time.time(), ack.draw, ack.attempt, ack.status, ack.entry_id))
            del rest[:end]
