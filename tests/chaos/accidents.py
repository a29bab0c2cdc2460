"""The accidents: scripts over a small machine, which anybody who recovers rightly survives."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random

import pytest

from sapo_learner.errors import Fenced
from services.learner.publisher import copy_weights
from tests.chaos.small_learner import POINTS, Killed, Point
from tests.chaos.small_machine import SmallMachine

Scenario = Callable[[SmallMachine], Awaitable[None]]


def killed(point: Point) -> Scenario:
    """The learner dies there, in the middle of the run; its workers notice nothing."""

    async def scenario(machine: SmallMachine) -> None:
        learner = await machine.start_learner()
        await machine.sample(2)
        await learner.work()
        await machine.sample(6)
        learner.dies_at = point
        with pytest.raises(Killed):
            await learner.work()

    scenario.__name__ = f"killed_{point}"
    return scenario


async def killed_unsaved(machine: SmallMachine) -> None:
    """A step is trained and published, and no checkpoint of it saved yet."""
    learner = await machine.start_learner()
    await machine.sample(2)
    await learner.work()
    assert (learner.step, learner.session.saved_step) == (1, 0)


async def learner_away(machine: SmallMachine) -> None:
    """Groups pile up unread."""
    await machine.start_learner()
    await machine.sample(6)


async def sent_again(machine: SmallMachine) -> None:
    """A worker whose connection broke sends what was accepted, before and after the learner has read it."""
    learner = await machine.start_learner()
    groups = await machine.sample(2)
    await machine.send(groups)
    await learner.work()
    await machine.send(groups)


async def two_learners(machine: SmallMachine) -> None:
    """One sleeps in mid-append; meanwhile another one takes over; then the first wakes and goes on with its work."""
    older = await machine.start_learner()
    await machine.sample(2)
    await older.work()
    await machine.sample(4)
    older.sleeps_at = "allowed"
    reading = asyncio.create_task(older.read())
    await older.fall_asleep()
    newer = await machine.open_learner()
    older.wake()
    await refused(machine, "trim", reading)
    await newer.begin()
    await machine.sample(2, "another")
    await newer.work()
    await refused(machine, "append", asyncio.to_thread(older.archive.append, []))
    await refused(machine, "checkpoint", asyncio.to_thread(older.train, 1))
    await refused(machine, "publish", older.publisher.publish(copy_weights(older.session.learner.policy, older.step)))


async def refused(machine: SmallMachine, what: str, work: Awaitable[object]) -> None:
    with suppress(Fenced):
        await work
        machine.problems.append(f"the older learner was not refused: {what}")


async def redis_emptied(machine: SmallMachine) -> None:
    """With groups archived, groups unread and draws leased in it; a later draw is archived than one that is open."""
    learner = await machine.start_learner()
    await machine.sample(2)
    machine.held = await machine.lease(2)
    await machine.sample(1)
    await learner.work()
    await machine.sample(1)
    await machine.set_redis({})
    await machine.watch()
    assert set(await machine.send(machine.held)) == {"NOT_READY"}
    await learner.read()
    await machine.forgive()


async def redis_set_back(machine: SmallMachine) -> None:
    """While the learner archives what Redis then no longer knows, and has accepted something else in its place."""
    learner = await machine.start_learner()
    await machine.sample(2)
    await learner.work()
    older = await machine.redis_now()
    await machine.sample(2)
    learner.sleeps_at = "archived"
    reading = asyncio.create_task(learner.read())
    await learner.fall_asleep()
    await machine.set_redis(older)
    await machine.watch()
    await machine.send(await machine.lease(2, "another"))
    learner.wake()
    await reading
    await machine.forgive()


async def hung_worker(machine: SmallMachine) -> None:
    """Its process answers, its engine does not: no token comes, and the draws must go to another worker."""
    await machine.start_learner()
    await machine.start_control_plane(lease_seconds=0.5)  # many beats long, also on a busy machine
    hung = await machine.lease(2, "hung")
    deadline = time.monotonic() + 2.0
    while not await machine.beat(hung, tokens=0, worker="hung"):
        await machine.watch()
        if time.monotonic() > deadline:
            machine.problems.append("a hung worker keeps its leases")
            await machine.send(hung)
            break
    await machine.start_control_plane()


async def clocks_differ(machine: SmallMachine) -> None:
    """A control plane takes over whose host is an hour ahead; nobody's sampling may be lost for that."""
    learner = await machine.start_learner()
    await machine.sample(2)
    await learner.work()
    groups = await machine.lease(2)
    await machine.start_control_plane()
    await machine.watch()
    if (statuses := await machine.send(groups)) != ["OK", "OK"]:
        machine.problems.append(f"a worker in time lost its leases: {statuses}")


async def power_cut(machine: SmallMachine) -> None:
    """Every file of the archive loses what was not forced to the disk."""
    learner = await machine.start_learner()
    await machine.sample(2)
    await learner.work()
    await machine.sample(2)
    await learner.read()
    machine.disk.power_cut(machine.directory / "archive")


async def redis_killed(machine: SmallMachine) -> None:
    """kill -9, with everything fsynced."""
    learner = await machine.start_learner()
    machine.held = await machine.lease(2)
    await machine.sample(2)
    machine.redis.kill()
    machine.redis.start()
    await learner.read()


def anything(seed: int) -> Scenario:
    """Accidents of every kind, by chance."""

    async def scenario(machine: SmallMachine) -> None:
        random, learner = Random(seed), await machine.start_learner()
        for _ in range(8):
            machine.held += await machine.lease(random.randint(0, 3))
            random.shuffle(machine.held)
            sent = machine.held[: random.randint(0, 3)]
            await machine.send(sent)
            machine.held = machine.held[random.randint(0, len(sent)) :]  # some are sent again
            learner.dies_at = random.choice(("", *POINTS))
            try:
                await learner.work()
            except Killed:
                learner = await machine.start_learner()
            if random.random() < 0.3:
                await machine.start_control_plane()

    scenario.__name__ = f"anything_{seed}"
    return scenario
