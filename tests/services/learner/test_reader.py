"""The reader: whatever dies in between, every entry is in the archive or in Redis, and read exactly once."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from sapo_learner.archive import Archive, Entry, Head
from services.learner import reader as reader_module
from services.learner.reader import ArchiveLog, Reader
from services.runstore import EmbeddedRedis, Pacing, RunStore
from tests.logs import heard

PACING = Pacing(groups_per_step=10, lookahead=8, max_policy_age=8, steps=100, lease_seconds=30, max_lease_seconds=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest_asyncio.fixture
async def store(server: EmbeddedRedis) -> AsyncIterator[RunStore]:
    async with await RunStore.connect(server.url, f"run-{uuid.uuid4().hex[:8]}") as connected:
        yield connected


class Learner:
    """The part of a learner that reads: a new incarnation each time, on the same archive directory."""

    def __init__(self, store: RunStore, directory: Path) -> None:
        self.store, self.directory = store, directory

    async def start(self) -> "Learner":
        self.token = await self.store.acquire_token("learner")
        self.archive = Archive(self.directory, self.token, segment_bytes=120)
        self.reader = Reader(self.store, self.archive, self.token)
        await self.reader.mend()
        return self

    async def open_registry(self) -> None:
        self.control = await self.store.acquire_token("control-plane")
        await self.store.restore_registry(self.control, [])
        await self.store.publish(self.token, 0, "digest", "{}")

    async def read_until(self, condition: Callable[[], object]) -> None:
        task = asyncio.create_task(self.reader.run())
        try:
            async with asyncio.timeout(15):
                while not condition():
                    assert not task.done(), task
                    await asyncio.sleep(0.01)
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def accept(self, count: int) -> list[int]:
        """Lease and append draws; returns those accepted."""
        grant = await self.store.grant(self.control, "worker", count, 0, PACING)
        for lease in grant.leases:
            payload = f"draw {lease.draw}".encode()
            result = await self.store.append(lease.draw, lease.attempt, payload, max_entries=1000, max_bytes=1 << 30)
            assert result.status == "OK"
        return [lease.draw for lease in grant.leases]

    def draws(self) -> list[int]:
        return [entry.draw for entry in self.archive.entries()]


async def test_entries_move_to_the_archive_in_order_and_leave_redis(store: RunStore, tmp_path: Path) -> None:
    learner = await Learner(store, tmp_path).start()
    await learner.open_registry()
    draws = await learner.accept(7)
    with heard() as events:
        await learner.read_until(lambda: learner.archive.head.sequence == 7)
    assert learner.draws() == draws
    told = [(each["draw"], each["entry"]) for each in events if "is archived as" in each["message"]]
    assert told == [(draw, f"1-{at}") for at, draw in enumerate(draws, 1)]
    task = asyncio.create_task(learner.reader.run())
    async with asyncio.timeout(15):
        while (await store.state()).unread_entries:
            await asyncio.sleep(0.01)
    task.cancel()
    assert (await store.state()).sequence == 7


async def test_I2_a_reader_killed_between_archive_and_trim_loses_and_repeats_nothing(
    store: RunStore, tmp_path: Path
) -> None:
    first = await Learner(store, tmp_path).start()
    await first.open_registry()
    draws = await first.accept(3)
    first.archive.append(await store.read(0, 10))  # ... and here it dies: archived, not trimmed
    second = await Learner(store, tmp_path).start()
    second.control = first.control
    draws += await second.accept(2)
    await second.read_until(lambda: second.archive.head.sequence == 5)
    assert second.draws() == draws


async def test_I2_a_lost_redis_is_rebuilt_from_the_archive_and_unread_draws_are_offered_again(
    store: RunStore, server: EmbeddedRedis, tmp_path: Path
) -> None:
    learner = await Learner(store, tmp_path).start()
    await learner.open_registry()
    await learner.accept(4)
    await learner.read_until(lambda: learner.archive.head.sequence == 4)
    await learner.accept(2)  # acknowledged, unread, and lost with the server
    await store._redis.flushall()
    lost = await store.append(4, 1, b"late", max_entries=10, max_bytes=1000)
    assert lost.status == "NOT_READY"
    task = asyncio.create_task(learner.reader.run())
    async with asyncio.timeout(15):
        while (await store.state()).generation is None:
            await asyncio.sleep(0.01)
    await learner.open_registry()
    again = await learner.accept(3)
    assert again == [4, 5, 6], "draws that are in the archive are closed, all others open"
    async with asyncio.timeout(15):
        while learner.archive.head.sequence < 7:
            await asyncio.sleep(0.01)
    task.cancel()
    assert learner.draws() == list(range(7))
    assert learner.archive.head.generation == 2


async def test_I1_a_rebuild_from_a_pruned_archive_knows_every_draw_that_was_ever_accepted(
    store: RunStore, tmp_path: Path
) -> None:
    learner = await Learner(store, tmp_path).start()
    await learner.open_registry()
    await learner.accept(3)
    await store.append_control(learner.token, "config", b"{}")
    await learner.accept(2)
    for sequence in range(6):  # one by one, so that there are several segments
        learner.archive.append(await store.read(sequence, 1))
    assert learner.archive.prune(5) > 0
    assert learner.archive.pruned.controls == 1
    await store._redis.flushall()
    again = await Learner(store, tmp_path).start()
    assert (await store.state()).uncounted == 1
    await again.open_registry()
    assert await again.accept(2) == [5, 6]
    await again.reader.count_controls()
    assert (await store.state()).uncounted == 1


async def test_I7_an_older_reader_is_refused(store: RunStore, tmp_path: Path) -> None:
    older = await Learner(store, tmp_path).start()
    await older.open_registry()
    await older.accept(2)
    newer = await Learner(store, tmp_path).start()
    from sapo_learner.errors import Fenced

    with pytest.raises(Fenced):
        await asyncio.wait_for(older.reader.run(), 15)
    await newer.read_until(lambda: newer.archive.head.sequence == 2)


async def test_a_full_disk_stops_reading_and_loses_nothing(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "RETRY_SECONDS", 0.01)
    learner = await Learner(store, tmp_path).start()
    await learner.open_registry()
    await learner.accept(3)
    failures = iter([OSError(28, "No space left on device")] * 3)
    append = learner.archive.append

    def full_for_a_while(entries: list[Entry]) -> int:
        for error in failures:
            raise error
        return append(entries)

    monkeypatch.setattr(learner.archive, "append", full_for_a_while)
    await learner.read_until(lambda: learner.archive.head.sequence == 3)
    assert next(failures, None) is None
    assert learner.draws() == [0, 1, 2]


def test_entries_are_archived_in_frames_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "FRAME_BYTES", 10)
    entries = [Entry(1, index + 1, "group", index, "", b"x" * size) for index, size in enumerate([4, 6, 1, 20, 3, 3])]
    frames = list(reader_module._frames(entries))
    assert [[len(each.payload) for each in frame] for frame in frames] == [[4, 6], [1], [20], [3, 3]]


async def test_the_log_gives_a_whole_step_or_waits_or_ends(store: RunStore, tmp_path: Path) -> None:
    learner = await Learner(store, tmp_path).start()
    await learner.open_registry()
    await learner.accept(5)
    await learner.read_until(lambda: learner.archive.head.sequence == 5)
    log = ArchiveLog(learner.archive)
    first = log.next(0, 3)
    assert first is not None
    assert [entry.sequence for entry in first] == [1, 2, 3]
    waiting = asyncio.create_task(asyncio.to_thread(log.next, 3, 3))
    while not log.waiting_for:
        await asyncio.sleep(0.001)
    assert log.waiting_for == "groups: 2 of 3"
    await learner.accept(1)
    await learner.read_until(waiting.done)
    second = await waiting
    assert second is not None
    assert [entry.sequence for entry in second] == [4, 5, 6]
    waited, waiting = log.waited_seconds, asyncio.create_task(asyncio.to_thread(log.next, 6, 3))
    try:
        async with asyncio.timeout(10):
            while log.waited_seconds == waited:  # it counts while it goes on
                await asyncio.sleep(0.01)
    finally:
        log.stop()
    assert await waiting is None
    assert log.waited_seconds > 0


async def test_a_redis_that_is_set_back_between_reading_and_trimming_is_rebuilt(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = await Learner(store, tmp_path).start()
    await learner.open_registry()
    draws = await learner.accept(7)
    append, loop = learner.archive.append, asyncio.get_running_loop()

    def append_and_set_back(entries: list[Entry]) -> int:
        last = append(entries)
        monkeypatch.undo()
        third = learner.archive.read(2, 1)[0]
        older = store.rebuild(learner.token, Head(third.generation, third.sequence, third.chain), draws[:3])
        asyncio.run_coroutine_threadsafe(older, loop).result(timeout=10)
        return last

    monkeypatch.setattr(learner.archive, "append", append_and_set_back)
    await learner.reader.read(500)
    assert learner.draws() == draws
    assert await store.needs_rebuild(learner.archive.head) is None
    assert (await store.state()).reoffered == frozenset()


async def test_a_generation_is_never_begun_twice_although_nothing_was_archived_under_it(
    store: RunStore, tmp_path: Path
) -> None:
    """Attempts are counted from it: an old lease's would otherwise be a new one's, too."""
    attempts = []
    for _ in range(3):
        learner = await Learner(store, tmp_path).start()
        await learner.open_registry()
        (lease,) = (await store.grant(learner.control, "worker", 1, 0, PACING)).leases
        attempts.append((lease.draw, lease.attempt))
        learner.archive.close()
        await store.erase()
    assert len(set(attempts)) == 3, attempts
