"""A verdict is worth what it catches: scripted runs that must pass it, and the same with one rule of recovery broken,
which must not (I1, I2, I3, I7).

Every mutant is one rule taken out of the code that keeps it, by a switch inside the test; its scenario is the accident
that the rule is for.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from sapo_learner.errors import SapoError
from services.runstore import EmbeddedRedis
from tests.chaos.small_learner import POINTS, Killed, Point
from tests.chaos.small_machine import SmallMachine, small_config
from tests.chaos.small_verdict import examine

Scenario = Callable[[SmallMachine], Awaitable[None]]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(autouse=True)
def arithmetic() -> Iterator[None]:
    """As `sapo serve learner` sets it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest_asyncio.fixture
async def machine(tmp_path: Path, redis: EmbeddedRedis) -> AsyncIterator[SmallMachine]:
    async with SmallMachine(small_config(tmp_path, f"run-{uuid.uuid4().hex[:8]}"), redis) as machine:
        yield machine


async def judged(scenario: Scenario, machine: SmallMachine) -> list[str]:
    try:
        async with asyncio.timeout(20):
            await scenario(machine)
            await machine.finish()
    except (SapoError, TimeoutError) as error:
        machine.problems.append(f"stopped: {type(error).__name__}: {error}")
    return await examine(machine)


# ---- the accidents


def killed(point: Point) -> Scenario:
    """The learner dies there, in the middle of the run; its workers notice nothing."""

    async def scenario(machine: SmallMachine) -> None:
        learner = await machine.start_learner()
        await machine.sample(2)
        await learner.work()
        groups = await machine.sample(6)
        learner.dies_at = point
        with pytest.raises(Killed):
            await learner.work()
        await machine.send(groups[:2])

    scenario.__name__ = f"killed_{point}"
    return scenario


async def learner_away(machine: SmallMachine) -> None:
    """Groups pile up unread."""
    await machine.start_learner()
    await machine.sample(6)


HONEST: list[Scenario] = [*(killed(point) for point in POINTS), learner_away]


@pytest.mark.parametrize("scenario", HONEST, ids=lambda each: each.__name__)
async def test_an_honest_run_has_no_problem(machine: SmallMachine, scenario: Scenario) -> None:
    assert await judged(scenario, machine) == []
