"""Suites and several tasks evaluated while a run goes on: the record's figures are those of the responses on disk."""

import json
from contextlib import asynccontextmanager
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sapo_learner.policy import tiny_policy
from services.control_plane.evaluation_parts import shown, summary
from services.control_plane.evaluations import Evaluations
from services.rollout.engines import PolicyVersion
from services.rollout.engines.torch_engine import TorchEngine
from services.rollout.evaluator import Evaluator
from services.rollout.follower import Follower
from services.rollout.responder import Responder
from services.rollout.scoring import Scorer
from services.run_directory import stopped_status
from services.runstore import EmbeddedRedis
from services.runtime.evaluation_settings import EvaluationSettings
from services.runtime.metrics import RolloutMetrics
from services.runtime.settings import RunConfig, save_config
from services.suites import Suite
from services.tasks import Prompt, TaskSettings
from tests.small_run import Learner, Running, answer, control_plane, evaluate_all, lease_request, run_config

PARITY = """
from services.tasks import Prompt, Task

class Parity(Task):
    inline = True
    size: int = 60

    def prompts(self, split):
        return [Prompt(id=f"{split}{n}", content=f"{n}=") for n in range(1, self.size + 1)]

    def score(self, prompt, response):
        return {"correct": float(len(response.text) % 2), "length": float(len(response.text))}
"""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A task with 60 held-out prompts and one with 5; two suites, of which one samples otherwise."""
    parity = tmp_path / "parity.py"
    parity.write_text(PARITY)
    task = {"name": str(parity)}
    suites = [
        {"name": "short", "task": task | {"size": 4}, "split": "train", "samples": 4, "max_tokens": 3, "ks": [2, 3]},
        {"name": "greedy", "task": task | {"size": 3}, "split": "held_out", "samples": 2, "temperature": 0},
    ]
    return run_config(
        tmp_path / "run",
        task={"name": "arithmetic"},
        evaluation={"samples": 130, "boundary_samples": 130, "suites": suites},
    ).model_copy(update={"task": TaskSettings(), "tasks": two_tasks(task)})


def two_tasks(task: dict[str, Any]) -> Any:
    parsed = RunConfig.model_validate({"tasks": [task | {"label": "big"}, task | {"label": "small", "size": 5}]})
    return parsed.tasks


@asynccontextmanager
async def evaluator(running: Running) -> Any:
    """A worker's evaluating half with a real engine; the weights are random ones."""
    config = running.config
    policy = tiny_policy("0123456789=", seed=0)
    engine, metrics = TorchEngine(policy, PolicyVersion(0, 0), slots=64), RolloutMetrics()
    try:
        with Scorer(config.scored, config.scoring, metrics) as scorer:
            responder = Responder(engine, policy.tokenizer, scorer, config, metrics)
            follower = Follower(engine, None, metrics)  # type: ignore[arg-type]
            await follower.prove(SimpleNamespace(version=0, step=0, probe=None))  # type: ignore[arg-type]
            yield Evaluator("w", engine, responder, follower, running.client, 64)
    finally:
        await engine.close()


def lines(directory: Path) -> list[dict[str, Any]]:
    files = sorted(directory.glob("part-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


async def test_the_record_s_figures_equal_an_independent_computation_from_the_responses_on_disk(
    redis: EmbeddedRedis, config: RunConfig
) -> None:
    def seed_of(problem: str) -> int:
        """As written beside its responses."""
        found = lines(config.run.directory / "evaluations" / "step-00000000")
        return next(int(each["seed"]) for each in found if each.get("problem") == problem and each["task"] == "big")

    async with control_plane(config, redis.url) as running:
        await Learner(running).start()
        first = (await running.client.lease(lease_request("w", 0, evaluate=True))).evaluation
        assert first is not None
        async with evaluator(running) as worker:
            await worker.answer(first)
            again = await worker._responder.respond(
                "big", Prompt(id="held_out7", content="7="), seed_of("held_out7"), 2
            )
            texts = [worker._responder.text(each) for each in again]
        (status,) = (await running.client.status())["evaluations"]
    everything = lines(config.run.directory / "evaluations" / "step-00000000")
    assert texts == [
        each["text"] for each in everything if each.get("problem") == "held_out7" and each["task"] == "big"
    ]
    samples = [each for each in everything if each["kind"] == "sample"]
    heads = [each for each in everything if each["kind"] == "header"]
    assert [(each["part"], each["parts"], each["step"], each["version"]) for each in heads] == [
        (part, 5, 0, 0) for part in range(5)
    ]
    (line,) = running.plane.record.recent["evaluation"]
    assert list(line["by_task"]) == ["big", "small", "short", "greedy"]
    rates = {}
    for label, (problems, count) in {"big": (60, 2), "small": (5, 2), "short": (4, 4), "greedy": (3, 2)}.items():
        own = [each for each in samples if each["task"] == label]
        ids = list(dict.fromkeys(each["problem"] for each in own))
        correct = np.array([[each["correct"] for each in own if each["problem"] == name] for name in ids])
        assert correct.shape == (problems, count)
        assert [each["correct"] for each in own] == [len(each["text"]) % 2 == 1 for each in own]
        figures = line["by_task"][label]
        assert figures["correct"] == correct.sum(axis=1).tolist()
        assert figures["pass_at_1"] == pytest.approx(correct.mean())
        assert figures["standard_error"] == pytest.approx(correct.mean(axis=1).std(ddof=1) / problems**0.5)
        for k in {"short": (2, 3)}.get(label, (2,)):
            draws = [correct[:, list(chosen)].any(axis=1).mean() for chosen in combinations(range(count), k)]
            assert figures["pass_at_k"][str(k)]["mean"] == pytest.approx(np.mean(draws))
        assert figures["mean_tokens"] == pytest.approx(np.mean([each["tokens"] for each in own]))
        rates[label] = correct.mean(axis=1)
    own_tasks = np.concatenate([rates["big"], rates["small"]])
    assert line["pass_at_1"] == pytest.approx(own_tasks.mean())  # the suites are not in it
    assert line["standard_error"] == pytest.approx(own_tasks.std(ddof=1) / 65**0.5)
    assert (line["samples"], line["problems"]) == (130, 65)
    assert 0 < line["pass_at_1"] < 1
    assert max(each["tokens"] for each in samples if each["task"] == "short") == 3
    assert max(each["tokens"] for each in samples if each["task"] == "big") == config.sampling.max_tokens
    greedy = {(each["problem"], each["text"]) for each in samples if each["task"] == "greedy"}
    assert len(greedy) == 3
    assert status == shown(line)
    assert "correct" not in status["by_task"]["big"]
    save_config(config)
    assert stopped_status(config.run.directory)["evaluations"] == [status]


async def test_a_line_of_an_older_run_is_still_shown(running: Running, learner: Learner) -> None:
    old = {"step": 0, "after_step": 0, "version": 0, "pass_at_1": 0.5, "standard_error": 0.1, "samples": 9}
    running.plane.record.add("evaluation", **old, examples=[["a", "b"]])
    (status,) = (await running.client.status())["evaluations"]
    assert {key: status[key] for key in old} == old
    assert "examples" not in status


async def test_so_many_evaluations_are_kept_on_disk(redis: EmbeddedRedis, tmp_path: Path) -> None:
    settings = {"every": 1, "samples": 1, "boundary_samples": 1, "kept": 2}
    config = run_config(tmp_path, task={"held_out_every": 40}, training={"steps": 9}, evaluation=settings)
    async with control_plane(config, redis.url) as running:
        learner = await Learner(running).start()
        for step in range(6):
            if step:
                await learner.publish(step)
            while chunk := (await running.client.lease(lease_request("w", 0, step, evaluate=True))).evaluation:
                assert chunk.text_characters == 4000
                await running.client.evaluated(whole_answer(chunk))
        assert len(running.plane.record.recent["evaluation"]) == 6
    found = sorted(each.name for each in (tmp_path / "evaluations").iterdir())
    assert found == ["step-00000000", "step-00000004", "step-00000005"]


def whole_answer(chunk: Any) -> Any:
    one = {"text": "x", "tokens": 1, "finish_reason": "stop", "rewards": {"correct": 1.0}, "correct": True}
    result = answer(chunk, correct=chunk.samples)
    return type(result).model_validate(result.model_dump() | {"answers": [[one] * chunk.samples] * len(chunk.prompts)})


async def test_a_disk_that_takes_nothing_costs_the_responses_and_not_the_figures(
    redis: EmbeddedRedis, tmp_path: Path
) -> None:
    config = run_config(tmp_path, task={"held_out_every": 40})
    (tmp_path / "evaluations").write_text("in the way")
    async with control_plane(config, redis.url) as running:
        await Learner(running).start()
        chunk = (await running.client.lease(lease_request("w", 0, evaluate=True))).evaluation
        await running.plane.evaluated(whole_answer(chunk))
        assert running.plane.record.last("evaluation")["pass_at_1"] == 1  # type: ignore[index]


async def test_suites_that_change_over_a_restart_start_an_open_evaluation_over(
    redis: EmbeddedRedis, config: RunConfig
) -> None:
    async with control_plane(config, redis.url) as running:
        await Learner(running).start()
        chunk = (await running.client.lease(lease_request("w", 0, evaluate=True))).evaluation
        assert chunk is not None
        await running.client.evaluated(answer(chunk))
    evaluation = config.evaluation.model_copy(update={"suites": config.evaluation.suites[:1]})
    changed = config.model_copy(update={"evaluation": evaluation})
    async with control_plane(changed, redis.url) as running:
        assert await evaluate_all(running) == 4
        assert list(running.plane.record.last("evaluation")["by_task"]) == ["big", "small", "short"]  # type: ignore[index]


PROMPTS = [Prompt(id=f"p{index}", content=f"{index}?") for index in range(3)]


def only_suites(**settings: Any) -> Evaluations:
    suite = Suite.model_validate({"name": "s", "task": {"name": "arithmetic"}, "samples": 5} | settings)
    return Evaluations({}, 0, EvaluationSettings(samples=1), last_step=9, suites=[(suite, PROMPTS)])


def test_where_nothing_is_held_out_the_overall_figure_is_the_suites() -> None:
    each = only_suites(temperature=0.6, max_tokens=7)
    assert each.schedule(0)
    chunk = each.claim("a", 0, 0, {"a": 0})
    assert chunk is not None
    assert (chunk.samples, chunk.temperature, chunk.max_tokens, chunk.task) == (5, 0.6, 7, "s")
    done = each.complete(answer(chunk, "a", 2))
    assert done is not None
    line = summary(done, each.parts)
    assert (line["pass_at_1"], line["samples"]) == (pytest.approx(0.4), 15)
    assert line["examples"][0] == ["0?", "answer to p0"]


def test_a_result_s_responses_must_be_those_that_it_counts() -> None:
    from sapo_learner.errors import Mismatch

    each = only_suites()
    each.schedule(0)
    chunk = each.claim("a", 0, 0, {"a": 0})
    good = whole_answer(chunk).model_copy(update={"worker": "a"})
    for wrong in (good.answers[:2], [each[:2] for each in good.answers]):
        with pytest.raises(Mismatch, match="not the result of that chunk"):
            each.complete(good.model_copy(update={"answers": wrong}))
    with pytest.raises(Mismatch, match="not the result of that chunk"):
        each.complete(good.model_copy(update={"correct": [4, 5, 5]}))
    assert each.complete(good) is not None


def test_the_texts_of_a_chunk_fit_into_one_request() -> None:
    each = only_suites(samples=2000)
    each.schedule(0)
    chunk = each.claim("a", 0, 0, {"a": 0})
    assert chunk is not None
    assert chunk.text_characters == (2 << 20) // 6000
    each = only_suites(samples=10_000)
    each.schedule(0)
    chunk = each.claim("a", 0, 0, {"a": 0})
    assert chunk is not None
    assert chunk.text_characters is None
