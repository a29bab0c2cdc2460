"""A verdict is worth what it catches: scripted runs that must pass it, and the same with one rule of recovery broken,
which must not (I1, I2, I3, I7).

Every mutant is one rule taken out of the code that keeps it, by a switch inside the test; its scenario is the accident
that the rule is for.
"""

import asyncio
import os
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from sapo_learner import checkpoint, segment
from sapo_learner.archive import Archive
from sapo_learner.errors import SapoError
from sapo_learner.ledger import Ledger
from sapo_learner.train import Position
from services.learner.reader import Reader
from services.learner.session import TrainingSession
from services.runstore import EmbeddedRedis, connection
from tests.chaos.accidents import (
    Scenario,
    anything,
    clocks_differ,
    hung_worker,
    killed,
    killed_unsaved,
    learner_away,
    power_cut,
    redis_emptied,
    redis_killed,
    redis_set_back,
    sent_again,
    two_learners,
)  # fmt: skip
from tests.chaos.small_learner import Killed
from tests.chaos.small_machine import Disk, SmallMachine, small_config
from tests.chaos.small_verdict import examine

SCRIPTS = Path(connection.__file__).parent / "scripts"


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
async def machine(tmp_path: Path, redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SmallMachine]:
    config = small_config(tmp_path, f"run-{uuid.uuid4().hex[:8]}")
    async with SmallMachine(config, redis, Disk(monkeypatch)) as machine:
        yield machine


async def judged(scenario: Scenario, machine: SmallMachine) -> list[str]:
    try:
        async with asyncio.timeout(20):
            await scenario(machine)
            await machine.finish()
    except (SapoError, TimeoutError) as error:
        machine.problems.append(f"stopped: {type(error).__name__}: {error}")
    return await examine(machine)


HONEST: list[Scenario] = [
    killed("allowed"), killed("trained"), killed("saved"), killed_unsaved, learner_away,
    sent_again, two_learners, redis_emptied, redis_set_back, hung_worker, clocks_differ, power_cut, redis_killed,
    *(anything(seed) for seed in range(2)),
]  # fmt: skip


@pytest.mark.parametrize("scenario", HONEST, ids=lambda each: each.__name__)
async def test_an_honest_run_has_no_problem(machine: SmallMachine, scenario: Scenario) -> None:
    assert await judged(scenario, machine) == []


async def test_a_log_that_was_full_when_the_learner_was_killed_flows_again(machine: SmallMachine) -> None:
    async def full(machine: SmallMachine) -> None:
        machine.max_entries = 6
        learner = await machine.start_learner()
        await machine.sample(6)
        learner.dies_at = "archived"
        with pytest.raises(Killed):
            await learner.read()

    assert await judged(full, machine) == []


# ---- the mutants


Change = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutant:
    """caught: what the verdict must say of it, among other things."""

    name: str
    change: Change
    scenario: Scenario
    caught: str


def without(line: str, instead: str = "") -> Change:
    """Every script that has this text has another one; refused when none has."""

    def change(patch: pytest.MonkeyPatch) -> None:
        source = connection._source
        assert any(line in source(path.stem) for path in SCRIPTS.glob("*.lua") if path.stem != "prelude"), line
        patch.setattr(connection, "_source", lambda name: source(name).replace(line, instead))

    return change


def both(*changes: Change) -> Change:
    def change(patch: pytest.MonkeyPatch) -> None:
        for each in changes:
            each(patch)

    return change


def trims_first(patch: pytest.MonkeyPatch) -> None:
    async def read(reader: Reader, block_ms: int) -> None:
        if entries := await reader._store.read(reader._archive.head.sequence, 64, block_ms):
            await reader._store.trim(reader._token, entries[-1].position)
            await asyncio.to_thread(reader._archive.append, entries)
        else:
            await reader.mend()

    patch.setattr(Reader, "read", read)


def resumes_at(position: Callable[[TrainingSession], Position]) -> Change:
    """Weights and optimizer come from the checkpoint, the place in the log from elsewhere."""

    def change(patch: pytest.MonkeyPatch) -> None:
        restore = TrainingSession.restore

        def restored(self: TrainingSession, step: int | None = None) -> None:
            restore(self, step)
            self.position = position(self)

        patch.setattr(TrainingSession, "restore", restored)

    return change


def read_is_done(session: TrainingSession) -> Position:
    """As with a queue that is acknowledged on reading; its books agree with it."""
    head = session._archive.head
    return Position(head.sequence, head.chain, Ledger(trained=head.sequence))


def from_the_beginning(_: TrainingSession) -> Position:
    return Position()


def appends_without_fsync(patch: pytest.MonkeyPatch) -> None:
    def add_frame(descriptor: int, start: int, records: list[list[Any]], *, where: Path) -> int:
        blob = segment.encode(records)
        return os.pwrite(descriptor, blob, start)

    patch.setattr(segment, "add_frame", add_frame)


def no_fence_on_disk(module: Any) -> Change:
    """module: whose refusal of an older writer is left out."""
    return lambda patch: patch.setattr(module, "_refuse_if_fenced", lambda *_: None)


_BY_LENGTH = without("redis.call('XADD', log, id,", "redis.call('XADD', log, 'MAXLEN', '=', '3', id,")
_INDEX_TOO = without(
    "redis.call('RPUSH', index, #payload .. ' ' .. chain)",
    "redis.call('RPUSH', index, #payload .. ' ' .. chain) redis.call('LTRIM', index, -3, -1)",
)
_CLOSED = "close(leases, lease_info, lease_steps, draw)\nredis.call('HDEL', attempts, draw)"
_NOW = "local now = now_ms()\nfor _, draw in"
_AN_HOUR_LATER = _NOW.replace("()", "() + (tonumber(token) == 1 and 0 or 3600000)")
_LOST = r"Accepted\(.* is lost"

MUTANTS = [
    Mutant("trim_before_the_archive_is_durable", trims_first, killed("allowed"), _LOST),
    Mutant("append_without_fsync", appends_without_fsync, power_cut, _LOST),
    Mutant("cursor_elsewhere", resumes_at(read_is_done), killed("trained"), "stands still|gives other weights"),
    Mutant("cursor_nowhere", resumes_at(from_the_beginning), killed("saved"), "gives other weights"),
    Mutant("append_without_closing_the_draw", without(_CLOSED), sent_again, "draw 0 is in the log 3 times"),
    Mutant("no_fence_in_redis", without("if tonumber(token) < newest then", "if false then"), two_learners, _LOST),
    Mutant("no_fence_at_the_archive", no_fence_on_disk(Archive), two_learners, "not refused: append"),
    Mutant("no_fence_at_the_checkpoints", no_fence_on_disk(checkpoint), two_learners, "not refused: checkpoint"),
    Mutant("trim_by_length", _BY_LENGTH, learner_away, "stopped: Corrupt: .*does not follow"),
    Mutant("trim_by_length_with_its_index", both(_BY_LENGTH, _INDEX_TOO), learner_away, _LOST),
    Mutant("trim_without_the_chain", without("if archived ~= chain then", "if false then"), redis_set_back, "stopped"),
    Mutant("identical_steps_get_new_versions", without("if known and", "if false and"), killed_unsaved, "2 versions"),
    Mutant(
        "rebuild_forgets_open_draws",
        without("for position = 8, #ARGV do redis.call('ZADD', reoffered, ARGV[position], ARGV[position]) end"),
        redis_emptied, "draw 2 is in the log 0 times",
    ),
    Mutant("renewal_without_progress", without("elseif tonumber(tokens) > 0 then", "else"), hung_worker, "hung"),
    Mutant("deadlines_by_the_caller_s_clock", without(_NOW, _AN_HOUR_LATER), clocks_differ, "in time"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.name)
async def test_a_mutant_is_caught(machine: SmallMachine, mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.change(monkeypatch)
    problems = await judged(mutant.scenario, machine)
    assert any(re.search(mutant.caught, problem) for problem in problems), problems
