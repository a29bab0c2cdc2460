"""A whole run in one process, which stands still between two lines of a script: real Redis, real control plane over
HTTP, real archive, reader, training session and publisher; only engine and ingest's door are missing.

    async with SmallMachine(config, redis) as machine:
        learner = await machine.start_learner()
        await machine.sample(4)                 four draws leased, made up and appended
        learner.dies_at = "archived"            between the archive's fsync and the trim of Redis
        with pytest.raises(Killed):
            await learner.work()
        await machine.finish()                  a new learner, and on to the run's last step
"""

import copy
import json
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from redis import asyncio as redis_asyncio

from sapo_learner.archive import Archive
from sapo_learner.config import parse
from sapo_learner.control import GROUP
from sapo_learner.manifest import Manifest
from sapo_learner.policy import Policy, load_policy, tiny_policy, write_policy
from sapo_learner.trajectory import VersionSpan
from services.runstore import EmbeddedRedis, RunStore
from services.runtime.lifecycle import Lifecycle
from services.runtime.settings import RunConfig, save_config
from services.wire import decode, encode
from tests.chaos.small_learner import SmallLearner
from tests.recorded import ALPHABET, random_group
from tests.small_run import Running, control_plane, heartbeat, lease_request

STEPS, GROUPS, PROMPTS = 6, 2, 5
ROUNDS = 40  # of everybody's work, before a run is said to have no end


def small_config(directory: Path, name: str, lease_seconds: float = 30.0) -> RunConfig:
    """Twelve draws of a file of five prompts, none held out; every other step has a checkpoint."""
    problems = directory / "problems.jsonl"
    lines = [json.dumps({"prompt": f"{number}+1=", "answer": str(number + 1)}) for number in range(PROMPTS)]
    problems.write_text("\n".join(lines))
    settings = {
        "run": {"name": name, "dir": str(directory), "seed": 3},
        "task": {"name": "jsonl", "path": str(problems), "held_out_fraction": 1e-9},
        "sampling": {"group_size": 4, "max_tokens": 8},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "training": {"steps": STEPS, "groups_per_step": GROUPS, "max_policy_age": 4, "threads": 1},
        "pacing": {"lease_seconds": lease_seconds},
        "checkpoint": {"every": 2},
    }
    return parse(RunConfig, settings, where="test")


@cache
def _first_base() -> Policy:
    with TemporaryDirectory() as directory:
        write_policy(tiny_policy(ALPHABET, seed=0), Path(directory))
        return load_policy(Path(directory))


def base_policy() -> Policy:
    """The same weights each time, in tensors of its own."""
    return replace(_first_base(), model=copy.deepcopy(_first_base().model))


@dataclass(frozen=True)
class Sampled:
    """A group in a worker's hands."""

    draw: int
    attempt: int
    payload: bytes


@dataclass(frozen=True)
class Accepted:
    """What ingest acknowledged."""

    entry_id: str
    draw: int
    attempt: int


class _OneTurn(Lifecycle):
    async def sleep(self, seconds: float) -> bool:
        self.stopping.set()
        return True


class SmallMachine:
    """accepted: every acknowledgement. forgiven: those that a Redis which was itself lost took along. seen: (version,
    step, digest) that anybody was told of. problems: what went wrong on the way."""

    def __init__(self, config: RunConfig, redis: EmbeddedRedis) -> None:
        self.config, self.redis, self.directory = config, redis, config.run.directory
        self.accepted: list[Accepted] = []
        self.forgiven: set[Accepted] = set()
        self.seen: set[tuple[int | None, int, str]] = set()
        self.problems: list[str] = []
        self.held: list[Sampled] = []  # leased by a script, not sent yet
        self.learners: list[SmallLearner] = []
        self._planes = AsyncExitStack()

    async def __aenter__(self) -> Self:
        save_config(self.config)
        self.store = await RunStore.connect(self.redis.url, self.config.run.name)
        await self.start_control_plane()
        return self

    async def __aexit__(self, *_: object) -> None:
        for learner in self.learners:
            await learner.close()
        await self._planes.aclose()
        await self.store.close()

    # ---- the control plane

    async def start_control_plane(self) -> Running:
        """A newer one; the older ones go on beside it, fenced off."""
        self.plane = await self._planes.enter_async_context(control_plane(self.config, self.redis.url))
        return self.plane

    async def watch(self) -> None:
        """One turn of the control plane's watch."""
        await self.plane.plane.watch(_OneTurn())

    # ---- the learner

    async def start_learner(self, step: int | None = None) -> SmallLearner:
        """A newer one, whatever the older ones are doing."""
        learner = await self.open_learner()
        await learner.begin(step)
        return learner

    async def open_learner(self) -> SmallLearner:
        learner = SmallLearner(self.config, base_policy(), self._see)
        self.learners.append(learner)
        await learner.open(self.redis.url, self.plane.url)
        return learner

    def _see(self, manifest: Manifest) -> None:
        self.seen.add((manifest.version, manifest.step, manifest.digest))

    # ---- workers and ingest

    async def lease(self, count: int = 1, worker: str = "w") -> list[Sampled]:
        """Groups for at most so many draws, sampled under the policy that is current now."""
        current = await self.plane.client.manifest()
        self._see(current)
        assert current.version is not None
        groups: list[Sampled] = []
        while len(groups) < count:
            request = lease_request(worker, count - len(groups), version=current.version, step=current.step)
            if not (draws := (await self.plane.client.lease(request)).draws):
                break
            groups += [_sampled(each.draw, each.attempt, current.version, current.step) for each in draws]
        return groups

    async def send(self, groups: list[Sampled]) -> list[str]:
        """What ingest says to each."""
        statuses: list[str] = []
        for group in groups:
            limits = {"max_entries": 100, "max_bytes": 1 << 30}
            result = await self.store.append(group.draw, group.attempt, group.payload, **limits)
            statuses.append(result.status)
            if result.status == "OK":
                self.accepted.append(Accepted(result.id, group.draw, group.attempt))
        return statuses

    async def sample(self, count: int, worker: str = "w") -> list[Sampled]:
        """Lease and send; returns the groups, which were accepted."""
        groups = await self.lease(count, worker)
        statuses = await self.send(groups)
        assert statuses == ["OK"] * count, f"asked for {count} draws: {statuses}"
        return groups

    async def beat(self, groups: list[Sampled], tokens: int, worker: str = "w") -> list[tuple[int, int]]:
        """A heartbeat that says how many tokens were sampled for each lease; returns those that are lost."""
        leases = [{"draw": each.draw, "attempt": each.attempt, "tokens": tokens} for each in groups]
        response = await self.plane.client.heartbeat(heartbeat(worker, leases=leases))
        return [(each.draw, each.attempt) for each in response.lost]

    # ---- Redis

    async def redis_now(self) -> dict[bytes, bytes]:
        """Everything it holds about the run, for `set_redis`."""
        async with redis_asyncio.Redis.from_url(self.redis.url, protocol=2) as client:
            keys = [key async for key in client.scan_iter(f"sapo:{{{self.config.run.name}}}:*")]
            return {key: await client.dump(key) for key in keys}

    async def set_redis(self, content: dict[bytes, bytes]) -> None:
        """Set it back to what it was, or empty it ({})."""
        await self.store.erase()
        async with redis_asyncio.Redis.from_url(self.redis.url, protocol=2) as client:
            for key, value in content.items():
                await client.restore(key, 0, value)

    async def forgive(self) -> None:
        """Groups that neither archive nor Redis holds now went with a Redis that was lost: nobody can keep them."""
        entries = [*Archive(self.directory / "archive", None).entries(), *await self.store.read(0, 1000)]
        there = {accepted_as(each.id, each.payload) for each in entries if each.kind == GROUP}
        self.forgiven |= set(self.accepted) - there

    # ---- to the end

    async def finish(self) -> None:
        """Everybody works, undisturbed, until the last step is saved and published."""
        learner = await self.start_learner()
        for _ in range(ROUNDS):
            await self.watch()
            self.held += await self.lease(4)
            statuses = await self.send(self.held)
            self.held = [group for group, status in zip(self.held, statuses, strict=True) if status == "NOT_READY"]
            await learner.work()
            if learner.step == STEPS and not self.held:
                return
        self.problems.append(f"the run stands still at step {learner.step} of {STEPS}")


def accepted_as(entry_id: str, payload: bytes) -> Accepted:
    group = decode(payload)
    return Accepted(entry_id, group.draw, group.attempt)


def _sampled(draw: int, attempt: int, version: int, step: int) -> Sampled:
    """Another attempt is sampled at another moment, and so has other tokens."""
    group = random_group(draw + 1000 * attempt, policy_step=step)
    responses = tuple(
        replace(each, spans=tuple(VersionSpan(span.length, version, step) for span in each.spans))
        for each in group.trajectories
    )
    made: Any = replace(group, draw=draw, attempt=attempt, trajectories=responses)
    return Sampled(draw, attempt, encode(made))
