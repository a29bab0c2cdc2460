"""Registry, facts, documents and workers."""

import asyncio

import pytest

from sapo_learner.archive import Head
from sapo_learner.errors import NotFound, Unavailable
from services.runstore import Policy, Published, RunStore


async def publish(run, step, digest):
    return await run.store.publish(run.learner, step, digest, f"manifest of {digest}")


async def test_versions_count_from_zero_and_a_known_pair_keeps_its_number(run):
    assert await publish(run, 0, "digest-0") == Published(0, False)
    assert await publish(run, 1, "a") == Published(1, True)
    assert await publish(run, 2, "b") == Published(2, True)
    assert await publish(run, 1, "a") == Published(1, False), "a restored learner that repeats itself"
    assert await run.store.current() == Policy(2, 2, "b", "manifest of b"), "workers stay with the newest"
    assert await publish(run, 2, "b") == Published(2, False)
    assert await run.store.versions() == {0: 0, 1: 1, 2: 2}


async def test_the_same_bytes_of_a_later_step_are_a_version_of_their_own(run):
    """Or a step without signal would stop pacing."""
    await publish(run, 1, "a")
    assert await publish(run, 2, "a") == Published(2, True)
    assert (await run.store.state()).published_step == 2


async def test_other_content_of_an_earlier_step_gets_a_new_number_and_pacing_follows(run):
    await publish(run, 1, "a")
    await publish(run, 2, "b")
    assert await publish(run, 1, "a'") == Published(3, True)
    state = await run.store.state()
    assert (state.published_version, state.published_step) == (3, 1)
    assert (await run.store.manifest(1)).digest == "a"


async def test_pacing_never_stays_behind_on_an_abandoned_branch(run):
    for step, digest in ((1, "a"), (2, "b"), (1, "a'")):
        await publish(run, step, digest)
    # Restored again, and this time as in the first history.
    assert await publish(run, 1, "a") == Published(1, False)
    assert await publish(run, 2, "b") == Published(4, True)
    assert (await run.store.state()).published_step == 2


async def test_forgotten_versions_are_unknown_and_their_numbers_are_not_used_again(run):
    await publish(run, 1, "a")
    assert await run.store.forget(0)
    assert not await run.store.forget(1), "never the current one"
    assert await run.store.versions() == {1: 1}
    with pytest.raises(NotFound, match="version 0 is not known"):
        await run.store.manifest(0)
    assert await publish(run, 0, "digest-0") == Published(0, False)
    assert await run.store.versions() == {1: 1}
    assert await publish(run, 2, "b") == Published(2, True)


async def test_a_lost_registry_numbers_nothing_before_it_is_restored(store):
    learner, control = await store.acquire_token("learner"), await store.acquire_token("control-plane")
    assert await store.current() is None
    assert not (await store.state()).registry_restored
    with pytest.raises(Unavailable, match="not restored"):
        await store.publish(learner, 6, "f", "{}")
    on_disk = [Policy(version, version, f"d{version}", f"m{version}") for version in (5, 4)]
    for _ in range(2):  # repeating it changes nothing
        await store.restore_registry(control, on_disk)
        assert await store.current() == on_disk[0]
    assert await store.publish(learner, 4, "d4", "m4") == Published(4, False)
    assert await store.publish(learner, 6, "f", "{}") == Published(6, True)
    await store.restore_registry(control, on_disk)
    assert (await store.current()).version == 6
    assert await store.versions() == {4: 4, 5: 5, 6: 6}


async def test_an_empty_registry_is_restored_but_has_no_policy(store):
    await store.restore_registry(await store.acquire_token("control-plane"), [])
    assert (await store.state()).registry_restored
    assert await store.current() is None


async def test_concurrent_publishes_get_numbers_of_their_own(run):
    results = await asyncio.gather(*(publish(run, 1, f"d{n % 5}") for n in range(20)))
    assert sorted({result.version for result in results}) == [1, 2, 3, 4, 5]
    assert sum(result.changed for result in results) == 5


async def test_facts_and_documents_are_kept_as_given(run):
    assert await run.store.facts() == {}
    await run.store.set_facts(run.learner, {"vocab_size": "32", "tokenizer_digest": "ü"})
    assert await run.store.facts() == {"vocab_size": "32", "tokenizer_digest": "ü"}
    await run.store.save_document(run.control, "evaluations", "e1", '{"a": 1}')
    await run.store.save_document(run.control, "evaluations", "e2", "{}")
    await run.store.delete_document(run.control, "evaluations", "e2")
    assert await run.store.documents("evaluations") == {"e1": '{"a": 1}'}
    assert await run.store.documents("others") == {}


async def test_a_workers_report_is_kept_until_its_time_is_up(run, eventually):
    await run.store.heartbeat("b", '{"n": 1}', 60)
    await run.store.heartbeat("a", "{}", 0.05)
    await run.store.heartbeat("b", '{"n": 2}', 60)
    first = await run.store.workers()
    assert [(w.name, w.report_json) for w in first] in ([("a", "{}"), ("b", '{"n": 2}')], [("b", '{"n": 2}')])
    assert 0 <= first[-1].age_seconds < 5

    async def only_b():
        return [w.name for w in await run.store.workers()] == ["b"]

    await eventually(only_b)
    await run.store.heartbeat("b", "{}", 60)
    assert len(await run.store._command("HGETALL", "workers")) == 1, "dropped, not only hidden"


async def test_the_state_tells_leases_by_deadline(run):
    await run.lease("slow", lease_seconds=20)
    await run.lease("fast", lease_seconds=10)
    state = await run.store.state()
    assert [(lease.worker, lease.draw, lease.step) for lease in state.leases] == [("fast", 1, 0), ("slow", 0, 0)]
    assert 0 <= state.leases[0].age_seconds <= state.oldest_lease_seconds < 5
    assert 0 < state.leases[0].remaining_seconds <= 10
    assert state.memory_used_bytes > 0
    assert (state.registry_restored, state.published_version, state.learner_token) == (True, 0, run.learner)


async def test_erase_forgets_this_run_and_no_other(run, server):
    await run.accept(2)
    async with await RunStore.connect(server.url, f"{run.store.run}-2", timeout=10) as other:
        await other.rebuild(await other.acquire_token("learner"), Head(), [])
        assert await run.store.erase() > 0
        assert (await run.store.state()).generation is None
        assert await run.store.versions() == {}
        assert (await other.state()).generation == 1, "also where the other's name begins with this one's"
