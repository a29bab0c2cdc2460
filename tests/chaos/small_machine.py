"""A whole run in one process, which stands still between two lines of a script: real Redis, real control plane over
HTTP, real archive, reader, training session and publisher; only engine and ingest's door are missing.

    async with SmallMachine(config, redis, disk) as machine:
        learner = await machine.start_learner()
        await machine.sample(4)                 four draws leased, made up and appended
        learner.dies_at = "archived"            between the archive's fsync and the trim of Redis
        with pytest.raises(Killed):
            await learner.work()
        await machine.finish()                  a new learner, and on to the run's last step
"""

import copy
import json
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self
from zlib import crc32

import pytest
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
from tests.small_run import Running, control_plane, heartbeat, lease_request, sha256

STEPS, GROUPS, PROMPTS = 4, 2, 3
KEEP = ("FULL", "NOT_READY")
ROUNDS = 20  # of everybody's work, before a run is said to have no end


def small_config(directory: Path, name: str) -> RunConfig:
    """Eight draws of a file of three prompts, none held out; every other step has a checkpoint."""
    problems = directory / "problems.jsonl"
    lines = [json.dumps({"prompt": f"{number}+1=", "answer": str(number + 1)}) for number in range(PROMPTS)]
    problems.write_text("\n".join(lines))
    settings = {
        "run": {"name": name, "dir": str(directory), "seed": 3},
        "task": {"name": "jsonl", "path": str(problems), "held_out_fraction": 1e-9},
        "sampling": {"group_size": 4, "max_tokens": 8},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "training": {"steps": STEPS, "groups_per_step": GROUPS, "max_policy_age": 4, "threads": 1},
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


class Disk:
    """Knows how much of each file has been forced to the disk."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._durable: dict[int, int] = {}
        fsync = os.fsync

        def noting(descriptor: int) -> None:
            fsync(descriptor)
            status = os.fstat(descriptor)
            self._durable[status.st_ino] = status.st_size

        patch.setattr(os, "fsync", noting)

    def power_cut(self, directory: Path) -> None:
        for path in directory.glob("segment-*"):
            os.truncate(path, min(self._durable.get(path.stat().st_ino, 0), path.stat().st_size))


@dataclass(frozen=True)
class Sampled:
    """A group in a worker's hands."""

    draw: int
    attempt: int
    payload: bytes


@dataclass(frozen=True)
class Accepted:
    """What ingest acknowledged. digest: of the payload; after a Redis was set back, the rest may come again."""

    entry_id: str
    draw: int
    attempt: int
    digest: str


class _OneTurn(Lifecycle):
    async def sleep(self, seconds: float) -> bool:
        self.stopping.set()
        return True


class SmallMachine:
    """accepted: every acknowledgement. forgiven: those that a Redis which was itself lost took along. seen: (version,
    step, digest) that anybody was told of. problems: what went wrong on the way."""

    def __init__(self, config: RunConfig, redis: EmbeddedRedis, disk: Disk) -> None:
        self.config, self.redis, self.disk, self.directory = config, redis, disk, config.run.directory
        self.accepted: list[Accepted] = []
        self.forgiven: set[Accepted] = set()
        self.seen: set[tuple[int | None, int, str]] = set()
        self.problems: list[str] = []
        self.held: list[Sampled] = []  # leased by a script, not sent yet
        self.learners: list[SmallLearner] = []
        self.max_entries = 100
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

    async def start_control_plane(self, lease_seconds: float = 30.0) -> Running:
        """A newer one; the older ones go on beside it, fenced off."""
        pacing = self.config.pacing.model_copy(update={"lease_seconds": lease_seconds})
        config = self.config.model_copy(update={"pacing": pacing})
        self.plane = await self._planes.enter_async_context(control_plane(config, self.redis.url))
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
            groups += [_sampled(worker, each.draw, each.attempt, current.version, current.step) for each in draws]
        return groups

    async def send(self, groups: list[Sampled]) -> list[str]:
        """What ingest says to each."""
        statuses: list[str] = []
        for group in groups:
            result = await self.store.append(
                group.draw, group.attempt, group.payload, max_entries=self.max_entries, max_bytes=1 << 30
            )
            statuses.append(result.status)
            if result.status == "OK":
                self.accepted.append(accepted_as(result.id, group.payload))
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
            return {key: value for key in keys if (value := await client.dump(key)) is not None}

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
            self.held = [group for group, status in zip(self.held, statuses, strict=True) if status in KEEP]
            await learner.work()
            if learner.step == STEPS and not self.held:
                return
        self.problems.append(f"the run stands still at step {learner.step} of {STEPS}")


def accepted_as(entry_id: str, payload: bytes) -> Accepted:
    group = decode(payload)
    return Accepted(entry_id, group.draw, group.attempt, sha256(payload))


def _sampled(worker: str, draw: int, attempt: int, version: int, step: int) -> Sampled:
    """Another attempt, or another worker's, is sampled at another moment, and so has other tokens."""
    group = random_group(crc32(f"{worker} {draw} {attempt}".encode()), policy_step=step)
    responses = tuple(
        replace(each, spans=tuple(VersionSpan(span.length, version, step) for span in each.spans))
        for each in group.trajectories
    )
    made: Any = replace(group, draw=draw, attempt=attempt, trajectories=responses)
    return Sampled(draw, attempt, encode(made))
