"""Leases and pacing: lowest draws first, progress renews, and no group can become older than allowed."""

import asyncio
import random
import uuid
from collections import Counter

import pytest

from sapo_learner.archive import Head
from sapo_learner.errors import Fenced
from services.runstore import Pacing


def draws(grant):
    return [lease.draw for lease in grant.leases]


# ---- leases


async def test_draws_are_granted_lowest_first_and_handed_back_ones_before_new_ones(run):
    first = (await run.grant(12, "a")).leases
    assert [lease.draw for lease in first] == list(range(12))
    assert all(lease.attempt == 1 for lease in first)
    back = [(lease.draw, lease.attempt) for lease in first if lease.draw in (10, 2, 9)]
    assert await run.store.release("a", back) == 3
    assert await run.store.release("a", back) == 0, "a repeat does nothing"
    again = (await run.grant(4, "b")).leases
    assert [(lease.draw, lease.attempt) for lease in again] == [(2, 2), (9, 2), (10, 2), (12, 1)]


async def test_only_its_holder_can_hand_a_lease_back(run):
    lease = await run.lease("a")
    assert await run.store.release("b", [(lease.draw, lease.attempt)]) == 0
    assert await run.store.release("a", [(lease.draw, lease.attempt + 1)]) == 0
    assert await run.append(lease) == "OK"


async def test_an_expired_draw_is_offered_again_with_the_next_attempt(run, eventually):
    lost = await run.lease("a", lease_seconds=0.05)
    other = await run.lease("b")

    async def expired():
        return (await run.store.open_leases())[0].remaining_seconds < 0

    await eventually(expired)
    again = await run.lease("b")
    assert (again.draw, again.attempt, other.draw) == (lost.draw, lost.attempt + 1, 1)
    assert await run.store.renew("a", [(lost.draw, lost.attempt, 5)]) == [(lost.draw, lost.attempt)]
    assert await run.append(lost) == "EXPIRED"
    assert await run.append(again) == "OK"


async def test_attempts_are_forgotten_once_the_draw_is_accepted(run):
    await run.accept(3)
    assert len(await run.store._command("HGETALL", "attempts")) == 0
    assert await run.store.open_draws() == set()


async def test_progress_alone_renews_a_lease(run, eventually):
    busy = await run.lease("a", lease_seconds=0.15)
    idle = await run.lease("a", lease_seconds=0.15)

    async def idle_is_lost():
        lost = await run.store.renew("a", [(busy.draw, busy.attempt, 1), (idle.draw, idle.attempt, 0)])
        assert (busy.draw, busy.attempt) not in lost
        await run.grant(0)  # sweeps
        return (idle.draw, idle.attempt) in lost

    await eventually(idle_is_lost)
    assert await run.append(busy) == "OK"


async def test_no_progress_makes_a_lease_longer_than_its_longest_life(run):
    lease = await run.lease("a", lease_seconds=10, max_lease_seconds=10.5)
    assert await run.store.renew("a", [(lease.draw, lease.attempt, 1000)]) == []
    await asyncio.sleep(0.02)
    await run.store.renew("a", [(lease.draw, lease.attempt, 1000)])
    (held,) = await run.store.open_leases()
    assert 10.0 < held.age_seconds + held.remaining_seconds <= 10.5

    short = await run.lease("a", lease_seconds=10, max_lease_seconds=0.2)
    assert short.deadline_ms - short.granted_ms == 200
    await run.store.renew("a", [(short.draw, short.attempt, 1000)])
    (held,) = [each for each in await run.store.open_leases() if each.draw == short.draw]
    assert held.age_seconds + held.remaining_seconds == pytest.approx(0.2)


async def test_only_its_holder_renews_a_lease(run):
    lease = await run.lease("a")
    assert await run.store.renew("b", [(lease.draw, lease.attempt, 5)]) == [(lease.draw, lease.attempt)]


async def test_an_older_control_plane_grants_nothing(run):
    newer = await run.store.acquire_token("control-plane")
    with pytest.raises(Fenced, match="newer writer"):
        await run.grant()
    with pytest.raises(Fenced):
        await run.store.save_document(run.control, "evaluations", "1", "{}")
    run.control = newer
    assert draws(await run.grant()) == [0]


async def test_nothing_is_granted_before_the_log_and_a_policy_exist(store):
    control, learner = await store.acquire_token("control-plane"), await store.acquire_token("learner")
    rules = Pacing(1, 1, 1, 1, 1, 1)
    assert (await store.grant(control, "w", 1, 0, rules)).waiting_for == "not ready"
    await store.rebuild(learner, Head(), [])
    assert (await store.grant(control, "w", 1, 0, rules)).waiting_for == "not ready"
    await store.restore_registry(control, [])
    assert (await store.grant(control, "w", 1, 0, rules)).waiting_for == "not ready"
    await store.publish(learner, 0, "d", "{}")
    assert (await store.grant(control, "w", 1, 0, rules)).waiting_for is None


# ---- pacing


async def test_lookahead_bounds_what_is_accepted_and_open(run):
    rules = {"groups_per_step": 3, "lookahead": 1}
    grant = await run.grant(100, **rules)
    assert (len(grant.leases), grant.waiting_for) == (6, "lookahead")
    for lease in grant.leases[:4]:
        await run.append(lease)
    assert (await run.grant(100, **rules)).waiting_for == "lookahead", "accepted ones count like open ones"
    await run.publish(1)
    assert len((await run.grant(100, step=1, **rules)).leases) == 3


async def test_the_slowest_open_lease_bounds_how_far_all_others_run(run):
    rules = {"groups_per_step": 2, "lookahead": 2, "max_policy_age": 2}
    slow = await run.lease("slow", **rules)
    for step in (1, 2, 3):
        await run.publish(step)
        for lease in (await run.grant(100, "fast", step, **rules)).leases:
            await run.append(lease)
    grant = await run.grant(100, "fast", 3, **rules)
    assert (grant.leases, grant.waiting_for) == ([], "max_policy_age")
    assert (await run.store.state()).sequence == 5, "the sixth place of steps 0, 1, 2 is the slow one's"
    assert await run.append(slow) == "OK"
    assert len((await run.grant(100, "fast", 3, **rules)).leases) == 6
    assert (await run.grant(1, "old", 0, **rules)).waiting_for in ("lookahead", "max_policy_age")


async def test_a_worker_that_is_too_old_is_told_so(run):
    await run.accept(2)
    await run.publish(1)
    grant = await run.grant(1, step=0, groups_per_step=2, lookahead=0, max_policy_age=0)
    assert (grant.leases, grant.waiting_for) == ([], "max_policy_age")


async def test_without_policy_age_training_is_synchronous(run):
    rules = {"groups_per_step": 2, "lookahead": 0, "max_policy_age": 0}
    for step in range(3):
        leases = (await run.grant(100, step=step, **rules)).leases
        assert len(leases) == 2
        assert (await run.grant(1, step=step, **rules)).leases == []
        for lease in leases:
            await run.append(lease)
        assert (await run.grant(1, step=step, **rules)).leases == [], "not before the new policy"
        await run.publish(step + 1)


async def test_the_run_ends_after_its_last_step(run):
    grant = await run.grant(100, groups_per_step=2, lookahead=8, steps=3)
    assert (len(grant.leases), grant.waiting_for) == (6, "steps")


async def test_uncounted_entries_are_granted_again(run):
    rules = {"groups_per_step": 2, "lookahead": 0, "max_policy_age": 0}
    for lease in (await run.grant(9, **rules)).leases:
        await run.append(lease)
    assert (await run.grant(9, **rules)).leases == []
    await run.store.set_uncounted(run.learner, 1)
    assert len((await run.grant(9, **rules)).leases) == 1


# ---- pacing under random interleavings


class Simulation:
    """Workers at different steps that sample, stall, die and hand back; a learner that trains, publishes and trims.

    Checked at every use of a group: its age. At the end: everything the run needs was accepted, once, and no more.
    """

    def __init__(self, run, rules, publish_every, workers, seed):
        self.run, self.rules, self.publish_every = run, rules, publish_every
        self.random = random.Random(seed)
        self.workers = dict.fromkeys((f"w{n}" for n in range(workers)), 0)  # worker -> the step it samples under
        self.held = {name: [] for name in self.workers}
        self.sampled_at = {}  # (draw, attempt) -> step
        self.by_sequence = {}  # sequence -> (draw, attempt)
        self.cursor = self.step = self.published = self.uncounted = self.in_batch = 0
        self.ages = Counter()

    async def ask(self, worker):
        step = self.workers[worker]
        grant = await self.run.store.grant(self.run.control, worker, self.random.randint(1, 3), step, self.rules)
        for lease in grant.leases:
            self.held[worker].append(lease)
            self.sampled_at[lease.draw, lease.attempt] = step

    async def finish(self, worker):
        if self.held[worker]:
            lease = self.held[worker].pop(self.random.randrange(len(self.held[worker])))
            result = await self.run.result(lease)
            assert result.status in ("OK", "EXPIRED", "DUPLICATE")
            if result.status == "OK":
                self.by_sequence[result.sequence] = (lease.draw, lease.attempt)

    async def follow(self, worker):
        self.workers[worker] = self.published

    async def die(self, worker):
        self.held[worker] = []

    async def hand_back(self, worker):
        leases, self.held[worker] = self.held[worker], []
        await self.run.store.release(worker, [(lease.draw, lease.attempt) for lease in leases])

    async def learn(self, limit=None):
        """Train on what is there. One group in ten does not count towards its step (fill)."""
        entries = await self.run.store.read(self.cursor, limit or self.random.randint(1, 6))
        for entry in entries:
            self.cursor = entry.sequence
            age = self.step - self.sampled_at[self.by_sequence[entry.sequence]]
            assert age <= self.rules.max_policy_age
            self.ages[max(age, 0)] += 1
            if self.random.random() < 0.1:
                self.uncounted += 1
                await self.run.store.set_uncounted(self.run.learner, self.uncounted)
                continue
            self.in_batch += 1
            if self.in_batch == self.rules.groups_per_step:
                self.in_batch, self.step = 0, self.step + 1
                if self.step % self.publish_every == 0:
                    await self.run.publish(self.step)
                    self.published = self.step
        if entries:
            await self.run.store.trim(
                self.run.learner, Head(entries[-1].generation, entries[-1].sequence, entries[-1].chain)
            )

    async def play(self, moves):
        actions = [self.ask] * 6 + [self.finish] * 8 + [self.follow] * 2 + [self.die, self.hand_back]
        for _ in range(moves):
            if self.random.random() < 0.15:
                await self.learn()
            else:
                await self.random.choice(actions)(self.random.choice(list(self.workers)))

    async def end(self):
        """From wherever that led: when everyone does what it can, the run comes to its end."""
        idle = 0
        while self.step < self.rules.steps:
            before = self.cursor
            for worker in self.workers:
                await self.follow(worker)
                await self.ask(worker)
                while self.held[worker]:
                    await self.finish(worker)
            await self.learn(100)
            idle = 0 if self.cursor > before else idle + 1
            assert idle < 200, "nothing moves any more"
            if idle:
                await asyncio.sleep(0.01)  # the leases of dead workers must run out
        draws = [draw for draw, _ in self.by_sequence.values()]
        assert len(draws) == len(set(draws)), "a draw was accepted twice"
        assert sorted(self.by_sequence) == list(range(1, len(draws) + 1))
        assert len(draws) - self.uncounted == self.rules.steps * self.rules.groups_per_step


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("groups_per_step", "lookahead", "max_policy_age", "publish_every", "workers"),
    [(2, 0, 0, 1, 3), (2, 1, 1, 1, 3), (1, 1, 2, 1, 4), (3, 2, 3, 2, 4), (4, 2, 8, 3, 5)],
)
async def test_no_group_is_ever_used_too_old_and_nothing_deadlocks(
    run, groups_per_step, lookahead, max_policy_age, publish_every, workers, seed
):
    steps = 12
    rules = Pacing(groups_per_step, lookahead, max_policy_age, steps, lease_seconds=0.3, max_lease_seconds=0.6)
    simulation = Simulation(run, rules, publish_every, workers, seed)
    await simulation.play(250)
    await simulation.end()


async def test_concurrent_askers_never_get_the_same_draw(run):
    grants = await asyncio.gather(*(run.grant(7, uuid.uuid4().hex) for _ in range(20)))
    given = [lease.draw for grant in grants for lease in grant.leases]
    assert sorted(given) == list(range(140))
