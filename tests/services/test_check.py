"""`sapo check` says that an honest engine agrees, and names what is wrong with one that does not.

The whole system in this process, with an engine that is broken on purpose, and the real command once.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import generate_latest
from torch import Tensor

from sapo_learner.agreement import TokenTable
from sapo_learner.batching import collate
from sapo_learner.config import LearnerSettings, parse
from sapo_learner.learner import Learner
from sapo_learner.policy import tiny_policy
from sapo_learner.snapshot import weights_digest
from services.check import PROBE, _samples, moving, small
from services.diagnosis import Evidence, diagnose
from services.judge import Judgement, judge
from services.rollout.engines import PolicyVersion, SampleRequest, TokenDelta, decoder
from services.rollout.engines.decoder import BatchDecoder
from services.runstore import EmbeddedRedis
from services.runtime.changes import changes
from services.runtime.metrics import RolloutMetrics
from services.runtime.settings import dump_config
from tests.command_line import sapo
from tests.recorded import ALPHABET, sampled_group
from tests.system import jsonl_run, system

pytestmark = [pytest.mark.timeout(300)]
Patch = Callable[[pytest.MonkeyPatch], None]


async def judged(directory: Path, redis: EmbeddedRedis, **sections: Any) -> Judgement:
    """A run whose weights change at every step, while long responses are under way."""
    config = jsonl_run(
        directory, 400, "1",
        **{
            "training": {"steps": 6, "groups_per_step": 4, "max_policy_age": 6}, "pacing": {"lookahead": 2},
            "sampling": {"group_size": 4, "max_tokens": 100, "temperature": 0.7},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
            "evaluation": {"every": 1000, "samples": 1, "boundary_samples": 1},
            "probe": {"on_miss": "warn"},  # or the worker would end before a token that is wrong was sent
            **sections,
        },
    )  # fmt: skip
    async with system(config, redis.url) as running:
        await running.finished()
    return judge(config.run.directory)


def sampling(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Patch:
    """change: logits at the run's temperature and at 1 -> the logits to sample from and those to record."""

    def mutated(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        drawn, recorded = change(logits / temperatures[:, None], logits)
        ids, _ = original(drawn, torch.ones_like(temperatures), uniforms)
        return ids, recorded.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]

    original = decoder._sample
    return lambda patch: patch.setattr(decoder, "_sample", mutated)


def nucleus(logits: Tensor, top_p: float = 0.9) -> Tensor:
    ordered, order = logits.softmax(dim=-1).sort(descending=True)
    beyond = ordered.cumsum(dim=-1) - ordered >= top_p
    return logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))


def stale_cache(patch: pytest.MonkeyPatch) -> None:
    """New weights, but keys and values of responses under way stay what they were."""
    update = BatchDecoder.update_weights

    def forgetful(self: BatchDecoder, *arguments: Any) -> dict[str, TokenDelta]:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "_prefill", lambda first: None)
            return update(self, *arguments)

    patch.setattr(BatchDecoder, "update_weights", forgetful)


def one_tensor_off(patch: pytest.MonkeyPatch) -> None:
    update = BatchDecoder.update_weights

    def perturbed(self: BatchDecoder, tensors: Mapping[str, Tensor], version: PolicyVersion) -> dict[str, TokenDelta]:
        name = next(each for each in tensors if "down_proj" in each)
        return update(self, {**tensors, name: tensors[name] * 1.01}, version)

    patch.setattr(BatchDecoder, "update_weights", perturbed)


def in_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Weights are rounded on their way into the engine, from the first policy on."""
    add = BatchDecoder.add

    def rounded(self: BatchDecoder, requests: Sequence[SampleRequest]) -> None:
        with torch.no_grad():
            for parameter in self.policy.model.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
        add(self, requests)

    patch.setattr(BatchDecoder, "add", rounded)


MUTANTS: dict[str, tuple[Patch, str]] = {
    "log-probs at temperature 1, tokens at 0.7": (sampling(lambda scaled, raw: (scaled, raw)), "logprob_mode"),
    "temperature ignored": (sampling(lambda scaled, raw: (raw, raw)), "temperature"),
    "top-p 0.9, full log-probs": (sampling(lambda scaled, raw: (nucleus(scaled), scaled)), "truncated"),
    "top-p 0.9, renormalised": (sampling(lambda scaled, raw: (nucleus(scaled), nucleus(scaled))), "truncated"),
    "cache kept over updates": (stale_cache, "stale_cache"),
    "one tensor 1 % off": (one_tensor_off, "weights"),
    "bfloat16 in place of float32": (in_bfloat16, "dtype"),
}


def test_a_probe_that_has_no_figure_yet_is_none() -> None:
    metrics = RolloutMetrics()
    assert _samples(generate_latest(metrics.registry).decode(), PROBE) == []
    metrics.probe_max.set(0.25)
    assert _samples(generate_latest(metrics.registry).decode(), PROBE) == [0.25]


async def test_an_honest_engine_agrees(tmp_path: Path, redis: EmbeddedRedis) -> None:
    found = await judged(tmp_path, redis)
    assert found.verdict.state == "agrees", found.to_dict()


@pytest.mark.parametrize("mutant", MUTANTS)
async def test_a_broken_engine_is_caught_and_named(
    tmp_path: Path, redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    breaking, code = MUTANTS[mutant]
    breaking(monkeypatch)
    found = await judged(tmp_path, redis)
    assert (found.verdict.state, found.verdict.code) == ("disagrees", code), found.verdict.sentence


def evidence(
    off: Mapping[str, slice], *, drift: float = 1.0, changed: bool = True, recurring: bool = False
) -> Evidence:
    """400 tokens in responses of 10, the second half after an update. off: rows that are wrong by +-0.01 nats."""
    count, generator = 400, np.random.default_rng(0)
    updated, own = np.arange(count) >= count // 2, np.full(count, np.log(0.02))
    recorded = own.copy()
    for rows in off.values():
        recorded[rows] += generator.choice([-0.01, 0.01], size=len(recorded[rows]))
    position = np.arange(count) % 10
    table = TokenTable(
        recorded=recorded, logprobs=own, raw=own, before=generator.random(count) * 0.98, peak=np.full(count, 0.02),
        first=own + drift, version=updated.astype(np.int64), position=position,
        changed=updated & changed & (position > 4), recurring=updated & recurring,
        response=np.arange(count) // 10, advantage=np.ones(count),
    )  # fmt: skip
    return Evidence(table, 1.0, "float32", lambda: generator.normal(size=count // 2))


CASES = {
    "all is well": (evidence({}), "agrees", ""),
    "weights that stand still show no stale cache": (evidence({}, drift=1e-3), "untested", "standing_still"),
    "wrong from the start": (evidence({"all": slice(None)}), "disagrees", "weights"),
    "wrong while decoding": (
        evidence({str(position): slice(position, None, 10) for position in range(1, 10)}), "disagrees", "decoding"
    ),
    "wrong after an update": (evidence({"later": slice(200, None)}), "disagrees", "weights"),
    "wrong in responses under way": (
        evidence({str(position): slice(200 + position, None, 10) for position in range(5, 10)}),
        "disagrees", "stale_cache",
    ),
    "wrong after an update, for prompts that were all seen before": (
        evidence({"later": slice(200, None)}, recurring=True), "disagrees", "cache_or_weights"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_pattern_of_differences_has_its_cause(case: str) -> None:
    given, state, code = CASES[case]
    verdict = diagnose(given)
    assert (verdict.state, verdict.code) == (state, code), verdict.sentence
    assert state == "agrees" or verdict.fix in verdict.sentence


def test_a_check_is_the_users_run_made_small(tmp_path: Path) -> None:
    given = jsonl_run(
        tmp_path, 8, "1", training={"groups_per_step": 32, "max_policy_age": 3, "steps": 500},
        sampling={"temperature": 0.7, "max_tokens": 33}, pacing={"lookahead": 3, "publish_every": 4},
    )  # fmt: skip
    frozen = small(given, tmp_path / "check", steps=3)
    assert (frozen.sampling, frozen.task, frozen.policy, frozen.engine) == (
        given.sampling, given.task, given.policy, given.engine,
    )  # fmt: skip
    assert frozen.run.name != given.run.name, "in a Redis that others use, it must not meet the user's run"
    assert (frozen.training.groups_per_step, frozen.training.steps, frozen.pacing.publish_every) == (4, 3, 1)
    later = moving(frozen, steps=5, rate=1e-3)
    assert changes(frozen, later) == ["optimizer.learning_rate", "training.steps"], "all else is one run"


def test_a_frozen_learner_changes_no_bit() -> None:
    policy = tiny_policy(ALPHABET, seed=0)
    before = weights_digest(policy.tensors())
    settings = parse(
        LearnerSettings, {"optimizer": {"learning_rate": 0.0, "warmup_steps": 0}}, where="test"
    )  # fmt: skip
    learner = Learner(policy, settings, temperature=1.0)
    group = sampled_group(policy, "1+2=", size=4)
    report = learner.step(collate([group], [np.array([1.0, -1.0, 1.0, -1.0])], step=0, microbatch_tokens=4096))
    assert report.applied
    assert report.gradient_norm > 0
    assert weights_digest(policy.tensors()) == before


def test_the_command_on_an_untrained_tiny_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAPO_REDIS_URL", raising=False)
    config = jsonl_run(tmp_path, 200, "1", sampling={"group_size": 4, "max_tokens": 100}, local={"rollout_workers": 1})
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config))
    outcome = sapo("check", path, "--steps", 2, "--json")
    assert outcome.code == 0, outcome.err + outcome.out
    report = json.loads(outcome.out)
    assert report["verdict"]["sentence"] == "agrees"
    base = report["sync"][0]["digest"]
    unmoved = sum(each["tokens"] for each in report["sync"] if each["digest"] == base)
    assert report["difference"]["before the first update"]["tokens"] == unmoved, "weights count, not version numbers"
    assert report["difference"]["after an update"]["tokens"] > 0
    assert report["directory"] is None, "nothing is left behind"
