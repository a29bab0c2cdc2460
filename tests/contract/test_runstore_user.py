"""The Redis user of docs/security.md: the whole contract is run under it (conftest.py); here, that it may do no more.

And the way to a server under TLS.
"""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

import pytest
import redis.asyncio
from redis.exceptions import NoPermissionError

from sapo_learner.errors import Unauthenticated, Unavailable
from services.runstore import EmbeddedRedis, RunStore
from tests.certificates import Certificates
from tests.contract.conftest import as_user, documented_user
from tests.documents import ROOT


def commands_in_use() -> set[str]:
    """Those of the Lua scripts and of the Python around them, and what the client sends by itself."""
    scripts = "".join(
        path.read_text() for path in (resources.files("services.runstore") / "scripts").iterdir()
        if path.name.endswith(".lua")
    )  # fmt: skip
    python = "".join(path.read_text() for path in (ROOT / "services/runstore").glob("*.py"))
    called = re.findall(r"redis\.p?call\('(\w+)'", scripts)
    called += re.findall(r'(?:_command|execute_command)\("(\w+)"', python) + re.findall(
        r'_write\([^"]*"[\w-]+", token, "(\w+)"', python
    )
    called += re.findall(r"self\._redis\.(ping|info|scan|delete)\b", python)
    by_itself = {"select", "evalsha", "script|load"}
    return {"del" if name == "delete" else name.lower() for name in called} | by_itself


def test_the_documented_user_may_run_what_is_run_and_nothing_else() -> None:
    rules = documented_user()[1:]
    assert {rule[1:] for rule in rules if rule.startswith("+")} == commands_in_use()
    assert [rule for rule in rules if not rule.startswith("+")] == [
        "on", ">PASSWORD", "resetchannels", "~sapo:*", "-@all"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        "FLUSHALL", "FLUSHDB", "CONFIG GET dir", "KEYS *", "SHUTDOWN NOSAVE", "ACL LIST", "SAVE",
        "REPLICAOF 127.0.0.1 1", "MODULE LIST", "CLIENT LIST", "SET sapo:{r}:state x", "EVAL return(1) 0",
        "GET other", "HSET other a b", "SCRIPT FLUSH", "MONITOR", "PUBLISH c m", "XREAD STREAMS other 0",
    ],
)  # fmt: skip
async def test_everything_else_is_refused(server: EmbeddedRedis, command: str) -> None:
    async with redis.asyncio.Redis.from_url(as_user(server)) as user:
        with pytest.raises(NoPermissionError):
            await user.execute_command(*command.split())


async def test_a_script_of_one_s_own_can_do_no_more(server: EmbeddedRedis) -> None:
    async with redis.asyncio.Redis.from_url(as_user(server)) as user:
        for body in ("return redis.call('FLUSHALL')", "return redis.call('SET', 'other', 'x')"):
            with pytest.raises(redis.exceptions.ResponseError, match=r"ACL|permission|can't run this command"):
                await user.register_script(body)()


async def test_a_command_that_is_missing_is_said_as_such(server: EmbeddedRedis) -> None:
    async with redis.asyncio.Redis.from_url(server.url) as admin:
        rules = documented_user()[1:]
        await admin.execute_command("ACL", "SETUSER", "less", "reset", *rules, "-evalsha")
    async with await RunStore.connect(f"redis://less:PASSWORD@127.0.0.1:{server.port}/0", "r") as store:
        with pytest.raises(Unauthenticated, match=r"docs/security\.md") as caught:
            await store.state()
    assert "PASSWORD" not in str(caught.value)


@asynccontextmanager
async def under_tls(server: EmbeddedRedis, made: Certificates) -> AsyncIterator[int]:
    """A port that speaks TLS and hands everything on to the server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*made.pair("redis"))

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while block := await reader.read(1 << 16):
            writer.write(block)
            await writer.drain()
        writer.close()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(copy(reader, ours), copy(theirs, writer), return_exceptions=True)

    async with await asyncio.start_server(pass_on, "127.0.0.1", 0, ssl=context) as listening:
        yield int(listening.sockets[0].getsockname()[1])


async def test_a_server_under_tls_is_reached_by_its_authority_alone(server: EmbeddedRedis, tmp_path: Path) -> None:
    made, other = Certificates(tmp_path / "ours"), Certificates(tmp_path / "other")
    async with under_tls(server, made) as port:
        url = f"rediss://sapo:PASSWORD@127.0.0.1:{port}/0"
        async with await RunStore.connect(f"{url}?ssl_ca_certs={made.ca}", "r") as store:
            await store.ping(5)
        for wrong in (f"{url}?ssl_ca_certs={other.ca}", url, url.replace("rediss", "redis")):
            with pytest.raises(Unavailable) as caught:
                await RunStore.connect(wrong, "r", timeout=0.3)
            assert f"127.0.0.1:{port}" in str(caught.value)
            assert "PASSWORD" not in str(caught.value)
            assert "CERTIFICATE_VERIFY_FAILED" in str(caught.value) or wrong.startswith("redis://")
