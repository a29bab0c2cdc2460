"""One learner's life in the small machine: the parts of `sapo serve learner`, worked by hand, that can die or fall
asleep between any two of the writes it makes.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from sapo_learner.archive import Archive, Entry, newest_token
from sapo_learner.manifest import Blob, Manifest
from sapo_learner.policy import Policy
from services.learner.publisher import Publisher, Snapshot, copy_weights
from services.learner.reader import ArchiveLog, Reader
from services.learner.session import StepNews, TrainingSession
from services.runstore import RunStore
from services.runtime import api
from services.runtime.client import ControlPlaneClient
from services.runtime.metrics import LearnerMetrics
from services.runtime.settings import RunConfig
from tests.small_run import TOKEN

Point = Literal["", "allowed", "archived", "trimmed", "trained", "saved", "uploaded", "published"]
POINTS: tuple[Point, ...] = ("allowed", "archived", "trimmed", "trained", "saved", "uploaded", "published")
"""allowed: to append to the archive, nothing written yet. archived: not trimmed. trained: a checkpoint is due.
uploaded: not registered. published: it did not hear so."""


class Killed(Exception):
    """kill -9 at a named point: nothing after it happens."""


class _Done(Exception):
    """No step's worth of entries is there, or enough steps are done: the training thread would wait here."""


class _Store(RunStore):
    reach: Callable[[Point], None]

    async def trim(self, *arguments: object, **options: object) -> int:
        count = await super().trim(*arguments, **options)  # type: ignore[arg-type]
        self.reach("trimmed")
        return count


class _Archive(Archive):
    reach: Callable[[Point], None] = staticmethod(lambda _: None)

    def _refuse_if_fenced(self) -> None:
        super()._refuse_if_fenced()
        self.reach("allowed")

    def append(self, entries: object) -> int:
        last = super().append(entries)  # type: ignore[arg-type]
        self.reach("archived")
        return last


class _Session(TrainingSession):
    reach: Callable[[Point], None]

    def save(self) -> None:
        due = self.saved_step != self.learner.step_count
        if due:
            self.reach("trained")
        super().save()
        if due:
            self.reach("saved")


class _Client(ControlPlaneClient):
    reach: Callable[[Point], None]

    async def upload(self, path: Path, blob: Blob) -> None:
        await super().upload(path, blob)
        self.reach("uploaded")

    async def publish(self, request: api.PublishRequest) -> api.PublishResponse:
        response = await super().publish(request)
        self.reach("published")
        return response


class _Log(ArchiveLog):
    """Asked for more than is there, it does not wait."""

    def next(self, after: int, count: int) -> list[Entry] | None:
        if self._archive.head.sequence - after < count:
            raise _Done
        return super().next(after, count)


class SmallLearner:
    """dies_at: the next time it gets there, it is killed. sleeps_at: there it sleeps, once, until `wake`; only in the
    archive's thread, "allowed" or "archived"."""

    def __init__(self, config: RunConfig, base: Policy, published: Callable[[Manifest], None]) -> None:
        self._config, self._base, self._published = config, base, published
        self._snapshots: list[Snapshot] = []
        self.dies_at: Point = ""
        self.sleeps_at: Point = ""
        self._asleep, self._woken = threading.Event(), threading.Event()
        self.session: TrainingSession

    async def open(self, redis_url: str, control_url: str) -> None:
        """Takes a token, opens the archive, mends Redis."""
        config, directory = self._config, self._config.run.directory / "archive"
        self.store = await _Store.connect(redis_url, config.run.name)
        self.control = _Client(control_url, TOKEN, patience=5.0)
        self.token = await self.store.acquire_token("learner", floor=newest_token(directory))
        self.archive = _Archive(directory, self.token)
        self.store.reach = self.control.reach = self.archive.reach = self._reach
        self.reader = Reader(self.store, self.archive, self.token)
        await self.reader.mend()
        self.publisher = Publisher(
            self.control, self._base, dtype=config.policy.dtype, staging=config.run.directory / "staging",
            token=self.token, metrics=LearnerMetrics(),
        )  # fmt: skip

    async def begin(self, step: int | None = None) -> None:
        """Restores, reads what Redis holds, publishes what it has."""
        self.session = _Session(self._config, self._base, self.archive, self.token)
        self.session.reach = self._reach
        self.session.log = _Log(self.archive)
        self.session.restore(step)
        await self.read()
        await self.reader.count_controls()
        self._snapshots.append(copy_weights(self._base, self.step))
        await self.publish()

    @property
    def step(self) -> int:
        return self.session.learner.step_count

    async def work(self) -> None:
        await self.read()
        self.train()
        await self.publish()

    async def read(self) -> None:
        """Redis -> archive, all there is. A look at an empty log is what finds Redis lost."""
        await self.reader.read(0)
        while self.archive.head.sequence < (await self.store.state()).sequence:
            await self.reader.read(0)

    def train(self, steps: int = 0) -> None:
        """What is there; at most so many steps, if given. What would be published waits for `publish`."""
        done = 0

        def report(_: StepNews) -> None:
            nonlocal done
            done += 1
            if done == steps:
                raise _Done

        with suppress(_Done):
            self.session.run(self._snapshots.append, report)

    async def publish(self) -> None:
        while self._snapshots:
            self._published(await self.publisher.publish(self._snapshots.pop(0)))

    def _reach(self, point: Point) -> None:
        if point == self.sleeps_at:
            self.sleeps_at = ""
            self._asleep.set()
            assert self._woken.wait(10), "nobody woke it"
        if point == self.dies_at:
            raise Killed(point)

    async def fall_asleep(self) -> None:
        assert await asyncio.to_thread(self._asleep.wait, 10), "it never got there"

    def wake(self) -> None:
        self._woken.set()

    async def close(self) -> None:
        self.wake()
        self.archive.close()
        await self.control.__aexit__()
        await self.store.close()
