"""ControlPlane: what the routes call. All state that must survive is in the run store, on disk, or both."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from sapo_learner.ledger import Ledger
from sapo_learner.manifest import Manifest
from services.control_plane.evaluations import Evaluation, Evaluations
from services.control_plane.policies import Policies
from services.control_plane.record import Record
from services.control_plane.sampler import PlainSampler
from services.runstore import Pacing, RunStore
from services.runtime import api
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.settings import RunConfig
from services.tasks import build

WORKER_TTL_SECONDS = 10.0
POLL_SECONDS = 0.1  # how soon a waiting lease request sees what no event announces (an append, an expiry)


class ControlPlane:
    def __init__(self, config: RunConfig, store: RunStore, token: int, metrics: ControlPlaneMetrics) -> None:
        self.config, self._store, self._token, self._metrics = config, store, token, metrics
        directory = config.run.directory
        self.policies = Policies(store, directory / "snapshots", keep=config.snapshots_kept)
        self.record = Record(directory / "record.jsonl")
        task = build(config.task)
        self._sampler = PlainSampler(task.problems("train"), config.run.seed)
        self.evaluations = Evaluations(task.problems("held_out"), config.run.seed)
        self._serving: dict[str, tuple[int, int, float]] = {}  # worker -> version, step, when it said so
        self._changed = asyncio.Condition()
        self._events = 0
        self.learner = api.LearnerReport(state="not started", step=0, cursor=0, ledger=Ledger().to_dict())
        self._closing = False
        training = config.training
        self._pacing = Pacing(
            groups_per_step=training.groups_per_step,
            lookahead=config.lookahead,
            max_policy_age=training.max_policy_age,
            steps=training.steps,
            lease_seconds=config.pacing.lease_seconds,
            max_lease_seconds=config.pacing.max_lease_seconds,
        )

    async def open(self) -> None:
        await self.policies.open(self._token)
        documents = await self._store.documents("evaluations")
        self.evaluations.open = [Evaluation.model_validate_json(text) for _, text in sorted(documents.items())]
        report = (await self._store.documents("learner")).get("report")
        if report:
            self.learner = api.LearnerReport.model_validate_json(report)
        self.record.add("session")

    # ---- leases

    async def lease(self, request: api.LeaseRequest) -> api.LeaseResponse:
        """Evaluation first, then draws; waits until there is something to give, or the request's time is over."""
        deadline = time.monotonic() + request.wait_seconds
        while True:
            seen = self._events
            # A heartbeat since may have confirmed a newer policy than the waiting request names.
            version, step, _ = max((request.version, request.step, 0.0), self._serving.get(request.worker, (0, 0, 0.0)))
            chunk = await self._claim(request.worker, version, step) if request.evaluate else None
            count = min(request.count, self._fair_share())
            grant = await self._store.grant(self._token, request.worker, count, step, self._pacing)
            if chunk or grant.leases or self._closing or time.monotonic() >= deadline:
                break
            await self._wait_for_event(seen, min(POLL_SECONDS, deadline - time.monotonic()))
        current = await self._store.current()
        self._metrics.leases.inc(len(grant.leases))
        return api.LeaseResponse(
            draws=[self._leased(lease.draw, lease.attempt) for lease in grant.leases],
            evaluation=chunk,
            waiting_for=grant.waiting_for or "",
            version=current.version if current else 0,
        )

    async def release(self, request: api.ReleaseRequest) -> None:
        await self._store.release(request.worker, [(each.draw, each.attempt) for each in request.leases])
        await self._notify()

    async def heartbeat(self, beat: api.Heartbeat) -> api.HeartbeatResponse:
        self._serving[beat.worker] = (beat.version, beat.step, time.monotonic())
        if beat.busy:
            self.record.add("busy", worker=beat.worker, intervals=beat.busy)
        report = beat.model_copy(update={"busy": [], "leases": []})
        await self._store.heartbeat(beat.worker, report.model_dump_json(), WORKER_TTL_SECONDS)
        lost = await self._store.renew(beat.worker, [(each.draw, each.attempt, each.tokens) for each in beat.leases])
        current = await self._store.current()
        return api.HeartbeatResponse(
            version=current.version if current else 0,
            lost=[api.LeaseProgress(draw=draw, attempt=attempt, tokens=0) for draw, attempt in lost],
        )

    def _leased(self, number: int, attempt: int) -> api.LeasedDraw:
        draw = self._sampler.draw(number)
        problem = api.ProblemBody(id=draw.problem.id, prompt=draw.problem.prompt, answer=draw.problem.answer)
        return api.LeasedDraw(draw=number, attempt=attempt, epoch=draw.epoch, seed=draw.seed, problem=problem)

    def _alive(self) -> dict[str, tuple[int, int]]:
        """Version and step by name of every worker heard of lately."""
        since = time.monotonic() - WORKER_TTL_SECONDS
        self._serving = {name: each for name, each in self._serving.items() if each[2] > since}
        return {name: (version, step) for name, (version, step, _) in self._serving.items()}

    def _fair_share(self) -> int:
        """Most draws one request gets, so that no worker takes a whole step's while others idle."""
        return math.ceil(self.config.training.groups_per_step / max(1, len(self._alive())))

    # ---- evaluation

    async def _claim(self, worker: str, version: int, step: int) -> api.EvaluationChunk | None:
        if not self.evaluations.open:
            return None
        serving = {name: version for name, (version, _) in self._alive().items()}
        chunk = self.evaluations.claim(worker, version, step, serving)
        if chunk:
            await self._save_evaluations()
        return chunk

    async def evaluated(self, result: api.ChunkResult) -> None:
        finished = self.evaluations.complete(result)
        if finished:
            self.record.add("evaluation", **finished.summary(self.evaluations.problems))
            await self._store.delete_document(self._token, "evaluations", finished.id)
        await self._save_evaluations()
        await self._notify()

    async def _save_evaluations(self) -> None:
        kept = {each.id for each in self.evaluations.open}
        for identifier in await self._store.documents("evaluations"):
            if identifier not in kept:
                await self._store.delete_document(self._token, "evaluations", identifier)
        for each in self.evaluations.open:
            await self._store.save_document(self._token, "evaluations", each.id, each.model_dump_json())

    async def _schedule_evaluation(self, step: int) -> None:
        settings, last_step = self.config.evaluation, self.config.training.steps
        boundary = step in (0, last_step)
        earlier = [line["step"] for line in self.record.recent.get("evaluation", [])]
        earlier += [each.after_step for each in self.evaluations.open]
        due = boundary or step // settings.every > max((each // settings.every for each in earlier), default=-1)
        if due and step not in earlier:
            samples = settings.boundary_samples if boundary else settings.samples
            self.evaluations.schedule(step, samples=samples, boundary=boundary)
            await self._save_evaluations()

    # ---- policies and the learner

    async def publish(self, request: api.PublishRequest) -> api.PublishResponse:
        manifest = Manifest.model_validate(request.manifest)
        if request.facts:
            await self._store.set_facts(request.token, request.facts)
        published = await self.policies.publish(request.token, manifest)
        if published.changed:
            self._metrics.version.set(published.version)
            await self._schedule_evaluation(manifest.step)
            await self.policies.prune(self.evaluations.pinned)
            await self._notify()
        return api.PublishResponse(version=published.version, changed=published.changed)

    async def learner_reports(self, report: api.LearnerReport) -> None:
        self.learner = report.model_copy(update={"record": None})
        if report.record is not None:
            self.record.add(report.record.pop("kind"), **report.record)
        await self._store.save_document(self._token, "learner", "report", self.learner.model_dump_json())
        await self._notify()

    # ---- what people and scripts ask

    async def workers(self) -> list[dict[str, Any]]:
        """The last heartbeat of every worker that is alive, with its age."""
        return [
            json.loads(each.report_json) | {"age_seconds": each.age_seconds} for each in await self._store.workers()
        ]

    async def status(self) -> dict[str, Any]:
        state = await self._store.state()
        steps = self.config.training.steps
        evaluations = [
            {key: value for key, value in line.items() if key != "examples"}
            for line in self.record.recent.get("evaluation", [])
        ]
        state_name = self.learner.state
        if state_name == "finished" and (self.evaluations.open or not any(e["step"] == steps for e in evaluations)):
            state_name = "evaluating"
        return {
            "run": self.config.run.name,
            "state": state_name,
            "steps": steps,
            "learner": self.learner.model_dump(),
            "last_step": self.record.last("step"),
            "evaluations": evaluations[-50:],
            "evaluating": [{"id": each.id, "version": each.version} for each in self.evaluations.open],
            "workers": await self.workers(),
            "version": state.published_version,
            "published_step": state.published_step,
            "accepted": state.sequence,
            "unread": state.unread_entries,
            "groups_ready": state.sequence - self.learner.cursor,
            "open_leases": len(state.leases),
            "reoffered": len(state.reoffered),
            "oldest_lease_seconds": state.oldest_lease_seconds,
        }

    async def ledger(self) -> dict[str, Any]:
        """The ledger as far as it can be told without the archive: counts, and draws as a sum."""
        learner, state = self.learner, await self._store.state()
        counts = Ledger.from_dict(learner.ledger)
        backlog = state.sequence - learner.cursor
        open_draws = len(state.leases) + len(state.reoffered)
        problems = []
        if counts.consumed != learner.cursor:
            problems.append(f"outcomes sum to {counts.consumed}, but the learner has consumed {learner.cursor} entries")
        if state.next_draw - open_draws != state.sequence:
            problems.append(
                f"{state.next_draw} draws less {open_draws} open ones are not the {state.sequence} accepted"
            )
        return {
            "accepted": state.sequence, **learner.ledger, "backlog": backlog, "open_draws": open_draws,
            "problems": problems, "balanced": not problems,
        }  # fmt: skip

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The current version whenever anything changed, until the process closes."""
        while not self._closing:
            seen = self._events
            current = await self._store.current()
            yield {"version": current.version if current else None, "step": self.learner.step}
            await self._wait_for_event(seen, 15.0)

    async def close(self) -> None:
        self._closing = True
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._events += 1
            self._changed.notify_all()

    async def _wait_for_event(self, seen: int, seconds: float) -> None:
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._events != seen), max(seconds, 0.001))
            except TimeoutError:
                return
