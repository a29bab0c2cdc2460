"""What the learner tells: every step to the run's record and the metrics, and now and then a group to look at."""

import asyncio
import logging
import math
import time
from typing import Any

from sapo_learner.errors import NotFound, SapoError
from sapo_learner.train import StepReport
from services.learner.behaviour_probe import BehaviourProbe
from services.learner.session import Progress, StepNews, TrainingSession
from services.learner.shown_groups import TrainedGroup
from services.runtime import api
from services.runtime.client import ControlPlaneClient
from services.runtime.disk_usage import disk_usage
from services.runtime.lifecycle import Lifecycle
from services.runtime.metrics import LearnerMetrics
from services.runtime.settings import RunConfig

log = logging.getLogger(__name__)
REPORT_SECONDS = 1.0
FAREWELL_SECONDS = 5.0
MEASURE_SECONDS = 10.0  # between two looks at how much disk the run takes


class Reporter:
    """Lives in the event loop."""

    def __init__(
        self,
        config: RunConfig,
        control: ControlPlaneClient,
        metrics: LearnerMetrics,
        session: TrainingSession,
        probe: BehaviourProbe | None,
    ) -> None:
        self._config, self._control, self._metrics = config, control, metrics
        self._session, self._probe = session, probe
        self._news: asyncio.Queue[StepNews] = asyncio.Queue()
        self._measured = -math.inf
        self._unshown = False  # that a group did not reach the dashboard, and that it has been said

    def submit(self, news: StepNews) -> None:
        self._news.put_nowait(news)

    async def run(self) -> None:
        """Every step as it comes; without one, every second what training waits for."""
        every = self._config.probe.behaviour_every
        while True:
            try:
                news = await asyncio.wait_for(self._news.get(), REPORT_SECONDS)
            except TimeoutError:
                await self.look()
                done = self._session.learner.step_count >= self._session.learner.settings.training.steps
                if not done or self._session.log.waiting_for:
                    await self.report("training")
                continue
            self._metrics.observe(news.record)
            await self.look()
            await self.report("training", news.record, news.progress)
            if news.shown:
                await self._show(news.shown)
            if self._probe and news.progress.step % every == 0 and news.report.groups:
                await self._check(self._probe, news.report)
            self._news.task_done()

    async def deliver(self, lifecycle: Lifecycle) -> None:
        """Every step's figures reach the record; but a process that shall stop does not wait long for that."""
        stopping = asyncio.create_task(lifecycle.stopping.wait())
        joined = asyncio.create_task(self._news.join())
        await asyncio.wait([joined, stopping], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([joined], timeout=FAREWELL_SECONDS)
        if not joined.done():
            log.warning("the figures of %d steps did not reach the record in time", self._news.qsize() + 1)
        for task in (joined, stopping):
            task.cancel()

    async def report(self, state: str, record: dict[str, Any] | None = None, progress: Progress | None = None) -> None:
        progress = progress or self._session.progress
        await self._control.learner_report(
            api.LearnerReport(
                state=state, step=progress.step, cursor=progress.cursor, ledger=progress.ledger.to_dict(),
                record=record, waiting_for=self._session.log.waiting_for,
            )
        )  # fmt: skip

    async def look(self) -> None:
        """What metrics say beside a step's figures, also of one that does not end."""
        self._metrics.at(self._session.progress.step, self._session.saved_step)
        self._metrics.waited(self._session.log.waited_seconds)
        if time.monotonic() - self._measured >= MEASURE_SECONDS:
            directory = self._config.run.directory
            checkpoints, archive = [
                await asyncio.to_thread(disk_usage, directory / part) for part in ("checkpoints", "archive")
            ]
            self._metrics.observe_disk(checkpoints, archive)
            self._measured = time.monotonic()

    async def _show(self, shown: TrainedGroup) -> None:
        """A group that cannot be shown is no reason to stop."""
        assert self._session.showcase
        if group := await asyncio.to_thread(self._session.showcase.described, shown):
            try:
                await self._control.show(group)
            except SapoError as error:
                if not self._unshown:
                    log.warning("entry %s does not reach the dashboard: %s", shown.entry, error)
                self._unshown = True
            else:
                self._unshown = False

    async def _check(self, probe: BehaviourProbe, step: StepReport) -> None:
        try:
            result = await probe.check(step.update.step, step.groups)
        except NotFound as error:
            log.warning("probe of step %d left out: %s", step.update.step, error)
            return
        self._metrics.probe.set(result.max_abs_diff)
        await self.report("training", {"kind": "probe", **result.to_dict()})
