"""A malformed group gives its draw back, and a draw whose groups are all malformed is set aside, open."""

from sapo_learner.archive import Head
from services.runstore import Refusal
from services.runstore.log import MAX_REFUSALS


async def refused(run, lease, worker="w"):
    return await run.store.refuse(worker, lease.draw, lease.attempt)


async def test_a_refused_draw_is_offered_again_before_new_ones(run):
    one, two = (await run.grant(2)).leases
    assert await refused(run, one) == Refusal("INVALID", 1)
    assert await run.store.open_draws() == {one.draw, two.draw}
    again = await run.lease()
    assert (again.draw, again.attempt) == (one.draw, one.attempt + 1)
    assert await run.append(again) == "OK"


async def test_what_is_settled_stays_settled(run):
    lease = await run.lease()
    assert await refused(run, lease, "somebody else") == Refusal("INVALID", 0)
    assert await run.append(lease) == "OK"
    assert await refused(run, lease) == Refusal("DUPLICATE", 0)
    other = await run.lease()
    await run.store.release("w", [(other.draw, other.attempt)])
    assert await refused(run, other) == Refusal("EXPIRED", 0)
    newer = await run.lease()
    assert await refused(run, other) == Refusal("EXPIRED", 0)
    assert await run.append(newer) == "OK"
    assert await run.store.open_draws() == set()


async def test_without_a_generation_nothing_is_decided(store):
    assert await store.refuse("w", 0, 1) == Refusal("NOT_READY", 0)


async def test_a_draw_refused_too_often_is_set_aside_and_stays_open(run):
    bad = None
    for count in range(1, MAX_REFUSALS + 1):
        bad = await run.lease()
        assert bad.draw == 0
        refusal = await refused(run, bad)
        assert (refusal.refusals, refusal.set_aside) == (count, count == MAX_REFUSALS)
    assert (await run.lease()).draw == 1, "the run goes on without it"
    state = await run.store.state()
    assert (state.reoffered, state.next_draw) == ({0}, 2)
    assert await run.append(bad) == "EXPIRED", "and not a duplicate: it was never accepted"


async def test_another_control_plane_offers_it_again(run):
    for _ in range(MAX_REFUSALS):
        await refused(run, await run.lease())
    await run.store.acquire_token("learner")
    assert (await run.grant(0)).leases == []
    run.control = await run.store.acquire_token("control-plane")
    again = await run.lease()
    assert (again.draw, again.attempt) == (0, MAX_REFUSALS + 1)
    assert (await refused(run, again)).refusals == 1


async def test_acceptance_forgets_refusals_and_a_rebuild_offers_everything_again(run):
    await refused(run, await run.lease())
    assert await run.append(await run.lease()) == "OK"
    assert len(await run.store._command("HGETALL", "refusals")) == 0
    for _ in range(MAX_REFUSALS):
        await refused(run, await run.lease())
    await run.store.rebuild(run.learner, Head(), [0], next_draw=2)
    assert (await run.lease()).draw == 1
    assert len(await run.store._command("HGETALL", "refusals")) == 0
