"""Overlong shaping: DAPO arXiv 2503.14476, Eq. 13, as a reward component of its own."""

from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest

from sapo_learner.config import parse
from sapo_learner.errors import ConfigError
from services.rollout.engines import PolicyVersion, Sampled, TokenDelta
from services.rollout.responder import Responder
from services.rollout.scoring import Scorer
from services.runtime.metrics import RolloutMetrics
from services.runtime.settings import RunConfig
from services.tasks import Prompt

MAX_TOKENS, BUFFER = 20, 8


class Tokenizer:
    """One character per token."""

    chat_template = None
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}
    all_special_tokens: ClassVar[list[str]] = []

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return "x" * len(token_ids)


def naive(length: int, penalty: float) -> float:
    """The paper's three cases, with L_max = MAX_TOKENS and L_cache = BUFFER."""
    if length <= MAX_TOKENS - BUFFER:
        return 0.0
    if length <= MAX_TOKENS:
        return penalty * ((MAX_TOKENS - BUFFER) - length) / BUFFER
    raise AssertionError("no response is longer")


@pytest.fixture(params=[1.0, 0.5])
def shaped(request: pytest.FixtureRequest) -> Any:
    scoring = {"overlong_buffer": BUFFER, "overlong_penalty": request.param}
    config = RunConfig.model_validate({"sampling": {"max_tokens": MAX_TOKENS}, "scoring": scoring})
    return config


async def rewards(config: RunConfig, lengths: list[int]) -> AsyncIterator[dict[str, float]]:
    metrics = RolloutMetrics()
    sampled = []
    for length in lengths:
        one = Sampled()
        one.add(TokenDelta([1] * length, [-1.0] * length, PolicyVersion(0, 0), "stop"))
        sampled.append(one)
    with Scorer(config.mixture, config.scoring, metrics) as scorer:
        responder = Responder(None, Tokenizer(), scorer, config, metrics)  # type: ignore[arg-type]
        for each in await responder.rewards("arithmetic", Prompt(id="p", content="1+1+1="), sampled):
            yield each


async def test_the_penalty_grows_linearly_over_the_buffer(shaped: RunConfig) -> None:
    lengths = list(range(1, MAX_TOKENS + 1))
    found = [each async for each in rewards(shaped, lengths)]
    expected = [naive(length, shaped.scoring.overlong_penalty) for length in lengths]
    assert [each["overlong"] for each in found] == pytest.approx(expected)
    assert all(each.keys() == {"correct", "overlong"} for each in found)


async def test_without_a_buffer_there_is_no_such_component() -> None:
    config = RunConfig.model_validate({"sampling": {"max_tokens": MAX_TOKENS}})
    assert [each async for each in rewards(config, [MAX_TOKENS])] == [{"correct": 0.0}]


def test_a_buffer_beyond_the_token_limit_is_refused() -> None:
    data = {"sampling": {"max_tokens": 10}, "scoring": {"overlong_buffer": 11}}
    with pytest.raises(ConfigError, match=r"scoring.overlong_buffer 11 exceeds sampling.max_tokens 10"):
        parse(RunConfig, data, where="run.yaml")
