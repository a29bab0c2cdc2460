"""What can go wrong with a real vLLM while its weights change: it serves the old policy or is gone, never a mixture."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import torch
from prometheus_client import generate_latest
from torch import Tensor

from sapo_learner.errors import Mismatch, SapoError, Unavailable
from sapo_learner.policy import Policy
from sapo_learner.snapshot import save_tensors
from services.rollout.engines import PolicyVersion, Sampled
from services.rollout.engines.vllm_engine import VllmEngine
from services.runtime.metrics import RolloutMetrics
from tests.contract.test_engine import Seen, assert_true, endless, qwen3, request, respond, respond_all
from tests.contract.vllm_engines import engine_cores, needs_vllm, newest_engine, vllm_engine

pytestmark = [pytest.mark.vllm, needs_vllm, pytest.mark.asyncio(loop_scope="session")]
OLD, NEW = endless(qwen3(seed=1)), endless(qwen3(seed=2))


@pytest_asyncio.fixture(loop_scope="session")
async def engine() -> AsyncIterator[VllmEngine]:
    torch.set_num_threads(1)
    yield await vllm_engine(OLD, slots=8)


async def serves(engine: VllmEngine, policies: Mapping[int, Policy]) -> Sampled:
    """A new response is true to the policy that it names."""
    wanted = request("after", seed=99, tokens=40)
    sampled = await respond(engine, wanted)
    assert_true(sampled, wanted, policies)
    return sampled


async def test_while_32_responses_run_new_weights_are_taken_between_two_tokens(engine: VllmEngine) -> None:
    wanted = [request(f"r{i}", seed=i, prompt=i, tokens=200) for i in range(32)]
    seen = Seen()
    responses = asyncio.create_task(respond_all_watched(engine, wanted, seen))
    for _ in range(64):
        await seen.get()
    await engine.update_weights(NEW.tensors(), PolicyVersion(1, 10))
    for each, sampled in zip(wanted, await responses, strict=True):
        assert_true(sampled, each, {0: OLD, 1: NEW})
        assert [span.version for span in sampled.spans] == [0, 1]


async def respond_all_watched(engine: VllmEngine, wanted: list[Any], seen: Seen) -> list[Sampled]:
    return list(await asyncio.gather(*(respond(engine, each, seen) for each in wanted)))


async def test_a_prompt_that_was_cached_under_the_old_policy_is_not_read_from_that_cache(engine: VllmEngine) -> None:
    ids = [3 + i % 15 for i in range(200)]  # more than the 128 of a block of cache
    wanted = [type(request())(f"r{i}", ids, i, 20) for i in range(2)]
    await respond(engine, wanted[0])
    await engine.update_weights(NEW.tensors(), PolicyVersion(1, 10))
    assert_true(await respond(engine, wanted[1]), wanted[1], {1: NEW})


@pytest.mark.usefixtures("engine")
async def test_vllm_s_own_metrics_stand_beside_ours() -> None:
    engine, metrics = await newest_engine(OLD), RolloutMetrics()
    metrics.include("vllm:")

    def generated() -> float:
        lines = generate_latest(metrics.registry).decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total{"))

    before = generated()
    sampled = await respond(engine, request("measured", seed=5, tokens=40))
    async with asyncio.timeout(20):
        while generated() < before + len(sampled.token_ids):  # counted beside the responses
            await asyncio.sleep(0.05)
    assert 'model_name="policy"' in generate_latest(metrics.registry).decode()


def truncated(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_tensors(tensors, path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def not_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    next(iter(changed.values())).view(-1)[7] = float("nan")
    save_tensors(changed, path)


def missing(tensors: Mapping[str, Tensor], path: Path) -> None:
    """No file at all."""


@pytest.mark.parametrize("write", [truncated, not_finite, missing])
async def test_weights_that_cannot_be_read_leave_the_old_policy_serving(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    running = asyncio.create_task(respond(engine, request("running", tokens=200)))
    with monkeypatch.context() as patch:
        patch.setattr("services.rollout.engines.vllm_engine.save_tensors", write)
        with pytest.raises(Mismatch, match="refuse the weights"):
            await engine.update_weights(NEW.tensors(), PolicyVersion(1, 10))
    assert engine.policy_version == PolicyVersion(0, 0)
    assert_true(await running, request("running", tokens=200), {0: OLD})  # not left paused
    await serves(engine, {0: OLD})
    await engine.update_weights(NEW.tensors(), PolicyVersion(1, 10))
    await serves(engine, {1: NEW})


async def test_the_same_seed_gives_the_same_tokens_before_and_after_other_policies(engine: VllmEngine) -> None:
    wanted = [request(f"r{i}", seed=i, tokens=60) for i in range(4)]
    before = await respond_all(engine, wanted)
    await engine.update_weights(NEW.tensors(), PolicyVersion(1, 10))
    await engine.update_weights(OLD.tensors(), PolicyVersion(2, 20))
    after = await respond_all(engine, wanted)
    assert [each.token_ids for each in after] == [each.token_ids for each in before]
    assert [each.logprobs for each in after] == [each.logprobs for each in before]


async def test_an_engine_that_fails_while_it_changes_its_weights_is_gone(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(_: str) -> None:
        raise RuntimeError("half of them")

    running = asyncio.create_task(respond(engine, request("running", tokens=240)))
    await asyncio.sleep(0)
    monkeypatch.setattr(engine._llm, "finish_weight_update", fails)
    with pytest.raises(Unavailable, match="while changing its weights: half of them"):
        await engine.update_weights(NEW.tensors(), PolicyVersion(1, 10))
    await gone(engine, running)


async def test_an_engine_that_is_interrupted_while_it_changes_its_weights_is_gone(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    applying = asyncio.Event()

    async def hangs(_: str) -> None:
        applying.set()
        await asyncio.Event().wait()

    running = asyncio.create_task(respond(engine, request("running", tokens=240)))
    monkeypatch.setattr(engine._llm, "finish_weight_update", hangs)
    update = asyncio.create_task(engine.update_weights(NEW.tensors(), PolicyVersion(1, 10)))
    await applying.wait()
    update.cancel()
    with pytest.raises(asyncio.CancelledError):
        await update
    await gone(engine, running)


async def test_an_engine_whose_core_hangs_is_given_up(engine: VllmEngine) -> None:
    engine._call_seconds = 1.0
    core = engine_cores(psutil.Process())[-1]
    core.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(Unavailable, match=r"pausing took more than 1 s"):
            await engine.update_weights(NEW.tensors(), PolicyVersion(1, 10))
        await gone(engine, asyncio.create_task(respond(engine, request())))
    finally:
        core.send_signal(signal.SIGCONT)


async def test_an_engine_whose_core_is_killed_ends_everything_that_waits_for_it(engine: VllmEngine) -> None:
    seen = Seen()
    running = asyncio.create_task(respond(engine, request("running", tokens=240), seen))
    await seen.get()
    os.kill(engine_cores(psutil.Process())[-1].pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        await gone(engine, running)


async def gone(engine: VllmEngine, running: "asyncio.Task[Sampled]") -> None:
    (outcome,) = await asyncio.gather(running, return_exceptions=True)
    assert isinstance(outcome, SapoError)
    health = await engine.health()
    assert not health.alive
    assert health.detail
    await engine.close()
