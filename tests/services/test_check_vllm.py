"""What `sapo check` says of a real vLLM: an honest one agrees, and each fault that it is for is caught and named."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sapo_learner.snapshot import save_tensors
from services.rollout.engines import SampleRequest, vllm_adapter, vllm_engine
from services.runstore import EmbeddedRedis
from tests.contract.vllm_engines import needs_vllm
from tests.services.test_check import judged

pytestmark = [pytest.mark.vllm, needs_vllm, pytest.mark.timeout(150)]
ENGINE = {"name": "vllm", "slots": 16}


def raw_logprobs(patch: pytest.MonkeyPatch) -> None:
    arguments = vllm_adapter.engine_arguments
    patch.setattr(
        vllm_adapter, "engine_arguments", lambda *a, **b: arguments(*a, **b) | {"logprobs_mode": "raw_logprobs"}
    )


def truncated(patch: pytest.MonkeyPatch) -> None:
    whole = vllm_adapter.sampling

    def nucleus(request: SampleRequest, end_ids: Any) -> Any:
        params = whole(request, end_ids)
        params.top_p = 0.9
        return params

    patch.setattr(vllm_adapter, "sampling", nucleus)


def stale_cache(patch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    pause = AsyncLLM.pause_generation

    async def keeping(self: AsyncLLM, **options: Any) -> None:
        await pause(self, **options | {"clear_cache": False})

    patch.setattr(AsyncLLM, "pause_generation", keeping)


def one_tensor_off(patch: pytest.MonkeyPatch) -> None:
    def perturbed(tensors: Mapping[str, Tensor], path: Path) -> None:
        name = next(each for each in tensors if "down_proj" in each)
        save_tensors({**tensors, name: tensors[name] * 1.01}, path)

    patch.setattr(vllm_engine, "save_tensors", perturbed)


async def test_an_honest_vllm_agrees(tmp_path: Path, redis: EmbeddedRedis) -> None:
    found = await judged(tmp_path, redis, engine=ENGINE)
    assert found.verdict.state == "agrees", found.to_dict()


@pytest.mark.parametrize(
    ("breaking", "code"),
    [
        (raw_logprobs, "logprob_mode"),
        (truncated, "truncated"),
        (stale_cache, "stale_cache"),
        (one_tensor_off, "weights"),
    ],
)
async def test_a_broken_vllm_is_caught_and_named(
    tmp_path: Path, redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch, breaking: Callable[..., None], code: str
) -> None:
    breaking(monkeypatch)
    found = await judged(tmp_path, redis, engine=ENGINE)
    assert (found.verdict.state, found.verdict.code) == ("disagrees", code), found.verdict.sentence
