"""The sampling loop: lease draws, sample their groups, score them, send them; evaluate held-out problems when asked.

leases      consumes free places in the engine; produces sampling tasks; waits for the control plane's pacing
groups      one task per draw: sample, score, send, wait for the final ack
heartbeat   every second, and after each weight swap: renews leases by the tokens sampled for them
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from protos.sapo.v1 import ingest_pb2 as pb
from sapo_learner.trajectory import Trajectory, TrajectoryGroup
from services.rollout.engines import Engine, Sampled, SampleRequest
from services.rollout.follower import Follower
from services.rollout.sender import GroupSender
from services.runtime import api
from services.runtime.client import ControlPlaneClient
from services.runtime.metrics import RolloutMetrics
from services.runtime.settings import RunConfig
from services.tasks import Problem, Response, Task

log = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 1.0
DRAIN_SECONDS = 5.0


class Worker:
    def __init__(
        self,
        name: str,
        config: RunConfig,
        engine: Engine,
        tokenizer: Any,
        task: Task,
        control: ControlPlaneClient,
        sender: GroupSender,
        metrics: RolloutMetrics,
    ) -> None:
        self.name, self._config, self._engine, self._tokenizer, self._task = name, config, engine, tokenizer, task
        self._control, self._sender, self._metrics = control, sender, metrics
        self.follower: Follower  # set by the service: it needs `beat` to confirm
        self._capacity = max(1, config.engine.slots // config.sampling.group_size)
        self._groups: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._progress: dict[tuple[int, int], int] = {}
        self._freed = asyncio.Event()
        self._evaluating = False
        self._waiting_for = ""
        self._tokens = self._mixed = 0
        self._rate = (time.monotonic(), 0)

    async def lease_forever(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            await self._wait_for_room()
            asked = time.monotonic()
            request = self._request(self._capacity - len(self._groups), evaluate=not self._evaluating)
            response = await self._control.lease(request)
            if not self._groups and not self._evaluating:
                self._metrics.waiting.labels(response.waiting_for or "lease").inc(time.monotonic() - asked)
            self._waiting_for = response.waiting_for
            self.follower.hint(response.version)
            for draw in response.draws:
                key = (draw.draw, draw.attempt)
                self._progress[key] = 0
                self._groups[key] = tasks.create_task(self._group(draw))
            if response.evaluation:
                self._evaluating = True
                tasks.create_task(self._evaluate(response.evaluation))

    async def drain(self) -> None:
        """Finish what can be finished soon, hand the rest back."""
        if self._groups:
            await asyncio.wait(self._groups.values(), timeout=DRAIN_SECONDS)
        left = [api.LeaseProgress(draw=draw, attempt=attempt, tokens=0) for draw, attempt in self._groups]
        for task in self._groups.values():
            task.cancel()
        if left:
            log.info("handing back %d leases", len(left))
            await self._control.release(api.ReleaseRequest(worker=self.name, leases=left))

    async def heartbeat_forever(self) -> None:
        while True:
            await self.beat()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def beat(self) -> None:
        """Report, renew leases by their progress, and hear of new versions and lost leases."""
        progress = [api.LeaseProgress(draw=k[0], attempt=k[1], tokens=n) for k, n in self._progress.items()]
        for each in progress:
            self._progress[each.draw, each.attempt] = 0
        policy, health = self._engine.policy_version, await self._engine.health()
        response = await self._control.heartbeat(
            api.Heartbeat(
                worker=self.name, version=policy.version, step=policy.step, rows=health.rows, tokens=health.tokens,
                tokens_per_second=self._tokens_per_second(health.tokens), busy=self._engine.busy_intervals(),
                leases=progress, waiting_for="" if self._groups or self._evaluating else self._waiting_for or "lease", mixed_version_responses=self._mixed,
            )
        )  # fmt: skip
        self.follower.hint(response.version)
        for each in response.lost:
            task = self._groups.get((each.draw, each.attempt))
            # A group on its way to ingest may have been accepted in this moment: only sampling is worth stopping.
            if task and not task.done() and (each.draw, each.attempt) in self._progress:
                log.info("lease of draw %d lost: sampling stopped", each.draw)
                task.cancel()

    async def _wait_for_room(self) -> None:
        while len(self._groups) >= self._capacity:
            self._freed.clear()
            await self._freed.wait()

    async def _group(self, leased: api.LeasedDraw) -> None:
        key = (leased.draw, leased.attempt)
        try:
            prompt_ids, sampled = await self._sample(leased.problem, leased.seed, self._config.sampling.group_size, key)
            self._progress.pop(key, None)
            group = self._build(leased, prompt_ids, sampled)
            ack = await self._sender.send(group)
            status = pb.Ack.Status.Name(ack.status).removeprefix("STATUS_").lower()
            self._metrics.groups.labels(status).inc()
            if ack.status == pb.Ack.STATUS_INVALID:
                log.error("ingest refused draw %d: %s", leased.draw, ack.reason)
        finally:
            self._progress.pop(key, None)
            self._groups.pop(key, None)
            self._freed.set()

    def _build(self, leased: api.LeasedDraw, prompt_ids: list[int], sampled: Sequence[Sampled]) -> TrajectoryGroup:
        trajectories = []
        for each in sampled:
            self._metrics.response_tokens.observe(len(each.token_ids))
            if len(each.spans) > 1:
                self._mixed += 1
                self._metrics.mixed.inc()
            trajectories.append(
                Trajectory(
                    token_ids=np.array(each.token_ids, np.int32),
                    behaviour_logprobs=np.array(each.logprobs, np.float32),
                    loss_mask=np.ones(len(each.token_ids), np.bool_),
                    spans=tuple(each.spans),
                    rewards=self._score(leased.problem, each),
                    finish_reason=each.finish_reason,
                )
            )
        return TrajectoryGroup(
            draw=leased.draw, attempt=leased.attempt, task=self._task.name, prompt_id=leased.problem.id,
            epoch=leased.epoch, seed=leased.seed, prompt_ids=np.array(prompt_ids, np.int32),
            trajectories=tuple(trajectories), sampling=self._config.sampling.parameters(),
            engine=self._engine.name, worker=self.name,
        )  # fmt: skip

    async def _sample(
        self, problem: api.ProblemBody, seed: int, count: int, key: tuple[int, int] | None
    ) -> tuple[list[int], list[Sampled]]:
        """`count` responses to a problem; the tokens count as progress of the lease `key`."""
        prompt_ids: list[int] = self._tokenizer.encode(problem.prompt)
        seeds = np.random.SeedSequence(seed).generate_state(count, np.uint64).tolist()
        prefix = f"{problem.id}/{next(_REQUESTS)}"
        requests = [
            SampleRequest(f"{prefix}/{index}", prompt_ids, each, self._config.sampling.max_tokens,
                          self._config.sampling.temperature)
            for index, each in enumerate(seeds)
        ]  # fmt: skip
        async with asyncio.TaskGroup() as group:
            responses = [group.create_task(self._respond(request, key)) for request in requests]
        return prompt_ids, [each.result() for each in responses]

    async def _respond(self, request: SampleRequest, key: tuple[int, int] | None) -> Sampled:
        sampled = Sampled()
        async for delta in self._engine.generate(request):
            sampled.add(delta)
            self._tokens += len(delta.token_ids)
            self._metrics.tokens.inc(len(delta.token_ids))
            if key in self._progress:
                self._progress[key] += len(delta.token_ids)
        return sampled

    def _score(self, problem: api.ProblemBody, sampled: Sampled) -> dict[str, float]:
        text = self._tokenizer.decode(sampled.token_ids, skip_special_tokens=True)
        return self._task.score(_problem(problem), Response(text, sampled.finish_reason))

    async def _evaluate(self, first: api.EvaluationChunk) -> None:
        """Answer chunks under the version they are pinned to, until there is none left for this worker.

        The pin lasts from the first to the last: were the weights to move on in between, the evaluation would have to
        start over. If they have moved on already, the chunk is left to others.
        """
        chunk: api.EvaluationChunk | None = first
        try:
            with self.follower.pinned():
                while chunk and chunk.version == self._engine.policy_version.version:
                    await self._control.evaluated(await self._answers(chunk))
                    chunk = (await self._control.lease(self._request(0, evaluate=True, wait_seconds=0))).evaluation
        finally:
            self._evaluating = False

    def _request(self, count: int, *, evaluate: bool, wait_seconds: float = 10) -> api.LeaseRequest:
        policy = self._engine.policy_version
        return api.LeaseRequest(
            worker=self.name, count=count, version=policy.version, step=policy.step, evaluate=evaluate,
            wait_seconds=wait_seconds,
        )  # fmt: skip

    async def _answers(self, chunk: api.EvaluationChunk) -> api.ChunkResult:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._sample(problem, chunk.seed + index, chunk.samples, None))
                for index, problem in enumerate(chunk.problems)
            ]
        answers = [task.result()[1] for task in tasks]
        correct = [
            sum(self._score(problem, each)["correct"] == 1 for each in sampled)
            for problem, sampled in zip(chunk.problems, answers, strict=True)
        ]
        return api.ChunkResult(
            worker=self.name, evaluation=chunk.evaluation, chunk=chunk.chunk, version=chunk.version, correct=correct,
            samples=chunk.samples * len(chunk.problems),
            tokens=sum(len(each.token_ids) for sampled in answers for each in sampled),
            examples=[self._tokenizer.decode(sampled[0].token_ids, skip_special_tokens=True) for sampled in answers],
        )  # fmt: skip

    def _tokens_per_second(self, tokens: int) -> float:
        now, (then, before) = time.monotonic(), self._rate
        if now - then >= HEARTBEAT_SECONDS / 2:
            self._rate = (now, tokens)
            self._last_rate = (tokens - before) / (now - then)
        return getattr(self, "_last_rate", 0.0)


_REQUESTS = itertools.count()


def _problem(body: api.ProblemBody) -> Problem:
    return Problem(body.id, body.prompt, body.answer)
