"""The bad network does what its faults say, and reads acknowledgements wherever the bytes are cut."""

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from protos.sapo.v1 import ingest_pb2 as pb
from tests.chaos.proxy import AckReader, Proxy, SeenAck


@dataclass
class Line:
    proxy: Proxy
    reserved: socket.socket

    async def ask(self, text: bytes, seconds: float = 5) -> bytes:
        """A new connection to the echo behind the proxy; b"" when it is reset."""
        host, _, port = self.proxy.address.rpartition(":")
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(text)
                return await reader.read(100)
            except ConnectionError:
                return b""
            finally:
                writer.transport.abort()


@pytest_asyncio.fixture
async def line() -> AsyncIterator[Line]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(100):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(("127.0.0.1", 0))
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    proxy = Proxy(f"127.0.0.1:{reserved.getsockname()[1]}", target)
    await proxy.accept()
    yield Line(proxy, reserved)
    await proxy.close()
    server.close()
    reserved.close()


async def test_bytes_pass_both_ways(line: Line) -> None:
    assert await line.ask(b"hello") == b"hello"


async def test_refused_connections_come_again(line: Line) -> None:
    line.proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await line.ask(b"hello")
    await line.proxy.accept()
    assert await line.ask(b"hello") == b"hello"


async def test_silence_holds_what_is_said_until_it_is_over(line: Line) -> None:
    line.proxy.silence()
    asking = asyncio.create_task(line.ask(b"hello"))
    done, _ = await asyncio.wait([asking], timeout=0.2)
    assert not done
    line.proxy.speak()
    assert await asking == b"hello"


async def test_a_cut_resets_what_is_open(line: Line) -> None:
    line.proxy.silence()
    asking = asyncio.create_task(line.ask(b"hello"))
    await asyncio.wait([asking], timeout=0.2)
    line.proxy.cut()
    assert await asking == b""


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_acknowledgements_are_read_wherever_the_bytes_are_cut(size: int) -> None:
    answers = [pb.StreamTrajectoryGroupsResponse(welcome=pb.Welcome(run="r", credits=4))]
    for draw in range(3):
        ack = pb.Ack(draw=draw, attempt=1, status=pb.Ack.STATUS_ACCEPTED, entry_id=f"1-{draw}")
        answers.append(pb.StreamTrajectoryGroupsResponse(ack=ack))
    body = b"".join(b"\0" + len(m).to_bytes(4, "big") + m for m in (each.SerializeToString() for each in answers))
    frames = _frame(4, 0, b"settings") + _frame(0, 1, body[:11]) + _frame(1, 1, b"headers") + _frame(0, 1, body[11:])
    seen: list[SeenAck] = []
    reader = AckReader(seen.append)
    for start in range(0, len(frames), size):
        reader(frames[start : start + size])
    assert [(each.draw, each.entry_id) for each in seen] == [(0, "1-0"), (1, "1-1"), (2, "1-2")]


def _frame(kind: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, 0]) + stream.to_bytes(4, "big") + payload
