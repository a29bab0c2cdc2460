"""The sampling loop: lease draws, sample their groups, score them, send them; evaluate held-out problems when asked.

leases      consumes free places in the engine; produces group tasks; waits for the control plane's pacing
groups      one task per draw: sample, score, wait until the policy is proved, send, wait for the final ack
heartbeat   every second, and after each weight swap: renews leases by the tokens sampled for them, watches the engine

A lost lease ends its group's sampling, nothing else. Any other error in a group (a dead engine) ends the process: the
message says why, and the draw is offered again when its lease runs out. What a score that fails does, `scoring` says.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from protos.sapo.v1 import ingest_pb2 as pb
from sapo_learner.errors import InvalidTrajectory, SapoError
from sapo_learner.probe import ProbeResult
from sapo_learner.trajectory import Trajectory, TrajectoryGroup
from services.rollout.engine_watch import EngineWatch
from services.rollout.engines import Engine, Sampled
from services.rollout.evaluator import Evaluator
from services.rollout.follower import Follower
from services.rollout.responder import Responder, ended
from services.rollout.sender import GroupSender, Key
from services.runtime import api
from services.runtime.client import ControlPlaneClient
from services.runtime.logging import about
from services.runtime.metrics import RolloutMetrics
from services.runtime.settings import RunConfig
from services.runtime.tracing import new_traceparent, trace_id

log = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 1.0
WAIT_SECONDS = 10.0
DRAIN_SECONDS = 5.0  # for groups that are nearly done, and again for handing back the others
MAX_ASKED = 4096  # draws per request, as the API bounds it
EXAMPLE_CHARACTERS = 200  # of a prompt or response in a note
MAX_INVALID = 3  # groups in a row that ingest refuses as malformed: one may be bad luck, three are this worker


@dataclass
class _Lease:
    """A draw being worked on. tokens: sampled since the last renewal. sampled: only scoring or the ack is missing.
    sent: ingest may have accepted it."""

    draw: api.LeasedDraw
    traceparent: str
    task: asyncio.Task[None]
    tokens: int = 0
    sampled: bool = False
    sent: bool = False


class Worker:
    def __init__(
        self,
        name: str,
        config: RunConfig,
        engine: Engine,
        responder: Responder,
        follower: Follower,
        control: ControlPlaneClient,
        sender: GroupSender,
        metrics: RolloutMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self._config, self._engine, self._responder = name, config, engine, responder
        self._follower, self._control, self._sender, self._metrics = follower, control, sender, metrics
        self._evaluator = Evaluator(name, engine, responder, follower, control, config.engine.slots)
        self.capacity = max(1, config.engine.slots // config.sampling.group_size)  # groups at once
        self._leases: dict[Key, _Lease] = {}
        self._evaluation: asyncio.Task[None] | None = None
        self._freed = asyncio.Event()
        self._clock, self._idle_since = clock, clock()
        self._waiting_for = ""
        self._mixed = self._invalid = 0
        self._notes: list[str] = []
        self._hopeless: int | None = 0  # groups so far without a correct response; None once that is settled
        self._told, _ = responder.failures  # an earlier worker has told of those
        self._watch = EngineWatch(clock)
        self._beating = asyncio.Lock()  # a later report must not arrive first

    # ---- leases

    async def lease_forever(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            while len(self._leases) >= self.capacity:
                self._freed.clear()
                await self._freed.wait()
            asked = self._clock()
            response = await self._control.lease(self._request())
            self._waiting_for = response.waiting_for
            if not self._working:
                waited = self._clock() - max(asked, self._idle_since)
                self._metrics.waiting.labels(response.waiting_for or "lease").inc(waited)
            self._follower.hint(response.version)
            for draw in response.draws:
                self._start(draw, tasks)
            if response.evaluation:
                self._evaluation = tasks.create_task(self._evaluator.answer(response.evaluation))
                self._evaluation.add_done_callback(lambda _: self._evaluated())

    @property
    def _working(self) -> bool:
        return bool(self._leases) or self._evaluation is not None

    def _request(self) -> api.LeaseRequest:
        policy, count = self._engine.policy_version, min(self.capacity - len(self._leases), MAX_ASKED)
        free = self._evaluation is None
        return api.LeaseRequest(
            worker=self.name, count=count, version=policy.version, step=policy.step, evaluate=free,
            # Not for long while evaluating: the next evaluation is only heard of by the request after this one.
            wait_seconds=WAIT_SECONDS if free else 1,
        )  # fmt: skip

    def _start(self, draw: api.LeasedDraw, tasks: asyncio.TaskGroup) -> None:
        key = (draw.draw, draw.attempt)
        traceparent = new_traceparent()
        with about(draw=draw.draw, attempt=draw.attempt, worker=self.name, trace_id=trace_id(traceparent)):
            self._leases[key] = _Lease(draw, traceparent, tasks.create_task(self._work_on(key)))
            log.debug("draw %d leased", draw.draw)
        # Not in the task's own finally: a task that is cancelled before its first step never gets there.
        self._leases[key].task.add_done_callback(lambda _: self._free(key))

    def _free(self, key: Key) -> None:
        del self._leases[key]
        self._idle_since = self._clock()
        self._freed.set()

    def _evaluated(self) -> None:
        self._evaluation = None
        self._idle_since = self._clock()

    async def drain(self) -> None:
        """Finish what can be finished soon, hand the rest back."""
        log.info("leaving with %d leases: what is not done soon is handed back", len(self._leases))
        if self._evaluation:
            self._evaluation.cancel()
        if self._leases:
            await asyncio.wait([each.task for each in self._leases.values()], timeout=DRAIN_SECONDS)
        left = [api.LeaseProgress(draw=draw, attempt=attempt, tokens=0) for draw, attempt in self._leases]
        for lease in self._leases.values():
            lease.task.cancel()
        if left:
            log.info("handing back %d leases", len(left))
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                if self._responder.failures[0] != self._told:
                    with contextlib.suppress(SapoError):  # handing back matters more
                        await self.beat()
                await self._control.release(api.ReleaseRequest(worker=self.name, leases=left, leaving=True))
        except (SapoError, TimeoutError) as error:
            log.warning("leases not handed back, they will run out: %s", error or "no answer")

    # ---- heartbeat

    async def heartbeat_forever(self) -> None:
        while True:
            await self.beat()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def beat(self) -> None:
        """Report, renew leases by their progress, hear of new versions and lost leases. Raises for a dead engine."""
        async with self._beating:
            health = await self._engine.health()
            rate, policy = self._watch.look(health), self._engine.policy_version
            failures, last = self._responder.failures
            new = failures - self._told
            response = await self._control.heartbeat(
                api.Heartbeat(
                    worker=self.name, version=policy.version, step=policy.step, rows=health.rows, tokens=health.tokens,
                    tokens_per_second=rate, busy=self._engine.busy_intervals(), leases=self._take_progress(),
                    waiting_for="" if self._working else self._waiting_for or "lease",
                    mixed_version_responses=self._mixed, notes=self._notes, probe=_figures(self._follower.probe),
                    unscored=api.Unscored(reasons=new, last=last) if new else None,
                )
            )  # fmt: skip
            self._told = failures
        self._follower.hint(response.version)
        for each in response.lost:
            lease = self._leases.get((each.draw, each.attempt))
            # A group on its way to ingest may have been accepted in this moment.
            if lease and not lease.sent:
                fields = {"draw": each.draw, "attempt": each.attempt, "trace_id": trace_id(lease.traceparent)}
                log.info("lease of draw %d lost: sampling stopped", each.draw, extra=fields)
                lease.task.cancel()

    @contextlib.asynccontextmanager
    async def last_words(self) -> AsyncIterator[None]:
        """A worker whose engine computes something else says so before it ends, for its own metrics end unread; and
        hands back what it holds."""
        try:
            yield
        finally:
            if self._follower.missed:
                leaving = api.ReleaseRequest(worker=self.name, leases=[], leaving=True, probe_missed=True)
                with contextlib.suppress(SapoError, TimeoutError):
                    async with asyncio.timeout(DRAIN_SECONDS):
                        await self._control.release(leaving)

    def _take_progress(self) -> list[api.LeaseProgress]:
        """Tokens per lease since the last time. What is sampled keeps its lease while it is scored, however slowly, and
        while ingest cannot take it: sampling it again would help nobody."""
        progress = []
        for (draw, attempt), lease in self._leases.items():
            tokens = 1 if lease.sampled else lease.tokens
            progress.append(api.LeaseProgress(draw=draw, attempt=attempt, tokens=tokens))
            lease.tokens = 0
        return progress

    # ---- groups

    async def _work_on(self, key: Key) -> None:
        lease = self._leases[key]
        draw = lease.draw

        def progress(tokens: int) -> None:
            lease.tokens += tokens

        # Once: a template may write something else the next time, such as the date.
        prompt_ids, count = self._responder.encode(draw.task, draw.prompt), self._config.sampling.group_size
        sampled = await self._responder.respond(draw.task, draw.prompt, draw.seed, count, progress, prompt_ids)
        lease.sampled = True
        log.debug("draw %d sampled: %d tokens", draw.draw, sum(len(each.token_ids) for each in sampled))
        rewards = await self._responder.rewards(draw.task, draw.prompt, sampled)
        await self._follower.proved(max((span.version for each in sampled for span in each.spans), default=-1))
        self._observe(sampled)
        self._look_for_success(draw, sampled, rewards)
        lease.sent = True
        trajectories = [_trajectory(*each) for each in zip(sampled, rewards, strict=True)]
        group = self._group(lease, prompt_ids, trajectories)
        log.debug("draw %d scored: it is sent", draw.draw)
        self._settle(await self._sender.send(group))

    def _look_for_success(
        self, draw: api.LeasedDraw, sampled: Sequence[Sampled], rewards: Sequence[dict[str, float]]
    ) -> None:
        """Say so once, with an example, when a whole step's worth of groups has no correct response."""
        if self._hopeless is None:
            return
        if any(self._responder.correct(draw.task, each) for each in rewards):
            self._hopeless = None
            return
        self._hopeless += 1
        if self._hopeless == self._config.training.groups_per_step:
            note = (
                f"no response to the first {self._hopeless} prompts is correct; for example {_short(draw.prompt.text)} "
                f"was answered {_short(self._responder.text(sampled[0]))}, expected {_short(draw.prompt.answer)}: "
                "is that the format the task looks for?"
            )
            log.warning("%s", note)
            self._notes.append(note)
            self._hopeless = None

    def _group(self, lease: _Lease, prompt_ids: list[int], trajectories: list[Trajectory]) -> TrajectoryGroup:
        draw = lease.draw
        return TrajectoryGroup(
            draw=draw.draw, attempt=draw.attempt, task=draw.task, prompt_id=draw.prompt.id,
            epoch=draw.epoch, seed=draw.seed, prompt_ids=np.array(prompt_ids, np.int32),
            trajectories=tuple(trajectories), sampling=self._config.sampling.parameters(),
            engine=self._engine.name, worker=self.name, traceparent=lease.traceparent,
        )  # fmt: skip

    def _observe(self, sampled: Sequence[Sampled]) -> None:
        for each in sampled:
            self._metrics.response_tokens.observe(len(each.token_ids))
            self._metrics.responses.labels(ended(each)).inc()
        mixed = sum(len(each.spans) > 1 for each in sampled)
        self._metrics.mixed.inc(mixed)
        self._mixed += mixed

    def _settle(self, ack: pb.Ack) -> None:
        status = pb.Ack.Status.Name(ack.status).removeprefix("STATUS_").lower()
        self._metrics.groups.labels(status).inc()
        self._invalid = self._invalid + 1 if ack.status == pb.Ack.STATUS_INVALID else 0
        if self._invalid:
            log.error("ingest refused draw %d: %s", ack.draw, ack.reason)
        else:
            level = logging.DEBUG if ack.status == pb.Ack.STATUS_ACCEPTED else logging.INFO
            with about(entry=ack.entry_id):
                log.log(level, "%s", ack.reason or f"draw {ack.draw} is entry {ack.entry_id} of the log")
        if self._invalid >= MAX_INVALID:
            raise InvalidTrajectory(f"ingest refused {self._invalid} groups in a row, the last: {ack.reason}")


def _figures(probe: ProbeResult | None) -> api.ProbeFigures | None:
    return api.ProbeFigures(max=probe.max_abs_difference, mean=probe.mean_abs_difference) if probe else None


def _short(text: str) -> str:
    return repr(text if len(text) <= EXAMPLE_CHARACTERS else f"{text[:EXAMPLE_CHARACTERS]} ...")


def _trajectory(sampled: Sampled, rewards: dict[str, float]) -> Trajectory:
    return Trajectory(
        token_ids=np.array(sampled.token_ids, np.int32),
        behaviour_logprobs=np.array(sampled.logprobs, np.float32),
        loss_mask=np.array(sampled.loss_mask, np.bool_),
        spans=tuple(sampled.spans),
        rewards=rewards,
        finish_reason=ended(sampled),
    )
