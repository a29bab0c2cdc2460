"""ControlPlane: what the routes call. All state that must survive is in the run store, on disk, or both.

Memory is a copy that is written through. `open` reads it back after a restart; `watch` writes it back into a Redis that
was lost in mid-run.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from sapo_learner.config import parse
from sapo_learner.errors import ConfigError, Unavailable
from sapo_learner.ledger import Ledger
from sapo_learner.manifest import Manifest
from services.control_plane import overview, unscored, writer_threads
from services.control_plane.dashboard.groups import KeptGroups
from services.control_plane.dashboard.history import History
from services.control_plane.evaluation_files import EvaluationFiles
from services.control_plane.evaluation_parts import summary
from services.control_plane.evaluations import Evaluations
from services.control_plane.fence import our_fence
from services.control_plane.pacing import pacing_of
from services.control_plane.policies import Policies
from services.control_plane.record import Record
from services.control_plane.sampler import Mixture, PlainSampler
from services.control_plane.workers import TTL_SECONDS, Workers
from services.runstore import Grant, RunStore
from services.runtime import api
from services.runtime.lifecycle import Lifecycle
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.settings import RunConfig
from services.tasks import build, build_all

# How soon a waiting lease request sees what no event announces (an append, an expiry), while at most WAITERS wait; with
# more it takes longer, so that waiting costs Redis the same.
POLL_SECONDS, WAITERS = 0.1, 8
WATCH_SECONDS = 2.0
HOLD_SECONDS = 5.0  # below every client's time limit


async def _never() -> bool:
    return False


class ControlPlane:
    def __init__(self, config: RunConfig, store: RunStore, token: int, metrics: ControlPlaneMetrics) -> None:
        self.config, self._store, self._token, self._metrics = config, store, token, metrics
        directory, training = config.run.directory, config.training
        self.policies = Policies(
            store, token, directory / "snapshots", keep=config.snapshots_kept, max_policy_age=training.max_policy_age,
            steps_back=(config.checkpoint.keep + 1) * config.checkpoint.every,  # the oldest goes when a newer is there
        )  # fmt: skip
        self.history, self.groups = History(), KeptGroups(directory / "groups")
        self._writers = writer_threads.started(config, metrics)
        self.record = Record(directory / "record.jsonl", self.history.hear, [each.put for each in self._writers])
        tasks, mixture = build_all(config.mixture), Mixture(config.mixture, training.groups_per_step)
        prompts = {label: task.prompts("train") for label, task in tasks.items()}
        self._sampler = PlainSampler(prompts, mixture, config.run.seed)
        held_out = {label: task.prompts("held_out") for label, task in tasks.items()}
        suites = [(each, each.prompts(build(each.task_settings))) for each in config.evaluation.suites]
        self.evaluations = Evaluations(
            held_out, config.run.seed, config.evaluation, last_step=training.steps, suites=suites
        )
        self._files = EvaluationFiles(directory / "evaluations", config.evaluation.kept)
        self.workers = Workers()
        self._changed = asyncio.Event()  # set, and replaced, whenever something changes
        self._waiting = 0
        metrics.configured(config)
        self._left: dict[str, float] = {}  # worker -> when it went
        self.closing = False
        self.learner_heard: float | None = None  # time.monotonic of its last report
        self.learner = api.LearnerReport(state="not started", step=0, cursor=0, ledger=Ledger().to_dict())
        self._pacing = pacing_of(config)

    async def open(self) -> None:
        """Go on where an earlier control plane ended, wherever that was."""
        await self.policies.open()
        documents = await self._store.documents("evaluations")
        self.evaluations.restore(documents.values(), self.record.recent.get("evaluation", []))
        current = await self._store.current()
        if current:
            await self._schedule_evaluation(current.step)
        report = (await self._store.documents("learner")).get("report")
        if report:
            self.learner = api.LearnerReport.model_validate_json(report)
        self.workers.restore(await self._store.workers())
        self.record.add("session")

    async def watch(self, lifecycle: Lifecycle) -> None:
        """Until the process stops: sweep expired leases, mend a lost Redis, observe. Raises Fenced by a newer one."""
        redis = lifecycle.peer("Redis")
        while not lifecycle.stopping.is_set():
            try:
                await self._store.grant(self._token, "", 0, 0, self._pacing)
                if await self.policies.reconcile(await self._store.state()):
                    await self._save_evaluations()
                    await self._save_learner_report()
                    self._notify()
                self._metrics.observe(await self.status(), await self.ledger(), await self.policies.disk_usage())
                redis(None)
            except Unavailable as error:
                redis(str(error))
            await lifecycle.sleep(WATCH_SECONDS)

    # ---- leases

    async def lease(self, request: api.LeaseRequest, gone: Callable[[], Awaitable[bool]] = _never) -> api.LeaseResponse:
        """Evaluation first, then draws; waits until there is something to give, or the request's time is over.

        gone: whether the worker has hung up; a lease that nobody hears of would block pacing until it expires.
        """
        asked = time.monotonic()
        deadline = asked + request.wait_seconds
        self.workers.hear(request.worker, request.version, request.step)
        chunk, grant = None, Grant([], None)

        async def left() -> bool:
            return self._left.get(request.worker, 0.0) > asked or await gone()

        while not (self.closing or await left()):
            changed = self._changed
            # A heartbeat since may have confirmed a newer policy than the waiting request names.
            serving = self.workers.alive().get(request.worker, request)
            if request.evaluate:
                chunk = await self._claim(request.worker, serving.version, serving.step)
            count = min(request.count, self.workers.fair_share(self._pacing.groups_per_step))
            with our_fence():
                grant = await self._store.grant(self._token, request.worker, count, serving.step, self._pacing)
            if grant.leases and await left():  # while it was granted
                await self._store.release(request.worker, [(lease.draw, lease.attempt) for lease in grant.leases])
                grant = Grant([], None)
                break
            if chunk or grant.leases or time.monotonic() >= deadline:
                break
            await self._wait_for_change(changed, deadline)
        current = await self._store.current()
        self._metrics.leases.inc(len(grant.leases))
        return api.LeaseResponse(
            draws=[self._leased(lease.draw, lease.attempt) for lease in grant.leases],
            evaluation=chunk,
            waiting_for=grant.waiting_for or "",
            version=current.version if current else 0,
        )

    async def release(self, request: api.ReleaseRequest) -> None:
        self._metrics.probe_misses.inc(request.probe_missed)
        leases = {(each.draw, each.attempt) for each in request.leases}
        if request.leaving:  # a grant may be on its way to it, or another one about to be made
            self._left[request.worker] = time.monotonic()
            held = (await self._store.state()).leases
            leases |= {(each.draw, each.attempt) for each in held if each.worker == request.worker}
        await self._store.release(request.worker, leases)
        self._notify()

    async def heartbeat(self, beat: api.Heartbeat) -> api.HeartbeatResponse:
        self.workers.hear(beat.worker, beat.version, beat.step)
        if beat.busy:
            self.record.add("busy", worker=beat.worker, intervals=beat.busy)
        if beat.unscored:
            unscored.add(self.record, beat.worker, beat.unscored)
        report = beat.model_copy(update={"busy": [], "leases": [], "unscored": None})
        await self._store.heartbeat(beat.worker, report.model_dump_json(), TTL_SECONDS)
        lost = await self._store.renew(beat.worker, [(each.draw, each.attempt, each.tokens) for each in beat.leases])
        current = await self._store.current()
        return api.HeartbeatResponse(
            version=current.version if current else 0,
            lost=[api.LeaseProgress(draw=draw, attempt=attempt, tokens=0) for draw, attempt in lost],
        )

    def _leased(self, number: int, attempt: int) -> api.LeasedDraw:
        draw = self._sampler.draw(number)
        return api.LeasedDraw(
            draw=number, attempt=attempt, epoch=draw.epoch, seed=draw.seed, task=draw.task, prompt=draw.prompt
        )

    # ---- evaluation

    async def _claim(self, worker: str, version: int, step: int) -> api.EvaluationChunk | None:
        if not self.evaluations.open:
            return None
        chunk = self.evaluations.claim(worker, version, step, self.workers.versions())
        if chunk:
            await self._save_evaluations()
        return chunk

    async def evaluated(self, result: api.ChunkResult) -> None:
        awaited = self.evaluations.awaiting(result)
        finished = self.evaluations.complete(result)
        if awaited:
            seed = self.evaluations.seed(awaited, result.chunk)
            self._files.add(awaited, self.evaluations.parts[result.chunk], seed, result)
        if finished:
            self.record.add("evaluation", **summary(finished, self.evaluations.parts))
            self.evaluations.finish(finished)
        await self._save_evaluations()
        self._notify()

    async def _schedule_evaluation(self, step: int) -> None:
        if self.evaluations.schedule(step):
            await self._save_evaluations()

    async def _save_evaluations(self) -> None:
        kept = {each.id: each.model_dump_json() for each in self.evaluations.open}
        with our_fence():
            for identifier in await self._store.documents("evaluations"):
                if identifier not in kept:
                    await self._store.delete_document(self._token, "evaluations", identifier)
            for identifier, text in kept.items():
                await self._store.save_document(self._token, "evaluations", identifier, text)

    # ---- policies and the learner

    async def publish(self, request: api.PublishRequest) -> api.PublishResponse:
        """Answers `held_for` while the policy must wait: the caller asks again."""
        manifest = parse(Manifest, request.manifest, where="manifest")
        with our_fence():
            await self._store.grant(self._token, "", 0, 0, self._pacing)  # nothing is registered by an older one
        if await self._held(manifest.step):
            return api.PublishResponse(held_for="the evaluation of the first policy")
        current = await self._store.current()
        if current is None or manifest.step > current.step:
            # Before it can be served: a worker that is a moment later may have left the first policy already.
            await self._schedule_evaluation(manifest.step)
        published = await self.policies.publish(request.token, manifest, request.facts)
        if published.changed:
            self.record.add("policy", version=published.version, step=manifest.step, digest=manifest.digest)
        self._notify()
        await self.policies.prune(self.evaluations.pinned)
        return api.PublishResponse(version=published.version, changed=published.changed)

    async def _held(self, step: int) -> bool:
        """Whether the current policy must stay so, for an evaluation that no later one can stand in for; waits a while
        for that to end."""
        deadline = time.monotonic() + HOLD_SECONDS
        while self.evaluations.holds(step):
            if self.closing or time.monotonic() >= deadline:
                return True
            await _wait(self._changed, deadline - time.monotonic())
        return False

    async def learner_reports(self, report: api.LearnerReport) -> None:
        fields = dict(report.record or {})
        if report.record is not None and not isinstance(fields.get("kind"), str):
            raise ConfigError("a record without its kind", where="learner report")
        self.learner, self.learner_heard = report.model_copy(update={"record": None}), time.monotonic()
        if fields:
            self.record.add(fields.pop("kind"), **fields)
        await self._save_learner_report()
        self._notify()

    async def _save_learner_report(self) -> None:
        with our_fence():
            await self._store.save_document(self._token, "learner", "report", self.learner.model_dump_json())

    # ---- what people and scripts ask

    async def status(self) -> dict[str, Any]:
        state, workers = await self._store.state(), await self._store.workers()
        return overview.status(self.config, self.learner, state, workers, self.evaluations, self.record)

    async def ledger(self) -> dict[str, Any]:
        return overview.ledger(self.learner, await self._store.state())

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The current version and the learner's step whenever they changed, until the process closes."""
        said: dict[str, Any] | None = None
        while not self.closing:
            changed = self._changed
            current = await self._store.current()
            event = {"version": current.version if current else None, "step": self.learner.step}
            if event != said:
                yield event
            said = event
            await _wait(changed, api.EVENT_SECONDS)

    async def close(self) -> None:
        """End every wait; requests are answered with what there is."""
        self.closing = True
        self.record.close()
        self._notify()
        await writer_threads.ended(self._writers)

    # ---- waiting

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait_for_change(self, changed: asyncio.Event, deadline: float) -> None:
        """Wait for an event, or until it is time to look again."""
        self._waiting += 1
        try:
            pause = POLL_SECONDS * max(1, self._waiting / WAITERS)
            await _wait(changed, min(pause, deadline - time.monotonic()))
        finally:
            self._waiting -= 1


async def _wait(changed: asyncio.Event, seconds: float) -> None:
    """Until the event or the time is over."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(seconds, 0.001)):
            await changed.wait()
