"""`sapo serve learner`: reads the log, trains, checkpoints, publishes.

event loop          reader (Redis -> archive), publisher (snapshot -> control plane), reporter, probes
training thread     TrainingSession: blocks on the archive, steps, checkpoints
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch.distributed as dist

from sapo_learner import skips
from sapo_learner.archive import Archive, newest_token
from sapo_learner.control import CONFIG, encode_settings
from sapo_learner.ledger import Ledger
from sapo_learner.parallel import ALONE, Ranks, device_of_rank, joined, together
from sapo_learner.policy import load_policy
from services.learner.base_policy import base_policy
from services.learner.behaviour_probe import BehaviourProbe
from services.learner.publisher import Publisher, Snapshot
from services.learner.ranks import Orders, needs_group, orders_of, prepare, shared_policy
from services.learner.reader import Reader
from services.learner.reporter import FAREWELL_SECONDS, REPORT_SECONDS, Reporter
from services.learner.session import StepNews, TrainingSession
from services.runstore import RunStore
from services.runtime import api
from services.runtime.client import ControlPlaneClient
from services.runtime.http import probe_app, serving
from services.runtime.lifecycle import DRAIN_GRACE_SECONDS, Lifecycle
from services.runtime.logging import of_run
from services.runtime.metrics import LearnerMetrics
from services.runtime.settings import Environment, RunConfig, save_config

T = TypeVar("T")
log = logging.getLogger(__name__)


async def serve(
    lifecycle: Lifecycle, environment: Environment, *, http_listen: str, from_step: int | None = None
) -> None:
    """from_step: go on from the checkpoint of that step instead of the newest."""
    url, redis_url = (environment.require(name) for name in ("control_plane_url", "redis_url"))
    token, tls = environment.credential(), environment.tls
    metrics, patience = LearnerMetrics(), environment.patience_seconds
    async with (
        serving(probe_app(lifecycle, metrics.registry), http_listen),
        ControlPlaneClient(url, token, tls=tls, patience=patience, waiting=lifecycle.peer("control plane")) as control,
    ):
        config = await control.config()
        of_run(control.run)
        waiting = lifecycle.peer("Redis")
        async with await RunStore.connect(redis_url, config.run.name, patience=patience, waiting=waiting) as store:
            await _Service(lifecycle, config, control, store, metrics, patience).run(from_step)


class _Service:
    def __init__(
        self,
        lifecycle: Lifecycle,
        config: RunConfig,
        control: ControlPlaneClient,
        store: RunStore,
        metrics: LearnerMetrics,
        patience: float,
    ) -> None:
        self._lifecycle, self._config, self._control = lifecycle, config, control
        self._store, self._metrics, self._patience = store, metrics, patience
        self._session: TrainingSession
        self._thread = ThreadPoolExecutor(1, "training")
        self._reporter: Reporter

    async def run(self, from_step: int | None) -> None:
        """With the other ranks, if there are some: they wait for this one's orders, and then do as it does."""
        with contextlib.ExitStack() as stack:
            ranks = ALONE
            if needs_group(self._config):
                self._lifecycle.wait_for("start", "the learner's other ranks")
                ranks = await self._in_training(stack.enter_context, joined(device_of_rank()))
            orders: Future[Orders] = Future()
            telling = asyncio.ensure_future(self._in_training(ranks.awaited, orders.result))
            try:
                await self._run(from_step, ranks, orders, telling)
            except BaseException as error:
                if not orders.done():  # then the others hear why there are none
                    orders.set_exception(error)
                    await asyncio.wait([telling])
                raise
            finally:
                if telling.done() and not telling.cancelled():
                    telling.exception()  # of a rank that was gone before anybody asked
                if dist.is_initialized():  # not left while the training thread speaks in it
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(DRAIN_GRACE_SECONDS):
                            await asyncio.to_thread(self._thread.shutdown)

    async def _run(
        self, from_step: int | None, ranks: Ranks, orders: "Future[Orders]", telling: Awaitable[Orders]
    ) -> None:
        config, directory = self._config, self._config.run.directory
        prepare(config)
        whole, warm_start = await self._base_policy()
        save_config(config)  # its files may lie on another machine than the control plane's
        archive_directory = directory / "archive"
        token = await self._store.acquire_token("learner", floor=newest_token(archive_directory))
        self._token = token
        with (
            skips.learning(archive_directory),
            Archive(archive_directory, token, config.archive.segment_bytes) as archive,
        ):
            waiting = self._lifecycle.peer("Redis")
            reader = Reader(self._store, archive, token, patience=self._patience, waiting=waiting)
            await reader.mend()
            orders.set_result(orders_of(config, whole, token, self._control.run))
            policy = await self._in_training(shared_policy, whole, await telling, ranks)
            del whole  # what is trained may be a share of it
            self._session = session = await self._in_training(TrainingSession, config, policy, archive, token, ranks)
            await self._in_training(session.restore, from_step)
            await self._record_changes(reader)
            publisher = Publisher(
                self._control, policy, dtype=config.policy.dtype, staging=directory / "staging", token=token,
                metrics=self._metrics,
            )  # fmt: skip
            self._lifecycle.wait_for("start", "the first snapshot's publication")
            await publisher.publish(await self._in_training(session.snapshot))
            model_directory = publisher.write_model_directory(directory / "model")
            probe = None
            if config.probe.behaviour_every:
                spare = load_policy(model_directory, weights=False)
                probe = BehaviourProbe(self._control, spare, directory / "staging" / f"{token:08d}-probe")
            self._reporter = reporter = Reporter(config, self._control, self._metrics, session, probe)
            await reporter.report("training", {"kind": "warm_start", **warm_start} if warm_start else None)
            await reporter.look()
            self._lifecycle.ready()
            await self._train(reader, publisher)

    async def _in_training(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do it in the training thread: one thread, because a thread has its own GPU."""

        def with_ranks() -> T:
            with together(ALONE if not dist.is_initialized() else Ranks.of_process_group()):
                return work(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self._thread, with_ranks)

    async def _record_changes(self, reader: Reader) -> None:
        """Put settings that differ from those in force into the log, as the entry from which they count."""
        wanted, said = self._session.wanted, ""
        while True:  # Redis may be lost meanwhile, before or after it has taken the entry
            await reader.settle()
            if await self._in_training(self._session.settings_ahead) == wanted:
                break
            result = await self._store.append_control(self._token, CONFIG, encode_settings(wanted))
            said = result.id
        if said:
            log.info("changed settings are entry %s of the log", said)
        await reader.count_controls()

    async def _train(self, reader: Reader, publisher: Publisher) -> None:
        loop, session, archived = asyncio.get_running_loop(), self._session, reader.archive_seconds

        def publish(snapshot: Snapshot) -> None:
            loop.call_soon_threadsafe(publisher.submit, snapshot)

        def report(news: StepNews) -> None:
            nonlocal archived
            before, archived = archived, reader.archive_seconds
            news.record["seconds"] |= {"archive": archived - before, "publish": publisher.publish_seconds}
            loop.call_soon_threadsafe(self._reporter.submit, news)

        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(work)
                for work in (reader.run(), publisher.run(), self._reporter.run(), self._stop_when_asked())
            ]
            try:
                await self._in_training(session.run, publish, report)
                await self._reporter.deliver(self._lifecycle)
                if not self._lifecycle.stopping.is_set():  # else it is published when the run goes on
                    await self._unless_stopping(publisher.drain())
                    await self._guard()
            finally:
                session.log.stop()
                for task in background:
                    task.cancel()
        step, steps = session.learner.step_count, session.learner.settings.training.steps
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await self._reporter.report("finished" if step >= steps else "stopped")
        log.info("%s at step %d", "finished" if step >= steps else "stopped", step)

    async def _unless_stopping(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for `work`, but no longer than until the process shall stop: a full disk may hold it up for ever."""
        stopping: asyncio.Task[Any] = asyncio.create_task(self._lifecycle.stopping.wait())
        tasks = [asyncio.create_task(work), stopping]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _guard(self) -> None:
        """Keep the log until the last evaluation is done, too: only a learner can rebuild it when Redis is lost."""
        while not self._lifecycle.stopping.is_set():
            await self._reporter.report("finished")
            if (await self._control.status())["state"] == "finished":
                return
            await self._lifecycle.sleep(REPORT_SECONDS)

    async def _stop_when_asked(self) -> None:
        """Stop the training thread at its next step boundary."""
        await self._lifecycle.stopping.wait()
        self._session.log.stop()

    async def _base_policy(self) -> Any:
        loop, last = asyncio.get_running_loop(), [0.0]

        def say(text: str) -> None:
            if time.monotonic() - last[0] >= 0.5:
                last[0] = time.monotonic()
                asyncio.run_coroutine_threadsafe(self._say(text), loop)

        def progress(phase: str, step: int, limit: int) -> None:
            say(f"warm-starting the base policy: {phase} demonstrations, step {step} (limit {limit})")

        self._lifecycle.wait_for("start", "the base policy")
        return await asyncio.to_thread(base_policy, self._config, progress, say)

    async def _say(self, text: str) -> None:
        await self._control.learner_report(
            api.LearnerReport(state="starting", step=0, cursor=0, ledger=Ledger().to_dict(), waiting_for=text)
        )
