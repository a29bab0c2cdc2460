"""A disk without room under the embedded server: it ends, says why, and has everything it acknowledged when it is
started again."""

import asyncio
import hashlib
import stat
from pathlib import Path

import psutil
import pytest

from sapo_learner.archive import GENESIS, link
from sapo_learner.errors import Unavailable
from services.runstore import EmbeddedRedis, RunStore
from services.runstore.embedded import _binary


@pytest.fixture
def patient_binary(binary: str | None, tmp_path: Path) -> str:
    """The server, told of a write that does not fit by an error, as on a full disk, and not by a signal."""
    script = tmp_path / "server"
    script.write_text(f"#!/bin/sh\ntrap '' XFSZ\nexec '{binary or _binary()}' \"$@\"\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


async def test_i2_a_server_whose_disk_is_full_ends_with_the_reason_and_loses_nothing_acknowledged(
    patient_binary, tmp_path, run
):
    server = EmbeddedRedis(tmp_path / "redis", binary=patient_binary)
    await asyncio.to_thread(server.start)
    run.store, unused = await RunStore.connect(server.url, "r", timeout=0.5), run.store
    await run.open()
    acknowledged = {}
    try:
        await append_to(acknowledged, run, 5)
        psutil.Process(server.pid).rlimit(psutil.RLIMIT_FSIZE, (grown(server) + 20_000, -1))
        with pytest.raises(Unavailable):
            await append_to(acknowledged, run, 500)
        assert await asyncio.to_thread(server._process.wait, 10) != 0
        assert "AOF" in (server.directory / "redis.log").read_text()[-2000:]
        before = len(acknowledged)
        assert 5 < before < 100
        await asyncio.to_thread(server.start)
        await append_to(acknowledged, run, 5)
        entries = await run.store.read(0, 1000)
    finally:
        await run.store.close()
        await asyncio.to_thread(server.stop)
        run.store = unused
    assert acknowledged.items() <= {entry.draw: entry.id for entry in entries}.items()
    assert before + 5 <= len(entries) <= before + 6, "the one in flight may have got in"
    chain = GENESIS
    for number, entry in enumerate(entries, 1):
        chain = link(chain, f"1-{number}", "group", hashlib.sha256(entry.payload).hexdigest())
        assert (entry.id, entry.chain) == (f"1-{number}", chain)


async def append_to(acknowledged, run, count):
    for _ in range(count):
        lease = await run.lease()
        result = await run.result(lease, b"%d" % lease.draw * 500)
        assert result.status == "OK"
        acknowledged[lease.draw] = result.id


def grown(server: EmbeddedRedis) -> int:
    """Bytes of the server's largest file."""
    return max(path.stat().st_size for path in server.directory.rglob("*.aof"))
