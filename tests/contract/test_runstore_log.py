"""The log: exactly once, gapless and chained, bounded, never trimmed unread, rebuilt after a loss."""

import asyncio
import hashlib

import pytest
import redis.asyncio

from sapo_learner.archive import GENESIS, Head, link
from sapo_learner.errors import Corrupt, Fenced
from services.runstore import EmbeddedRedis, Lease, RunStore


def check_chain(entries, head=None):
    """Ids without gaps, each chain the link of the one before: computed here, not by the script."""
    sequence, chain = (head.sequence, head.chain) if head else (0, GENESIS)
    for entry in entries:
        sequence += 1
        chain = link(chain, entry.id, entry.kind, hashlib.sha256(entry.payload).hexdigest())
        assert (entry.sequence, entry.chain) == (sequence, chain)


# ---- append


async def test_entries_have_gapless_ids_and_chain_like_the_archive(run):
    leases = (await run.grant(5)).leases
    results = [await run.result(lease, bytes([lease.draw]) * 3 + b"\x00\xff\n") for lease in leases]
    assert [(r.status, r.id, r.sequence) for r in results] == [("OK", f"1-{n}", n) for n in range(1, 6)]
    entries = await run.store.read(0, 10)
    assert [(e.draw, e.kind, e.payload) for e in entries] == [
        (n, "group", bytes([n]) * 3 + b"\x00\xff\n") for n in range(5)
    ]
    check_chain(entries)
    assert (await run.store.state()).chain == entries[-1].chain


async def test_a_draw_is_appended_once_however_often_it_is_sent_at_once(run, server):
    lease = await run.lease()
    stores = [await RunStore.connect(server.url, run.store.run) for _ in range(4)]
    results = await asyncio.gather(
        *(s.append(lease.draw, lease.attempt, b"x", max_entries=99, max_bytes=99) for s in stores for _ in range(5))
    )
    for store in stores:
        await store.close()
    assert sorted(r.status for r in results) == ["DUPLICATE"] * 19 + ["OK"]
    assert len(await run.store.read(0, 100)) == 1


async def test_of_two_attempts_only_the_current_one_is_appended(run):
    first = await run.lease("a")
    await run.store.release("a", [(first.draw, first.attempt)])
    assert await run.append(first) == "EXPIRED", "handed back and not leased again"
    second = await run.lease("b")
    assert (second.draw, second.attempt) == (first.draw, first.attempt + 1)
    statuses = await asyncio.gather(*(run.append(each) for each in (first, second, first, second)))
    assert statuses.count("OK") == 1
    assert "OK" not in (statuses[0], statuses[2])
    assert await run.append(first) == "DUPLICATE", "the draw was accepted, whoever sends it"
    assert len(await run.store.read(0, 9)) == 1


async def test_a_draw_that_was_never_leased_is_expired(run):
    assert await run.append(Lease(0, 1, 0, 0)) == "EXPIRED"
    assert await run.append(Lease(10**9, 1, 0, 0)) == "EXPIRED"


async def test_an_overdue_lease_that_nobody_swept_is_still_current(run, eventually):
    lease = await run.lease(lease_seconds=0.01)

    async def overdue():
        return (await run.store.open_leases())[0].remaining_seconds < 0

    await eventually(overdue)
    assert await run.append(lease) == "OK"


async def test_without_a_generation_append_is_not_ready(store):
    result = await store.append(0, 1, b"x", max_entries=9, max_bytes=9)
    assert result.status == "NOT_READY"
    assert (await store.append_control(1, "end", b"")).status == "NOT_READY"
    assert await store.read(0, 9) == []


async def test_full_by_entries_or_bytes_writes_nothing_and_counts_what_is_there(run):
    first, second, third = (await run.grant(3)).leases
    assert await run.append(first, b"12345", size=4) == "FULL"
    assert await run.append(first, b"12345", size=5) == "OK"
    assert await run.append(second, b"6", size=5) == "FULL"
    assert await run.append(second, b"6", entries=1) == "FULL"
    state = await run.store.state()
    assert (state.sequence, state.unread_entries, state.unread_bytes) == (1, 1, 5)
    assert await run.store.trim(run.learner, await run.head(1)) == 1
    assert await run.append(second, b"6", entries=1, size=1) == "OK"
    assert await run.append(third, b"", entries=2, size=1) == "OK"
    assert (await run.store.state()).unread_bytes == 1


async def test_a_finished_group_keeps_its_lease_while_the_log_is_full(run):
    """Even beyond max_lease_seconds: overload must not cost a group that is already sampled."""
    lease = await run.lease("a", lease_seconds=0.1, max_lease_seconds=0.15)
    begun = lease.granted_ms
    while True:
        assert await run.append(lease, entries=0) == "FULL"
        other = await run.lease("b")  # sweeps what is overdue
        assert other.draw != lease.draw
        if other.granted_ms - begun > 400:
            break
    assert await run.append(lease) == "OK"


async def test_an_outdated_attempt_holds_no_lease_of_another(run):
    """FULL goes only to the current attempt; a server out of memory cannot tell them apart."""
    lease = await run.lease("a", lease_seconds=0.05)
    await asyncio.sleep(0.01)
    await run.store._script("hold", ["leases", "lease_info"], lease.draw, lease.attempt + 1)
    (held,) = await run.store.open_leases()
    assert held.age_seconds + held.remaining_seconds == pytest.approx(0.05)


async def test_a_server_out_of_memory_is_full_and_keeps_the_lease(run, server):
    lease = await run.lease("a", lease_seconds=0.2)
    raw = redis.asyncio.Redis.from_url(server.url)
    try:
        await raw.config_set("maxmemory", 1)
        assert await run.append(lease) == "FULL"
        held = (await run.store.open_leases())[0].remaining_seconds + (await run.store.open_leases())[0].age_seconds
        assert held >= 0.2
        assert (await run.store.state()).sequence == 0
    finally:
        await raw.config_set("maxmemory", 0)
        await raw.aclose()
    assert await run.append(lease) == "OK"


async def test_control_entries_join_the_chain_and_are_fenced(run):
    await run.accept(1)
    assert (await run.store.append_control(run.learner, "config", b"{}")).id == "1-2"
    await run.accept(1)
    entries = await run.store.read(0, 9)
    assert [(e.kind, e.draw) for e in entries] == [("group", 0), ("config", -1), ("group", 1)]
    check_chain(entries)
    keys, repeated = ["tokens", "state", "log", "index"], (run.learner, "nonce", "end", b"", "digest")
    first = await run.store._script("append_control", keys, *repeated)
    assert await run.store._script("append_control", keys, *repeated) == first, "its reply was lost, it is sent again"
    assert len(await run.store.read(0, 9)) == 4
    await run.store.acquire_token("learner")
    with pytest.raises(Fenced, match="newer writer"):
        await run.store.append_control(run.learner, "end", b"")


# ---- read and trim


async def test_read_goes_on_after_a_position_and_waits_for_the_next_entry(run):
    await run.accept(5)
    assert [e.sequence for e in await run.store.read(0, 2)] == [1, 2]
    assert [e.sequence for e in await run.store.read(2, 9)] == [3, 4, 5]
    waiting = asyncio.create_task(run.store.read(5, 9, block_ms=4000))
    lease = await run.lease()
    assert not waiting.done()
    await run.append(lease)
    assert [e.sequence for e in await waiting] == [6]


async def test_trim_removes_exactly_what_is_archived(run):
    await run.accept(5)
    third = await run.head(3)
    assert await run.store.trim(run.learner, third) == 3
    assert await run.store.trim(run.learner, third) == 0, "a repeat does nothing"
    entries = await run.store.read(0, 9)
    assert [e.sequence for e in entries] == [4, 5]
    check_chain(entries, third)
    state = await run.store.state()
    assert (state.unread_entries, state.unread_bytes) == (2, sum(len(e.payload) for e in entries))
    assert await run.store.trim(run.learner, await run.head(5)) == 2
    assert (await run.store.state()).unread_bytes == 0
    await run.accept(1)
    assert [e.id for e in await run.store.read(5, 9)] == ["1-6"]


@pytest.mark.parametrize("archived", [Head(1, 4, "f" * 40), Head(1, 2, "f" * 40)], ids=["beyond", "other-chain"])
async def test_nothing_is_trimmed_unread(run, archived):
    """Beyond the log's end, or where the archive holds another entry (a server that forgot and went on)."""
    await run.accept(3)
    with pytest.raises(Corrupt):
        await run.store.trim(run.learner, archived)
    assert [e.sequence for e in await run.store.read(0, 9)] == [1, 2, 3]


async def test_an_older_learner_is_refused_at_once(run):
    await run.accept(2)
    head = await run.head(1)
    newer = await run.store.acquire_token("learner")
    assert newer > run.learner
    for call in (
        run.store.trim(run.learner, head),
        run.store.rebuild(run.learner, Head(), []),
        run.store.publish(run.learner, 1, "d", "{}"),
        run.store.set_uncounted(run.learner, 1),
        run.store.set_facts(run.learner, {"a": "b"}),
    ):
        with pytest.raises(Fenced, match=f"token {newer}"):
            await call
    state = await run.store.state()
    assert (state.unread_entries, state.generation, state.uncounted, state.published_step) == (2, 1, 0, 0)
    assert await run.store.trim(newer, head) == 1


# ---- rebuild


async def test_a_fresh_run_begins_at_generation_one(store):
    assert "no generation" in await store.needs_rebuild(Head())
    assert await store.rebuild(await store.acquire_token("learner"), Head(), []) == 1
    assert await store.needs_rebuild(Head()) is None
    state = await store.state()
    assert (state.generation, state.sequence, state.chain, state.next_draw) == (1, 0, GENESIS, 0)


async def forget(server: EmbeddedRedis, name: str) -> dict[bytes, bytes]:
    """Lose every key of the run, returning a dump of them."""
    async with redis.asyncio.Redis.from_url(server.url) as raw:
        keys = await raw.keys(f"sapo:{{{name}}}:*")
        assert keys
        dump = {key: await raw.dump(key) for key in keys}
        await raw.delete(*keys)
        return dump


async def restore(server: EmbeddedRedis, dump: dict[bytes, bytes]) -> None:
    async with redis.asyncio.Redis.from_url(server.url) as raw:
        for key, value in dump.items():
            await raw.restore(key, 0, value)


async def test_a_flushed_server_is_rebuilt_from_the_archive(run, server):
    await run.accept(3)
    in_flight = (await run.grant(2)).leases
    head = await run.head(3)
    await run.store.trim(run.learner, head)
    await forget(server, run.store.run)
    assert await run.append(in_flight[0]) == "NOT_READY"
    assert "no generation" in await run.store.needs_rebuild(head)
    # Draw 1 was not accepted in this archive: it is offered again, below next_draw.
    assert await run.store.rebuild(run.learner, head, [0, 2, 3], uncounted=1) == 2
    assert await run.store.needs_rebuild(head) is None
    state = await run.store.state()
    assert (state.sequence, state.chain, state.next_draw, state.uncounted) == (3, head.chain, 4, 1)
    assert await run.store.open_draws() == {1}
    assert (await run.grant()).waiting_for == "not ready", "until the registry is restored"
    await run.store.restore_registry(run.control, [])
    await run.publish(0)
    leases = (await run.grant(2)).leases
    assert [lease.draw for lease in leases] == [1, 4]
    assert await run.append(in_flight[1]) == "EXPIRED", "attempts of the lost generation are none of ours"
    assert [(await run.result(lease)).id for lease in leases] == ["2-4", "2-5"]
    check_chain(await run.store.read(3, 9), head)


async def test_a_server_that_forgot_its_last_entries_is_rebuilt(run, server):
    await run.accept(2)
    older = await forget(server, run.store.run)
    await restore(server, older)
    await run.accept(2)
    head = await run.head(4)  # the archive has read all four
    await forget(server, run.store.run)
    await restore(server, older)
    assert "behind the archived 4" in await run.store.needs_rebuild(head)
    for count in (2, 1):  # it goes on: as long as the archive, then longer, with other entries
        await run.accept(count, b"sampled anew")
        with pytest.raises(Corrupt, match="not the archived one"):
            await run.store.trim(run.learner, head)
        assert "does not chain" in await run.store.needs_rebuild(head)
    assert len(await run.store.read(0, 9)) == 5
    await forget(server, run.store.run)
    await restore(server, older)
    assert await run.store.rebuild(run.learner, head, range(4)) == 2
    assert await run.store.read(4, 9) == []
    await run.accept(1)
    entries = await run.store.read(4, 9)
    assert [(e.id, e.draw) for e in entries] == [("2-5", 4)]
    check_chain(entries, head)


async def test_a_rebuild_of_a_living_server_drops_what_it_holds_and_goes_above_its_generation(run):
    await run.accept(1)
    open_lease = await run.lease("a")
    assert await run.store.rebuild(run.learner, Head(), []) == 2
    assert await run.store.read(0, 9) == []
    assert await run.store.rebuild(run.learner, Head(), [], next_draw=3) == 3
    state = await run.store.state()
    assert (state.leases, state.reoffered, state.next_draw) == ((), {0, 1, 2}, 3)
    assert (state.sequence, state.unread_entries, state.unread_bytes) == (0, 0, 0)
    assert await run.append(open_lease) == "EXPIRED"
    assert await run.store.renew("a", [(open_lease.draw, open_lease.attempt, 1)]) == [(1, 1)]


async def test_a_log_that_branched_off_needs_a_rebuild(run):
    await run.accept(4)
    second, third = await run.head(2), await run.head(3)
    assert await run.store.needs_rebuild(second) is None, "entries not yet archived are no reason"
    assert "does not chain" in await run.store.needs_rebuild(Head(1, 3, "f" * 40))
    assert "does not chain" in await run.store.needs_rebuild(Head(1, 4, "f" * 40))
    await run.store.trim(run.learner, third)
    assert await run.store.needs_rebuild(third) is None
    assert "does not chain" in await run.store.needs_rebuild(Head(1, 3, "f" * 40))
    assert "begins after entry 3" in await run.store.needs_rebuild(second)


async def test_a_repeated_rebuild_call_does_not_empty_what_came_since(run):
    """The reply of the first call was lost; redis-py sends the same script again."""
    keys = ["tokens", "state", "log", "index", "leases", "lease_info", "lease_steps", "reoffered", "attempts"]
    arguments = (run.learner, "nonce", 1, 0, GENESIS, 0, 0)
    assert await run.store._script("rebuild", keys, *arguments) == 2
    await run.accept(1)
    assert await run.store._script("rebuild", keys, *arguments) == 2
    assert len(await run.store.read(0, 9)) == 1


async def test_tokens_go_on_above_the_archives_after_a_loss(run, server):
    await forget(server, run.store.run)
    assert await run.store.acquire_token("learner", floor=7) == 8
    with pytest.raises(Fenced):
        await run.store.rebuild(run.learner, Head(), [])
    await forget(server, run.store.run)
    await run.store.rebuild(8, Head(), [])  # the living learner's first write teaches the server its token
    assert (await run.store.state()).learner_token == 8
