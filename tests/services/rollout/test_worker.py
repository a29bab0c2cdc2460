"""Leases become groups whose every field is true; lost leases, draining, pins and moved-on versions are handled."""

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from protos.sapo.v1 import ingest_pb2 as pb
from sapo_learner.errors import ConfigError, Corrupt, InvalidTrajectory, Unavailable
from sapo_learner.manifest import Probe
from sapo_learner.policy import tiny_policy
from sapo_learner.probe import draw_sequence, measure
from sapo_learner.trajectory import TrajectoryGroup, VersionSpan
from services.rollout.engine_watch import STALL_SECONDS, EngineWatch
from services.rollout.engines import EngineHealth, PolicyVersion, SampleRequest, TokenDelta
from services.rollout.engines.torch_engine import TorchEngine
from services.rollout.follower import Follower
from services.rollout.responder import Responder
from services.rollout.scoring import Scorer
from services.rollout.worker import MAX_INVALID, Worker
from services.runtime import api
from services.runtime.metrics import RolloutMetrics
from services.runtime.settings import RunConfig
from services.runtime.tracing import trace_id
from services.tasks import Prompt, Response
from services.tasks.arithmetic import Arithmetic
from tests.logs import heard

GROUP, SLOTS = 4, 12  # three groups at once
PROMPT = Prompt(id="1+2+3=", content="1+2+3=", answer="6")


class ControlPlane:
    """Answers leases with what the test puts there; everything said to it is kept."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[api.LeaseResponse] = asyncio.Queue()
        self.chunks: list[api.EvaluationChunk] = []  # for a worker that asks for one at once
        self.requests: asyncio.Queue[api.LeaseRequest] = asyncio.Queue()
        self.beats: list[api.Heartbeat] = []
        self.lost: list[tuple[int, int]] = []
        self.released: list[tuple[int, int]] = []
        self.results: asyncio.Queue[api.ChunkResult] = asyncio.Queue()

    def give(self, *draws: int, **fields: Any) -> None:
        leased = [
            api.LeasedDraw(draw=draw, attempt=1, epoch=2, seed=1000 + draw, task="arithmetic", prompt=PROMPT)
            for draw in draws
        ]
        self.answers.put_nowait(api.LeaseResponse(draws=leased, **({"version": 0} | fields)))

    async def lease(self, request: api.LeaseRequest) -> api.LeaseResponse:
        self.requests.put_nowait(request)
        if request.wait_seconds == 0:
            return api.LeaseResponse(version=0, evaluation=self.chunks.pop(0) if self.chunks else None)
        return await self.answers.get()

    async def heartbeat(self, beat: api.Heartbeat) -> api.HeartbeatResponse:
        self.beats.append(beat)
        lost = [api.LeaseProgress(draw=draw, attempt=attempt, tokens=0) for draw, attempt in self.lost]
        return api.HeartbeatResponse(version=0, lost=lost)

    async def release(self, request: api.ReleaseRequest) -> None:
        self.released += [(each.draw, each.attempt) for each in request.leases]

    async def evaluated(self, result: api.ChunkResult) -> None:
        self.results.put_nowait(result)


class Sender:
    """Takes groups; `open` cleared, acks wait."""

    def __init__(self) -> None:
        self.groups: asyncio.Queue[TrajectoryGroup] = asyncio.Queue()
        self.status, self.open = pb.Ack.STATUS_ACCEPTED, asyncio.Event()
        self.open.set()

    async def send(self, group: TrajectoryGroup) -> pb.Ack:
        self.groups.put_nowait(group)
        await self.open.wait()
        return pb.Ack(draw=group.draw, attempt=group.attempt, status=self.status, reason="because")


class Store:
    """Version 1 is there, and verified; `probe`: what its manifest carries."""

    probe: Probe | None = None

    async def fetch(self) -> Any:
        return SimpleNamespace(version=1, step=1, probe=self.probe)

    def tensors(self, _: Any) -> dict[str, torch.Tensor]:
        return tiny_policy(Task().alphabet, seed=1).tensors()


class Task(Arithmetic):
    """The arithmetic task, whose answers all end with the character 1; `broken`: scoring fails."""

    broken: bool = False

    def score(self, prompt: Prompt, response: Response) -> dict[str, float]:
        if self.broken:
            raise ZeroDivisionError("a bug in scoring")
        return {"correct": float(len(response.text) % 2), "length": len(response.text) / 100}


class HeldEngine(TorchEngine):
    """Scores when `answer` is set; `error`: how far it is off then, as if it computed another policy."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.asked, self.answer, self.error = asyncio.Event(), asyncio.Event(), 0.0

    async def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        self.asked.set()
        await self.answer.wait()
        first, *rest = await super().score(prompt_ids, token_ids)
        return [first + self.error, *rest]


class Scored(Arithmetic):
    """A task that scores as the test says."""

    rule: Callable[[Prompt, Response], dict[str, float]]

    def score(self, prompt: Prompt, response: Response) -> dict[str, float]:
        return self.rule(prompt, response)


class Scene:
    def __init__(
        self,
        *,
        max_tokens: int = 8,
        broken: bool = False,
        on_error: str | float = 0.0,
        engine: type[TorchEngine] = TorchEngine,
    ) -> None:
        torch.set_num_threads(1)
        self.config = RunConfig.model_validate(
            {
                "sampling": {"group_size": GROUP, "max_tokens": max_tokens, "temperature": 1.3},
                "engine": {"slots": SLOTS},
                "scoring": {"on_error": on_error},
            }
        )
        self.policy = tiny_policy(Task().alphabet, seed=0)
        if max_tokens > 100:  # long responses shall not end by themselves
            self.policy.model.generation_config.eos_token_id = None
        self.engine = engine(self.policy, PolicyVersion(0, 0), slots=SLOTS)
        if max_tokens > 100:
            self.engine._decoder._end_ids = torch.tensor([], dtype=torch.int64)
        self.now = 100.0
        self.control, self.sender, self.metrics = ControlPlane(), Sender(), RolloutMetrics()
        fakes: Any = (self.control, self.sender)
        self.scorer = Scorer(self.config.mixture, self.config.scoring, self.metrics)
        self.scorer.tasks["arithmetic"] = Task(broken=broken)
        responder = self.responder = Responder(
            self.engine, self.policy.tokenizer, self.scorer, self.config, self.metrics
        )
        self.store = Store()
        self.follower = Follower(self.engine, self.store, self.metrics)  # type: ignore[arg-type]
        self.worker = Worker(
            "w", self.config, self.engine, responder, self.follower, *fakes, self.metrics, clock=lambda: self.now
        )

    @asynccontextmanager
    async def working(self) -> AsyncIterator[asyncio.Task[None]]:
        """The worker's loop, once version 0 is proved; raises what any of its groups raises."""
        await self.follower.prove(self.manifest(0))
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            loop = tasks.create_task(self.worker.lease_forever(tasks))
            yield loop
            loop.cancel()
            for lease in self.worker._leases.values():
                lease.task.cancel()

    def manifest(self, version: int, probe: Probe | None = None) -> Any:
        return SimpleNamespace(version=version, step=version, probe=probe)

    async def dies_of(self, *draws: int) -> None:
        """Give the draws and wait for the error that ends the worker."""
        async with self.working() as loop:
            self.control.give(*draws)
            await loop

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"sapo_rollout_{name}_total", labels) or 0.0

    async def sampled(self, more_than: float = 0) -> float:
        """Wait until the engine has reported more tokens than that; how many."""
        await self.until(lambda: self.count("tokens") > more_than)
        return self.count("tokens")

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            await asyncio.sleep(0.0005)  # the engine's thread needs the interpreter

    def chunk(self, number: int, version: int = 0, samples: int = 3) -> api.EvaluationChunk:
        prompts = [PROMPT, PROMPT.model_copy(update={"content": "4-1+7="})]
        return api.EvaluationChunk(
            evaluation="e",
            chunk=number,
            version=version,
            samples=samples,
            seed=5 + number,
            task="arithmetic",
            prompts=prompts,
        )


@pytest_asyncio.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    yield scene
    await scene.engine.close()


@pytest_asyncio.fixture
async def slow() -> AsyncIterator[Scene]:
    """Responses that take a while: 240 tokens, none of which ends them."""
    scene = Scene(max_tokens=240)
    yield scene
    await scene.engine.close()


async def test_responses_are_counted_by_how_they_ended() -> None:
    scene = Scene(max_tokens=4)
    async with scene.working():
        scene.control.give(*range(SLOTS // GROUP))
        groups = [await scene.sender.groups.get() for _ in range(SLOTS // GROUP)]
    ended = Counter(each.finish_reason for group in groups for each in group.trajectories)
    assert ended["stop"]
    assert ended["length"]
    assert {reason: scene.count("responses", finish_reason=reason) for reason in ended} == ended
    await scene.engine.close()


async def test_a_lease_becomes_a_group_with_the_facts_of_its_sampling(scene: Scene) -> None:
    async with scene.working():
        scene.control.give(7)
        group = await scene.sender.groups.get()
    assert (group.draw, group.attempt, group.epoch, group.seed) == (7, 1, 2, 1007)
    assert (group.task, group.prompt_id, group.worker) == ("arithmetic", "1+2+3=", "w")
    assert group.engine == scene.engine.name
    assert group.sampling == scene.config.sampling.parameters()
    assert group.prompt_ids.tolist() == scene.policy.tokenizer.encode("1+2+3=")
    assert len(group.trajectories) == GROUP
    for each in group.trajectories:
        assert each.behaviour_logprobs.dtype == np.float32
        assert each.loss_mask.all()
        assert each.spans == (VersionSpan(len(each.token_ids), 0, 0),)
        truth = scene.engine._decoder.score(group.prompt_ids.tolist(), each.token_ids.tolist(), 1.3)
        assert each.behaviour_logprobs.tolist() == pytest.approx(truth, abs=1e-5)
        text = scene.policy.tokenizer.decode(each.token_ids, skip_special_tokens=True)
        assert each.rewards == {"correct": len(text) % 2, "length": len(text) / 100}
        assert each.finish_reason == ("stop" if each.token_ids[-1] in scene.policy.end_ids else "length")


async def test_every_group_has_a_trace_of_its_own_and_what_is_told_of_it_carries_it(scene: Scene) -> None:
    with heard() as events:
        async with scene.working():
            scene.control.give(7, 8)
            groups = [await scene.sender.groups.get() for _ in range(2)]
            await scene.until(lambda: scene.count("groups", status="accepted") == 2)
            scene.sender.status = pb.Ack.STATUS_EXPIRED
            scene.control.give(9)
            groups.append(await scene.sender.groups.get())
            await scene.until(lambda: scene.count("groups", status="expired") == 1)
    traces = {group.draw: trace_id(group.traceparent) for group in groups}
    assert len(set(traces.values()) - {""}) == 3
    for draw in (7, 8, 9):
        way = [each for each in events if each.get("draw") == draw]
        assert {(each["trace_id"], each["attempt"], each["worker"]) for each in way} == {(traces[draw], 1, "w")}
        assert [each["message"].split()[2].strip(":") for each in way[:3]] == ["leased", "sampled", "scored"]
        *steady, last = [each["level"] for each in way]
        assert steady == ["DEBUG"] * 3, "what is usual is not worth a line"
        assert last == ("INFO" if draw == 9 else "DEBUG")


async def test_the_recorded_prompt_is_the_one_that_was_sampled_from(scene: Scene) -> None:
    """Also when the template would write another one the next time, such as a date."""
    given, ids = [], itertools.count(3)
    scene.responder.encode = lambda task, prompt: [next(ids), 7]  # type: ignore[method-assign]
    generate = scene.engine.generate

    def watched(request: SampleRequest) -> AsyncIterator[TokenDelta]:
        given.append(list(request.prompt_ids))
        return generate(request)

    scene.engine.generate = watched  # type: ignore[method-assign]
    async with scene.working():
        scene.control.give(7)
        group = await scene.sender.groups.get()
    assert given == [group.prompt_ids.tolist()] * GROUP


async def test_the_same_draw_gives_the_same_responses_in_any_attempt_worker_and_company(scene: Scene) -> None:
    def responses(group: TrajectoryGroup) -> list[list[int]]:
        return [each.token_ids.tolist() for each in group.trajectories]

    async with scene.working():
        scene.control.give(7)
        first = responses(await scene.sender.groups.get())
        scene.control.give(8, 7)
        again = {group.draw: responses(group) for group in [await scene.sender.groups.get() for _ in range(2)]}
    other = Scene()
    async with other.working():
        other.control.give(1, 7, 9)
        elsewhere = {group.draw: responses(group) for group in [await other.sender.groups.get() for _ in range(3)]}
    await other.engine.close()
    assert first == again[7] == elsewhere[7]
    assert again[8] != first
    assert len({tuple(each) for each in first}) > 1


async def test_two_attempts_at_a_draw_may_be_in_flight_together(scene: Scene) -> None:
    """The lease of the first was lost, and the worker does not know yet."""
    draws = [
        api.LeasedDraw(draw=7, attempt=attempt, epoch=0, seed=9, task="arithmetic", prompt=PROMPT) for attempt in (1, 2)
    ]
    async with scene.working():
        scene.control.answers.put_nowait(api.LeaseResponse(draws=draws, version=0))
        groups = [await scene.sender.groups.get() for _ in range(2)]
    assert {group.attempt for group in groups} == {1, 2}


async def test_no_more_draws_are_asked_for_than_the_engine_has_room_for(scene: Scene) -> None:
    scene.sender.open.clear()  # a group waiting for its ack holds its room
    async with scene.working():
        assert (await scene.control.requests.get()).count == 3
        scene.control.give(0, 1)
        assert (await scene.control.requests.get()).count == 1
        scene.control.give(2)
        for _ in range(3):
            await scene.sender.groups.get()
        assert scene.control.requests.empty()
        scene.sender.open.set()
        assert (await scene.control.requests.get()).count >= 1


async def test_a_lease_is_renewed_by_the_tokens_sampled_for_it_each_counted_once(slow: Scene) -> None:
    async with slow.working():
        slow.control.give(1)
        tokens = told = 0.0
        for _ in range(3):
            tokens = await slow.sampled(more_than=tokens)
            await slow.worker.beat()
            (lease,) = slow.control.beats[-1].leases
            assert (lease.draw, lease.attempt) == (1, 1)
            told += lease.tokens
            assert told == tokens
        await slow.worker.beat()
        assert slow.control.beats[-1].leases[0].tokens == 0


async def test_leases_are_renewed_each_for_itself_and_while_their_group_cannot_be_sent(slow: Scene) -> None:
    slow.sender.open.clear()
    async with slow.working():
        slow.control.give(1)
        tokens = await slow.sampled()
        slow.control.give(2)
        await slow.sampled(more_than=tokens)
        await slow.worker.beat()
        assert {each.draw for each in slow.control.beats[-1].leases} == {1, 2}
        for _ in range(2):
            await slow.sender.groups.get()
        await slow.worker.beat()
        assert [(each.draw, each.tokens) for each in slow.control.beats[-1].leases] == [(1, 1), (2, 1)]
        assert slow.control.beats[-1].waiting_for == ""
        slow.sender.open.set()


async def test_a_lease_is_renewed_while_its_group_is_scored_however_slowly(scene: Scene) -> None:
    scoring, go_on = threading.Event(), threading.Event()

    def score(prompt: Prompt, response: Response) -> dict[str, float]:
        scoring.set()
        assert go_on.wait(20)
        return {"correct": 1.0}

    scene.scorer.tasks["arithmetic"] = Scored(rule=score)
    async with scene.working():
        scene.control.give(1)
        await scene.until(scoring.is_set)
        for _ in range(2):
            await scene.worker.beat()
            assert [each.tokens for each in scene.control.beats[-1].leases] == [1]
        go_on.set()
        assert (await scene.sender.groups.get()).draw == 1


async def test_a_lost_lease_stops_its_sampling_and_nothing_else(slow: Scene) -> None:
    async with slow.working() as loop:
        slow.control.give(1, 2)
        await slow.sampled()
        slow.control.lost = [(1, 1), (99, 1)]
        await slow.worker.beat()
        group = await slow.sender.groups.get()
        assert group.draw == 2
        assert not loop.done()
        assert (await slow.engine.health()).tokens < 2 * GROUP * 240
        slow.control.give(3)  # its room is free
        assert (await slow.sender.groups.get()).draw == 3


async def test_a_group_on_its_way_is_not_stopped_by_a_lost_lease(scene: Scene) -> None:
    """An accepted draw has no lease any more, and its ack may still be on its way."""
    scene.sender.open.clear()
    async with scene.working():
        scene.control.give(1)
        await scene.sender.groups.get()
        scene.control.lost = [(1, 1)]
        await scene.worker.beat()
        scene.sender.open.set()
        await scene.until(lambda: scene.count("groups", status="accepted"))


async def test_draining_hands_back_what_is_unfinished(slow: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.rollout.worker.DRAIN_SECONDS", 0.01)
    async with slow.working() as loop:
        slow.control.give(4, 5)
        await slow.sampled()
        loop.cancel()
        await slow.worker.drain()
    assert slow.control.released == [(4, 1), (5, 1)]
    assert slow.sender.groups.empty()
    await slow.engine.score([3], [4])  # behind the aborts
    assert (await slow.engine.health()).rows == 0


async def test_draining_finishes_what_is_nearly_done(scene: Scene) -> None:
    async with scene.working() as loop:
        scene.control.give(4)
        await scene.until(lambda: scene.worker._leases)
        loop.cancel()
        await scene.worker.drain()
        assert (await scene.sender.groups.get()).draw == 4
    assert scene.control.released == []


async def test_draining_does_not_wait_for_an_evaluation(slow: Scene) -> None:
    async with slow.working() as loop:
        slow.control.give(evaluation=slow.chunk(0))
        await slow.sampled()
        loop.cancel()
        await slow.worker.drain()
    assert slow.control.results.empty()


async def test_a_control_plane_that_is_gone_does_not_keep_a_draining_worker(
    slow: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable(_: api.ReleaseRequest) -> None:
        raise Unavailable("nobody there")

    monkeypatch.setattr("services.rollout.worker.DRAIN_SECONDS", 0.01)
    monkeypatch.setattr(slow.control, "release", unreachable)
    async with slow.working() as loop:
        slow.control.give(4)
        await slow.sampled()
        loop.cancel()
        await slow.worker.drain()


# ---- evaluation


async def test_an_evaluation_is_answered_chunk_by_chunk_until_none_is_left(scene: Scene) -> None:
    scene.control.chunks = [scene.chunk(1), scene.chunk(2)]
    async with scene.working():
        scene.control.give(evaluation=scene.chunk(0))
        results = [await scene.control.results.get() for _ in range(3)]
        while (request := await scene.control.requests.get()).wait_seconds:  # the loop's own
            pass
        assert (request.count, request.evaluate) == (0, True)
    assert [(each.chunk, each.version, each.samples) for each in results] == [(0, 0, 6), (1, 0, 6), (2, 0, 6)]
    for each in results:
        assert (each.worker, each.evaluation, len(each.correct), len(each.examples)) == ("w", "e", 2, 2)
        assert all(0 <= correct <= 3 for correct in each.correct)
        assert each.tokens > 0


async def test_an_evaluation_is_answered_under_its_version_while_a_newer_one_waits(slow: Scene) -> None:
    async with slow.working():
        slow.control.give(evaluation=slow.chunk(0))
        undisturbed = await slow.control.results.get()
        follower = asyncio.create_task(slow.follower.run(slow.worker.beat))
        tokens = slow.count("tokens")
        slow.control.give(evaluation=slow.chunk(0))
        await slow.sampled(more_than=tokens)
        slow.follower.hint(1)
        result = await slow.control.results.get()
        assert (result.version, result.examples) == (0, undisturbed.examples)
        await slow.until(lambda: slow.engine.policy_version.version == 1)
        follower.cancel()


async def test_while_one_evaluation_is_answered_no_other_is_asked_for(slow: Scene) -> None:
    async with slow.working():
        assert (await slow.control.requests.get()).evaluate
        slow.control.give(evaluation=slow.chunk(0))
        assert not (await slow.control.requests.get()).evaluate
        await slow.control.results.get()


async def test_a_chunk_of_a_version_that_has_moved_on_is_left_to_others(scene: Scene) -> None:
    async with scene.working():
        scene.control.give(evaluation=scene.chunk(0, version=3))
        await scene.until(lambda: scene.control.requests.qsize() == 2)
        await scene.until(lambda: scene.worker._evaluation is None)
        scene.control.give(1)
        await scene.sender.groups.get()
    assert scene.control.results.empty()
    assert scene.follower._pins == 0


# ---- the probe


def probe_of_version_1() -> Probe:
    published = tiny_policy(Task().alphabet, seed=1)
    return measure(published, published.tensors(), draw_sequence(published, seed=0))


@pytest_asyncio.fixture
async def held() -> AsyncIterator[Scene]:
    """Long responses, and an engine that takes its time over the probe."""
    scene = Scene(max_tokens=240, engine=HeldEngine)
    scene.store.probe = probe_of_version_1()
    yield scene
    await scene.engine.close()


async def sampled_unproved(scene: Scene) -> HeldEngine:
    """Have a group sampled to its end whose weights changed on the way, while the probe is not answered."""
    assert isinstance(scene.engine, HeldEngine)
    scene.control.give(1)
    await scene.sampled()
    scene.follower.hint(1)
    await scene.engine.asked.wait()
    lease = scene.worker._leases[1, 1]
    await scene.until(lambda: lease.sampled)
    await scene.worker.beat()
    assert [each.tokens for each in scene.control.beats[-1].leases] == [1]  # it keeps its lease
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(scene.sender.groups.get(), 0.1)
    return scene.engine


async def test_I4_a_group_waits_until_the_policy_it_was_sampled_under_is_proved(held: Scene) -> None:
    async with held.working():
        follower = asyncio.create_task(held.follower.run(held.worker.beat))
        engine = await sampled_unproved(held)
        engine.answer.set()
        group = await held.sender.groups.get()
        assert {span.version for each in group.trajectories for span in each.spans} == {0, 1}
        await held.worker.beat()
        figures = held.control.beats[-1].probe
        assert figures is not None
        assert figures.mean <= figures.max < 1e-5
        follower.cancel()


async def test_I4_no_group_of_a_version_that_the_engine_computes_otherwise_is_handed_over(held: Scene) -> None:
    async def working() -> None:
        async with held.working() as loop, asyncio.TaskGroup() as tasks:
            tasks.create_task(held.follower.run(held.worker.beat))
            engine = await sampled_unproved(held)
            engine.error = 1e-3
            engine.answer.set()
            await loop

    with pytest.raises(ExceptionGroup) as caught:
        await working()
    assert caught.group_contains(Corrupt, match=r"does not compute version 1 as it was learned: .*0\.001 nats")
    assert held.sender.groups.empty()
    assert held.count("probe_misses") == 1


async def test_I4_an_evaluation_waits_until_its_version_is_proved() -> None:
    scene = Scene(engine=HeldEngine)
    assert isinstance(scene.engine, HeldEngine)
    scene.store.probe = probe_of_version_1()
    async with scene.working():
        follower = asyncio.create_task(scene.follower.run(scene.worker.beat))
        scene.follower.hint(1)
        await scene.engine.asked.wait()
        scene.control.give(evaluation=scene.chunk(0, version=1))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(scene.control.results.get(), 0.5)
        scene.engine.answer.set()
        assert (await scene.control.results.get()).version == 1
        follower.cancel()
    await scene.engine.close()


# ---- what ends the worker, and what it tells


async def test_I4_a_log_prob_that_is_not_finite_drops_its_group_and_ends_the_worker() -> None:
    """One NaN stays in an engine's cache; only a fresh engine may go on."""
    scene = Scene()
    with torch.no_grad():
        scene.engine._decoder.policy.head_weight[5] = float("nan")
    with pytest.raises(ExceptionGroup) as caught:
        await scene.dies_of(1)
    assert caught.group_contains(Corrupt, match="sampled under version 0 is not finite")
    assert scene.sender.groups.empty()
    assert scene.count("dropped_samples", reason="not finite") >= 1
    await scene.engine.close()


async def test_answers_that_never_match_are_told_once_with_an_example(scene: Scene) -> None:
    scene.worker._config = scene.config.model_copy(
        update={"training": scene.config.training.model_copy(update={"groups_per_step": 2})}
    )
    scene.scorer.tasks["arithmetic"] = Scored(rule=lambda prompt, response: {"correct": 0.0})
    async with scene.working():
        for draw in range(4):
            scene.control.give(draw)
            await scene.sender.groups.get()
            await scene.worker.beat()
            assert len(scene.control.beats[-1].notes) == (1 if draw >= 1 else 0)
    (note,) = scene.control.beats[-1].notes
    assert "no response to the first 2 prompts is correct" in note
    assert "'1+2+3=' was answered '" in note
    assert "expected '6'" in note


async def test_what_could_not_be_scored_is_told_once_with_the_newest_in_words() -> None:
    scene = Scene(broken=True)
    async with scene.working() as loop:
        scene.control.give(0)
        await scene.sender.groups.get()
        await scene.worker.beat()
        told = scene.control.beats[-1].unscored
        assert told is not None
        assert told.reasons == {"exception": GROUP}
        assert told.last.startswith("task arithmetic, prompt ")
        assert ": ZeroDivisionError: a bug in scoring (" in told.last
        await scene.worker.beat()
        assert scene.control.beats[-1].unscored is None
        scene.control.give(1)
        await scene.sender.groups.get()
        loop.cancel()
        await scene.worker.drain()  # the last chance to tell
        assert [each.unscored.reasons for each in scene.control.beats if each.unscored] == [{"exception": GROUP}] * 2
    await scene.engine.close()


async def test_what_was_wrong_can_be_sent_whatever_it_says(scene: Scene) -> None:
    def score(prompt: Prompt, response: Response) -> dict[str, float]:
        raise ValueError("half a pair: \ud800 " + "x" * 10_000)

    scene.scorer.tasks["arithmetic"] = Scored(rule=score)
    async with scene.working():
        scene.control.give(0)
        await scene.sender.groups.get()
        await scene.worker.beat()
    told = scene.control.beats[-1].unscored
    assert told is not None
    assert "half a pair: ? x" in told.last
    assert len(told.model_dump_json()) < 2000


async def test_one_correct_answer_is_enough_to_say_nothing(scene: Scene) -> None:
    scores = iter([1.0] + [0.0] * 1000)
    scene.scorer.tasks["arithmetic"] = Scored(rule=lambda prompt, response: {"correct": next(scores)})
    scene.worker._config = scene.config.model_copy(
        update={"training": scene.config.training.model_copy(update={"groups_per_step": 2})}
    )
    async with scene.working():
        for draw in range(5):
            scene.control.give(draw)
            await scene.sender.groups.get()
        await scene.worker.beat()
    assert scene.control.beats[-1].notes == []


@pytest.mark.timeout(20)
async def test_a_bug_in_scoring_ends_the_worker_with_its_message_where_that_is_asked_for() -> None:
    scene = Scene(broken=True, on_error="stop")
    with pytest.raises(ExceptionGroup) as caught:
        await scene.dies_of(1)
    assert caught.group_contains(ConfigError, match=r"arithmetic, prompt 1\+2\+3=: ZeroDivisionError: a bug in scoring")
    await scene.engine.close()


@pytest.mark.timeout(20)
async def test_a_worker_whose_groups_are_all_malformed_ends_and_says_so(scene: Scene) -> None:
    scene.sender.status = pb.Ack.STATUS_INVALID
    with pytest.raises(ExceptionGroup) as caught:
        await scene.dies_of(*range(MAX_INVALID))
    assert caught.group_contains(InvalidTrajectory, match="because")


@pytest.mark.parametrize("status", ["DUPLICATE", "EXPIRED"])
async def test_a_group_that_came_too_late_is_counted_and_no_fault(scene: Scene, status: str) -> None:
    scene.sender.status = getattr(pb.Ack, f"STATUS_{status}")
    async with scene.working():
        for draw in range(4):
            scene.control.give(draw)
            await scene.sender.groups.get()
        await scene.until(lambda: not scene.worker._leases)
    assert scene.count("groups", status=status.lower()) == 4


async def test_a_dead_engine_is_noticed_by_the_next_heartbeat(scene: Scene) -> None:
    await scene.worker.beat()
    await scene.engine.close()
    with pytest.raises(Unavailable, match="engine died: closed"):
        await scene.worker.beat()


def test_an_engine_that_stands_still_with_work_to_do_is_noticed() -> None:
    now = 0.0
    watch = EngineWatch(clock=lambda: now)
    now = 2.0
    assert watch.look(EngineHealth(True, rows=3, tokens=100)) == 50.0
    now += STALL_SECONDS + 1
    assert watch.look(EngineHealth(True, rows=0, tokens=100)) == 0.0  # nothing to do
    watch.look(EngineHealth(True, rows=3, tokens=100))
    now += STALL_SECONDS + 1
    with pytest.raises(Unavailable, match="sampled nothing"):
        watch.look(EngineHealth(True, rows=3, tokens=100))


async def test_time_without_work_is_counted_by_what_kept_it_back(scene: Scene) -> None:
    def waited(reason: str) -> float:
        return scene.count("waiting_seconds", reason=reason)

    async with scene.working():
        await scene.control.requests.get()
        scene.now = 103.0
        scene.control.give(waiting_for="lookahead")
        await scene.control.requests.get()
        assert waited("lookahead") == 3.0
        await scene.worker.beat()
        assert scene.control.beats[-1].waiting_for == "lookahead"
        scene.sender.open.clear()
        scene.control.give(1)
        await scene.control.requests.get()
        scene.now = 110.0  # busy with draw 1, however long
        await scene.sender.groups.get()
        scene.control.give(waiting_for="lookahead")
        await scene.control.requests.get()
        assert waited("lookahead") == 3.0
        scene.sender.open.set()
        await scene.until(lambda: not scene.worker._leases)
        scene.now = 112.0  # idle only since the ack
        scene.control.give(waiting_for="steps")
        await scene.control.requests.get()
        assert waited("steps") == 2.0


async def test_a_heartbeat_reports_the_policy_served_and_the_engine_s_figures(scene: Scene) -> None:
    async with scene.working():
        scene.control.give(1)
        await scene.sender.groups.get()
        await scene.engine.update_weights(scene.policy.tensors(), PolicyVersion(2, 9))
        await scene.worker.beat()
    beat = scene.control.beats[-1]
    assert (beat.worker, beat.version, beat.step, beat.rows) == ("w", 2, 9, 0)
    assert beat.tokens == scene.count("tokens")
    assert beat.busy
