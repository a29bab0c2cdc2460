"""TLS on both doors: who gets in, and what both ends say of who does not."""

import asyncio
import contextlib
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpcore
import httpx
import pytest
from fastapi import FastAPI

from sapo_learner.errors import ConfigError, Mismatch, Unavailable
from services.runtime import tls_handshake, watched
from services.runtime.client import ControlPlaneClient
from services.runtime.grpc_errors import from_rpc
from services.runtime.http import serving
from services.runtime.seldom import Seldom
from services.runtime.tls import SCHEME, Tls
from tests.certificates import Certificates


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


app = FastAPI()


@app.get("/v1/status")
async def status() -> dict[str, str]:
    return {"state": "here"}


@asynccontextmanager
async def http(server: Tls) -> AsyncIterator[str]:
    async with serving(app, "127.0.0.1:0", server) as url:
        yield url.partition("//")[2]


@asynccontextmanager
async def rpc(server: Tls) -> AsyncIterator[str]:
    """Has no method: who gets in is told so."""
    serves = grpc.aio.server()
    if server.serves:
        port = serves.add_secure_port("127.0.0.1:0", server.server_credentials())
    else:
        port = serves.add_insecure_port("127.0.0.1:0")
    await serves.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await serves.stop(0)


async def ask_http(address: str, client: Tls | None) -> None:
    url = f"{'https' if client else 'http'}://{address}"
    async with ControlPlaneClient(url, "token", tls=client, patience=0.2) as control:
        assert await control.status() == {"state": "here"}


async def ask_rpc(address: str, client: Tls | None) -> None:
    async with (client or Tls()).channel(SCHEME * bool(client) + address, []) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/sapo.v1.None/None")(b"", timeout=10)
    error = from_rpc(caught.value, where=address)
    if not isinstance(error, Mismatch):  # UNIMPLEMENTED: it got through
        raise error


DOORS = pytest.mark.parametrize(("door", "ask"), [(http, ask_http), (rpc, ask_rpc)], ids=["http", "grpc"])
Server = Callable[[Certificates], Tls]


def open_to_all(made: Certificates) -> Tls:
    return Tls(*made.pair("server"))


def mutual(made: Certificates) -> Tls:
    return Tls(*made.pair("server"), client_ca=made.ca)


@DOORS
async def test_who_knows_the_authority_gets_in(door, ask, made: Certificates) -> None:  # type: ignore[no-untyped-def]
    async with door(open_to_all(made)) as address:
        await ask(address, Tls(ca=made.ca))


@DOORS
async def test_who_has_a_certificate_gets_in_where_one_is_demanded(door, ask, made: Certificates) -> None:  # type: ignore[no-untyped-def]
    async with door(mutual(made)) as address:
        await ask(address, Tls(*made.pair("client"), ca=made.ca))


CLIENT_SAYS: dict[str, tuple[Server, Callable[[Certificates], Tls | None], str]] = {
    "plain client": (open_to_all, lambda made: None, "does it want https://"),
    "plain server": (lambda made: Tls(), lambda made: Tls(ca=made.ca), "the server speaks no TLS there"),
    "expired": (
        lambda made: Tls(*made.pair("old", days=-1)), lambda made: Tls(ca=made.ca),
        "the server's certificate has expired",
    ),
    "unknown authority": (
        lambda made: Tls(*made.pair("foreign", foreign=True)), lambda made: Tls(ca=made.ca),
        "set SAPO_TLS_CA to the file of its CA",
    ),
    "no authority given": (open_to_all, lambda made: Tls(), "set SAPO_TLS_CA to the file of its CA"),
    "another name": (
        lambda made: Tls(*made.pair("other", host="elsewhere.example")), lambda made: Tls(ca=made.ca),
        "another name's",
    ),
    "no certificate": (mutual, lambda made: Tls(ca=made.ca), "SAPO_TLS_CERT"),
    "certificate of another authority": (
        mutual, lambda made: Tls(*made.pair("stranger", foreign=True), ca=made.ca), "SAPO_TLS_CERT",
    ),
    "expired certificate of a client": (
        mutual, lambda made: Tls(*made.pair("late", days=-1), ca=made.ca), "SAPO_TLS_CERT",
    ),
}  # fmt: skip


@DOORS
@pytest.mark.parametrize("case", CLIENT_SAYS)
async def test_a_client_that_is_refused_says_why_and_others_still_get_in(
    door, ask, case: str, made: Certificates
) -> None:  # type: ignore[no-untyped-def]
    server, client, says = CLIENT_SAYS[case]
    setting = server(made)
    async with door(setting) as address:
        with pytest.raises(Unavailable) as caught:
            await ask(address, client(made))
        assert says in str(caught.value)
        assert address in str(caught.value)
        if setting.client_ca or setting.cert.endswith("server.pem"):
            await ask(address, Tls(*made.pair("client"), ca=made.ca))


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("plain client", "it speaks no TLS (give it an https:// address)"),
        ("no certificate", "it has no certificate (set SAPO_TLS_CERT and SAPO_TLS_KEY there)"),
        ("certificate of another authority", "its certificate is of no CA in SAPO_TLS_CLIENT_CA"),
        ("expired certificate of a client", "its certificate has expired"),
    ],
)
async def test_the_http_server_names_who_it_refused_and_why(
    case: str, says: str, made: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    server, client, _ = CLIENT_SAYS[case]
    async with http(server(made)) as address:
        with pytest.raises(Unavailable):
            await ask_http(address, client(made))
    (said,) = {message for message in caplog.messages if "refused" in message}
    assert said.startswith(f"HTTP refused 127.0.0.1: no TLS: {says}")


async def test_a_connection_that_never_shakes_hands_is_closed_and_said(
    made: Certificates, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.runtime.tls_handshake.HANDSHAKE_SECONDS", 0.1)
    async with http(open_to_all(made)) as address, asyncio.timeout(10):
        host, _, port = address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await reader.read() == b""
        writer.close()
        await ask_http(address, Tls(ca=made.ca))
    assert "HTTP refused 127.0.0.1: no TLS: SSL handshake is taking longer than 0.1 seconds" in caplog.text


async def test_connections_that_never_shake_hands_make_room_for_those_that_do(
    made: Certificates, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_handshake, "_note", Seldom(3600))
    monkeypatch.setattr(tls_handshake, "MAX_HANDSHAKES", 3)
    monkeypatch.setattr(tls_handshake, "HANDSHAKE_SECONDS", 3600.0)  # which is not what ends them
    async with http(open_to_all(made)) as address, asyncio.timeout(10):
        host, _, port = address.partition(":")
        lines = [await asyncio.open_connection(host, int(port)) for _ in range(10)]
        for reader, _ in lines[:7]:
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        assert not any(reader.at_eof() or reader.exception() for reader, _ in lines[7:]), "the oldest go first"
        await ask_http(address, Tls(ca=made.ca))
        for _, writer in lines:
            writer.close()
        while tls_handshake._under_way:
            await asyncio.sleep(0.01)
    said = [message for message in caplog.messages if "handshakes under way" in message]
    assert len(said) == 1, "however many there are"
    assert said[0].startswith("more than 3 TLS handshakes under way: 1 ended")


async def test_a_request_in_the_same_breath_as_the_handshake_is_answered(made: Certificates) -> None:
    """Its first bytes reach the server with the client's last ones of the handshake."""
    async with http(open_to_all(made)) as address:
        host, _, port = address.partition(":")

        def ask() -> bytes:
            context = ssl.create_default_context(cafile=made.ca)
            with socket.create_connection((host, int(port)), timeout=10) as plain:
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)  # the handshake's end waits for the request
                with context.wrap_socket(plain, server_hostname=host) as secure:
                    secure.sendall(b"GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    secure.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
                    return b"".join(iter(lambda: secure.recv(4096), b""))

        assert (await asyncio.to_thread(ask)).endswith(b'{"state":"here"}')


def serial(address: str, made: Certificates) -> str:
    host, _, port = address.partition(":")
    context = ssl.create_default_context(cafile=made.ca)
    plain = socket.create_connection((host, int(port)), timeout=10)
    with context.wrap_socket(plain, server_hostname=host) as secure:
        return str((secure.getpeercert() or {})["serialNumber"])


@DOORS
async def test_a_certificate_that_is_exchanged_is_shown_to_whoever_connects_next(  # type: ignore[no-untyped-def]
    door, ask, made: Certificates, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watched, "LOOK_SECONDS", 0.0)
    async with door(open_to_all(made)) as address:
        before = await asyncio.to_thread(serial, address, made)
        assert await asyncio.to_thread(serial, address, made) == before
        key = Path(made.pair("server")[1])
        renewed = await asyncio.to_thread(serial, address, made)
        assert renewed != before
        key.write_text("half a k")  # seen in the middle of being written
        assert await asyncio.to_thread(serial, address, made) == renewed
        assert "not a certificate and its key" in caplog.text
        await ask(address, Tls(ca=made.ca))


async def test_a_channel_goes_on_with_what_it_has_while_its_files_are_half_written(
    made: Certificates, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A worker that connects to ingest anew just then would end."""
    monkeypatch.setattr(watched, "LOOK_SECONDS", 0.0)
    own = [Path(shutil.copy(path, tmp_path)) for path in (*made.pair("client"), made.ca)]
    client = Tls(*map(str, own[:2]), ca=str(own[2]))
    async with rpc(mutual(made)) as address:
        await ask_rpc(address, client)
        own[1].write_text("half a k")
        await ask_rpc(address, client)
        assert "what was read before stays in force" in caplog.text
        own[2].unlink()
        await ask_rpc(address, client)
        with pytest.raises(ConfigError, match="cannot be read"):
            await ask_rpc(address, Tls(client.cert, client.key, client.ca))


async def test_a_client_takes_up_its_own_renewed_certificate(
    made: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "LOOK_SECONDS", 0.0)
    client = Tls(*made.pair("aging", days=-1), ca=made.ca)
    async with (
        http(mutual(made)) as address,
        ControlPlaneClient(SCHEME + address, "t", tls=client, patience=0.5) as asks,
    ):
        with pytest.raises(Unavailable):
            await asks.status()
        made.pair("aging")
        assert await asks.status() == {"state": "here"}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"cert": "server.pem"}, "SAPO_TLS_CERT and SAPO_TLS_KEY: one without the other"),
        ({"client_ca": "ca.pem"}, "SAPO_TLS_CLIENT_CA: set without them"),
        ({"cert": "server.pem", "key": "absent.key"}, "absent.key: cannot be read: No such file"),
        ({"cert": "server.pem", "key": "client.key"}, "server.pem and .*client.key: not a certificate and its key"),
        ({"cert": "server.pem", "key": "server.key", "client_ca": "server.key"}, "server.key: no certificates"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("door", [http, rpc], ids=["http", "grpc"])
async def test_files_that_will_not_do_are_said_at_the_start(
    door, files: dict[str, str], says: str, made: Certificates
) -> None:  # type: ignore[no-untyped-def]
    made.pair("server"), made.pair("client")
    directory = Path(made.ca).parent
    with pytest.raises(ConfigError, match=says):
        async with door(Tls(**{name: str(directory / file) for name, file in files.items()})):
            raise AssertionError("it started")


@pytest.mark.parametrize("kind", [httpx.RemoteProtocolError, httpx.ReadError])
@pytest.mark.parametrize(("scheme", "says"), [("https", "certificate of its clients"), ("http", "want https://")])
async def test_a_connection_that_is_just_gone_means_another_thing_under_tls(
    kind: type[httpx.TransportError], scheme: str, says: str
) -> None:
    """How a client hears that it needs a certificate is a matter of chance: an alert, a reset, or the end."""
    ends = "Server disconnected without sending a response."

    def gone(request: httpx.Request) -> httpx.Response:
        try:
            raise httpcore.RemoteProtocolError(ends)
        except httpcore.RemoteProtocolError as error:
            raise kind(ends, request=request) from error

    async with ControlPlaneClient(f"{scheme}://nowhere", "token", patience=0.05) as client:
        client._http = httpx.AsyncClient(base_url=client.url, transport=httpx.MockTransport(gone))
        with pytest.raises(Unavailable, match=says):
            await client.status()
