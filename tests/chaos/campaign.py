"""One run under attack: started, struck by fault after fault, drained, taken up again for its last steps, judged."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sapo_learner import checkpoint
from services.runtime.settings import RunConfig
from tests.chaos.faults import FAULTS, FORGETTING, KILLED, KILLS, PEERS, QUICK, REDIS_DIES
from tests.chaos.harness import ChaosRun, Fsync, small_config
from tests.chaos.proxy import SeenAck
from tests.chaos.verdict import Verdict, examine, missing

ENDLESS = 1_000_000  # steps, while faults go on
LAST_STEPS = 8  # more than leases can run ahead
AT_ONCE_SHARE = 0.25


@dataclass(frozen=True)
class Strike:
    """A fault to come. at_once: the next one follows before the run has recovered from this one."""

    fault: str
    delay: float
    at_once: bool


@dataclass(frozen=True)
class Struck:
    """A fault that was. Times in Unix seconds; restarts: of all processes, until the next fault or recovery."""

    fault: str
    did: str
    began: float
    over: float
    recovered: float
    restarts: int

    @property
    def recovery_seconds(self) -> float:
        return self.recovered - self.over

    @property
    def described(self) -> str:
        lasted, recovery = f"{self.over - self.began:.1f} s", f"{self.recovery_seconds:.1f} s"
        return f"{self.did}; lasted {lasted}, recovery {recovery}, {self.restarts} restarts"


@dataclass(frozen=True)
class Outcome:
    """lost: accepted groups that each fault took with it, in the order of `struck`."""

    struck: list[Struck]
    fsync: Fsync
    lost: list[int]
    verdict: Verdict

    @property
    def problems(self) -> list[str]:
        """Everything that must not be; what Redis forgets as it may is sampled anew, and no problem."""
        may_forget = FORGETTING if self.fsync == "always" else (*FORGETTING, *REDIS_DIES)
        found = list(self.verdict.problems)
        for what, draws in (("never accepted", self.verdict.skipped), ("accepted twice", self.verdict.duplicated)):
            found += [f"{len(draws)} draws {what}: {draws[:5]}"] if draws else []
        for each, lost in zip(self.struck, self.lost, strict=True):
            if lost and each.fault not in may_forget:
                found.append(f"{lost} accepted groups lost by: {each.did}")
        if unexplained := len(self.verdict.lost) - sum(self.lost):
            found.append(f"{unexplained} accepted groups lost by nothing that was done")
        return found


def plan(names: Sequence[str], rng: random.Random, *, longest_delay: float) -> list[Strike]:
    """The faults in this order, at random moments."""
    strikes = []
    for name, following in zip(names, [*names[1:], ""], strict=True):
        at_once = name in QUICK and following in QUICK and name != following and rng.random() < AT_ONCE_SHARE
        strikes.append(Strike(name, rng.uniform(0, longest_delay), at_once))
    return strikes


def short_plan(seed: int) -> list[Strike]:
    """Twenty faults of every kind, but one: the second learner comes only while the first is stopped, and two of the
    three peers fall silent. Each learner more takes as long as three other faults."""
    rng = random.Random(seed)
    left_out = {"second learner", f"{rng.choice(PEERS)} silent"}
    names = [name for name in FAULTS if name not in left_out]
    rng.shuffle(names)
    return plan(names, rng, longest_delay=0.5)


def kill_plan(seed: int, count: int) -> list[Strike]:
    """Every process equally often."""
    rng = random.Random(seed)
    names = [f"kill {KILLED[index % len(KILLED)]}" for index in range(count)]
    rng.shuffle(names)
    return plan(names, rng, longest_delay=1.5)


def redis_plan(seed: int, count: int) -> list[Strike]:
    """Redis alone, which is what fsync is about."""
    return plan(["kill redis"] * count, random.Random(seed), longest_delay=1.5)


def full_plan(seed: int) -> list[Strike]:
    """Every kind of fault, kills aside, three times, and the kills among them."""
    rng = random.Random(seed)
    names = [name for name in FAULTS if name not in KILLS] * 3 + list(KILLS)
    rng.shuffle(names)
    return plan(names, rng, longest_delay=1.5)


async def campaign(
    directory: Path, strikes: Sequence[Strike], *, seed: int, fsync: Fsync = "always",
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:  # fmt: skip
    """Raises ChaosFailure."""
    acks: list[SeenAck] = []
    books = _Books()
    endless = small_config(directory / "run", steps=ENDLESS)
    run = ChaosRun(endless, fsync=fsync, acks=acks)
    try:
        await run.start()
        await run.recovered(0)
        struck = [each async for each in _strike_all(run, strikes, books, seed, say)]
        books.close(struck, await missing(run))
    finally:
        await run.stop()
    await _finish(endless, fsync, acks, say)
    say("replaying the archive")
    verdict = await examine(run.directory, endless.learner, acks)
    say(verdict.described)
    return Outcome(struck, fsync, books.lost, verdict)


class _Books:
    """Which fault lost what. Closed before and after a fault that makes Redis forget, and at the end."""

    def __init__(self) -> None:
        self.lost: list[int] = []  # by fault
        self._known: set[SeenAck] = set()

    def close(self, struck: Sequence[Struck], gone: Sequence[SeenAck]) -> None:
        """gone: all that is missing now. What is new among it was lost by a fault since the books were closed last."""
        first = len(self.lost)
        self.lost += [0] * (len(struck) - first)
        for ack in set(gone) - self._known:
            self._known.add(ack)
            self.lost[self._blamed(struck, first, ack)] += 1

    def _blamed(self, struck: Sequence[Struck], first: int, ack: SeenAck) -> int:
        """The first death of Redis after the group was accepted; failing that, whatever came first after it."""
        since = [(index, each) for index, each in enumerate(struck[first:], first) if each.recovered >= ack.time]
        deaths = [index for index, each in since if each.fault in (*FORGETTING, *REDIS_DIES)]
        return [*deaths, *(index for index, _ in since), len(struck) - 1][0]


async def _strike_all(
    run: ChaosRun, strikes: Sequence[Strike], books: _Books, seed: int, say: Callable[[str], None]
) -> AsyncIterator[Struck]:
    struck: list[Struck] = []
    waiting: list[Struck] = []
    for number, strike in enumerate(strikes, 1):
        await asyncio.sleep(strike.delay)
        if forgetting := strike.fault in FORGETTING:
            books.close(struck, await missing(run))
        generation, restarts, began = await run.generation(), run.restarts, time.time()
        did = await FAULTS[strike.fault](run, random.Random(f"{seed} {number}"))
        waiting.append(Struck(strike.fault, did, began, over=time.time(), recovered=0, restarts=restarts))
        if strike.at_once:
            continue
        if forgetting:
            await run.until("rebuilt log", partial(_has_newer, run, generation))
        recovered = await run.recovered(waiting[-1].over)
        ends = [each.restarts for each in waiting[1:]] + [run.restarts]
        for each, end in zip(waiting, ends, strict=True):
            struck.append(replace(each, recovered=recovered, restarts=end - each.restarts))
            say(f"{len(struck)}/{len(strikes)}, step {run.last_step()}: {struck[-1].described}")
            yield struck[-1]
        waiting.clear()
        if forgetting:
            books.close(struck, await missing(run))


async def _has_newer(run: ChaosRun, generation: int) -> bool:
    return await run.generation() > generation


async def _finish(endless: RunConfig, fsync: Fsync, acks: list[SeenAck], say: Callable[[str], None]) -> None:
    """The same run, now with an end: every draw that was ever handed out is to be accepted."""
    newest = checkpoint.list_whole(endless.run.directory / "checkpoints")[0].step
    steps = newest + LAST_STEPS
    say(f"drained at step {newest}; going on to step {steps}")
    training = endless.training.model_copy(update={"steps": steps})
    run = ChaosRun(endless.model_copy(update={"training": training}), fsync=fsync, acks=acks)
    try:
        await run.start()
        async with asyncio.timeout(120):
            await run.finished(asyncio.Event(), lambda _: None)
    finally:
        await run.stop()
