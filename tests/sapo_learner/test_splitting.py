"""I8 for every objective, filter and advantage estimator: however a step is split and packed, its gradient is the same.
And what an objective that sees the whole step first (`prepare`) is given.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from sapo_learner import filters, objectives
from sapo_learner.advantages import step_advantages
from sapo_learner.batching import Microbatch, TrainingBatch, collate
from sapo_learner.config import LearnerSettings
from sapo_learner.learner import Learner, UpdateReport
from sapo_learner.objectives import Objective, Surrogate, Tokens
from sapo_learner.policy import Policy
from sapo_learner.train import Position, train
from sapo_learner.trajectory import TrajectoryGroup
from services.wire import decode, encode
from tests.recorded import VOCABULARY, RecordedLog, degenerate_group, random_group

torch.set_num_threads(1)
STEP = 6  # optimizer steps done
EPSILON = 1e-12

#: What an objective is defined with, where it refuses the defaults.
REQUIRED: dict[str, dict[str, Any]] = {
    "dapo": {"aggregation": {"mode": "token_mean"}},
    "dr_grpo": {"aggregation": {"mode": "constant", "length": 8}, "advantages": {"std": "none"}},
    "rloo": {"advantages": {"estimator": "leave_one_out"}},
}
#: Options under which a filter keeps some and drops some of the tokens below.
OPTIONS: dict[str, dict[str, Any]] = {"policy_age": {"max_age": 3}, "dppo_mask": {"threshold": 0.05}}


def recorded(draw: int) -> TrajectoryGroup:
    """A random group of some age with two reward components, and every other response cut off."""
    one = random_group(draw, policy_step=draw % 4 + 1, spread=1.0)
    responses = [
        replace(
            each,
            finish_reason="length" if i % 2 else "stop",
            rewards={**each.rewards, "short": (draw + 3 * i) % 5 / 4},
        )
        for i, each in enumerate(one.trajectories)
    ]
    return replace(one, trajectories=tuple(responses))


GROUPS = [*(recorded(draw) for draw in range(4)), degenerate_group(4)]


@pytest.fixture(scope="module")
def policy() -> Policy:
    """A GPT-2 in float64, so that rounding cannot hide an error."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for parameter in model.parameters():
        parameter.data.mul_(8)  # or every distribution would be uniform
    return Policy(model, None, {})


def settings_of(objective: str = "sapo", **sections: Any) -> LearnerSettings:
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 0, "max_grad_norm": 1e9}
    data = {"objective": {"name": objective}, "optimizer": optimizer, "training": {"steps": 100}}
    return LearnerSettings.model_validate(data | REQUIRED.get(objective, {}) | sections)


def batch_of(settings: LearnerSettings, groups: Sequence[TrajectoryGroup] = GROUPS, budget: int = 10**6):
    advantages = step_advantages(groups, settings.advantages)
    return collate(groups, advantages, step=STEP, microbatch_tokens=budget)


def wider(microbatch: Microbatch, columns: int) -> Microbatch:
    """The same rows with more padding."""
    width = microbatch.input_ids.shape[1]
    return replace(
        microbatch,
        input_ids=torch.nn.functional.pad(microbatch.input_ids, (0, columns), value=5),
        attention_mask=torch.nn.functional.pad(microbatch.attention_mask, (0, columns)),
        predictor=microbatch.predictor // width * (width + columns) + microbatch.predictor % width,
    )


def other_ways(settings: LearnerSettings) -> list[TrainingBatch]:
    """The same step one response at a time, packed in another order, and padded further."""
    whole = batch_of(settings)
    assert len(whole.microbatches) == 1
    padded = replace(whole, microbatches=tuple(wider(each, 3) for each in whole.microbatches))
    return [batch_of(settings, budget=1), batch_of(settings, GROUPS[::-1], budget=40), padded]


def stepped(policy: Policy, settings: LearnerSettings, batch: TrainingBatch, objective: Objective | None = None):
    """The report of one step, and its gradient as one vector before clipping (max_grad_norm is large)."""
    learner = Learner(copy.deepcopy(policy), settings, temperature=1.0)
    learner.objective = objective or learner.objective
    report = learner.step(batch)
    assert report.applied
    return report, torch.cat([each.grad.flatten() for each in learner.policy.model.parameters()])


def assert_same_however_split(
    policy: Policy, settings: LearnerSettings, objective: Objective | None = None
) -> tuple[UpdateReport, Tensor]:
    report, expected = stepped(policy, settings, batch_of(settings), objective)
    for batch in other_ways(settings):
        other, gradient = stepped(policy, settings, batch, objective)
        assert float((gradient - expected).norm()) <= EPSILON * float(expected.norm())
        assert other.loss == pytest.approx(report.loss, rel=1e-10, abs=EPSILON)
    return report, expected


@pytest.mark.parametrize("name", ["none", *filters.available()])
@pytest.mark.parametrize("objective", objectives.available())
def test_i8_every_objective_under_every_filter(policy: Policy, objective: str, name: str) -> None:
    chosen = [] if name == "none" else [{"name": name, **OPTIONS.get(name, {})}]
    report, gradient = assert_same_however_split(policy, settings_of(objective, filters=chosen))
    assert report.sequences == 16
    if chosen:
        assert 0 < report.diagnostics[f"dropped_{name}"]["all"] < 1
    assert gradient.norm() > 0


@pytest.mark.parametrize("std", ["population", "sample"])
@pytest.mark.parametrize("estimator", ["group", "leave_one_out", "batch_whitened", "gdpo"])
def test_i8_every_estimator(policy: Policy, estimator: str, std: str) -> None:
    settings = settings_of(advantages={"estimator": estimator, "std": std})
    _, gradient = assert_same_however_split(policy, settings)
    _, other = stepped(
        policy, settings_of(advantages={"std": "none"}), batch_of(settings_of(advantages={"std": "none"}))
    )
    assert float((gradient - other).norm()) > 1e-3 * float(other.norm())


def test_i8_filters_together(policy: Policy) -> None:
    chosen = [{"name": name, **OPTIONS.get(name, {})} for name in ("policy_age", "negative_sequence_mask", "icepop")]
    _, gradient = assert_same_however_split(policy, settings_of(filters=chosen))
    _, plain = stepped(policy, settings_of(), batch_of(settings_of()))
    assert float((gradient - plain).norm()) > 1e-3 * float(plain.norm())


# ---- prepare


class MeanCapped(Objective):
    """The ratio, cut off at its mean over the step."""

    needs_step = True
    seen: ClassVar[list[Tokens]] = []
    cap: float | None = None

    def prepare(self, step: Tokens) -> "MeanCapped":
        MeanCapped.seen.append(step)
        ratio = step.log_ratio.exp()[step.loss_mask]
        return MeanCapped(cap=float(ratio.mean()))

    def __call__(self, tokens: Tokens) -> Surrogate:
        ratio = tokens.log_ratio.exp()
        return Surrogate(loss=-ratio.clamp(max=self.cap) * tokens.masked_advantages, diagnostics={})


class Capped(MeanCapped):
    """The same with a cap from elsewhere."""

    needs_step = False


@pytest.fixture
def seen() -> list[Tokens]:
    MeanCapped.seen.clear()
    return MeanCapped.seen


def test_i8_an_objective_that_sees_the_step_first(policy: Policy, seen: list[Tokens]) -> None:
    settings = settings_of()
    _, found = assert_same_however_split(policy, settings, MeanCapped())
    batch = batch_of(settings)
    (microbatch,) = batch.microbatches
    ratio = Learner(policy, settings, temperature=1.0).tokens(microbatch).log_ratio.exp().detach()
    _, expected = stepped(policy, settings, batch, Capped(cap=float(ratio[microbatch.loss_mask].mean())))
    assert float((found - expected).norm()) <= EPSILON * float(expected.norm())


def test_prepare_sees_every_token_of_the_step_once_and_without_gradient(policy: Policy, seen: list[Tokens]) -> None:
    """In the log's order whatever the split, so that what it computes does not even differ by rounding."""
    settings = settings_of()
    for budget in (10**6, 40, 1):
        learner = Learner(copy.deepcopy(policy), settings, temperature=1.0)
        learner.objective = MeanCapped()
        learner.step(batch_of(settings, budget=budget))
        assert learner.objective.cap is None  # prepared for one step
    for step in seen:
        assert not step.logprobs.requires_grad
        assert step.sequence_ids.unique_consecutive().tolist() == list(range(16))
        assert step.hidden is None
        for field in ("behaviour_logprobs", "advantages", "loss_mask", "sequence_ids", "policy_age", "truncated"):
            assert torch.equal(getattr(step, field), getattr(seen[0], field))
        torch.testing.assert_close(step.logprobs, seen[0].logprobs, rtol=0, atol=EPSILON)
    assert len(seen) == 3


@pytest.mark.parametrize(("objective", "passes"), [(None, 1), (MeanCapped(), 2)])
def test_only_an_objective_that_needs_it_costs_another_pass(policy: Policy, objective, passes: int) -> None:
    learner = Learner(copy.deepcopy(policy), settings_of(), temperature=1.0)
    learner.objective = objective or learner.objective
    batch = batch_of(settings_of(), budget=40)
    forward, told = [], []
    learner.policy.model.base_model.register_forward_hook(lambda *_: forward.append(torch.is_grad_enabled()))
    learner.step(batch, told.append)
    count = len(batch.microbatches)
    assert forward == [False] * count * (passes - 1) + [True] * count
    assert told == [each.groups for each in batch.microbatches] * passes


def test_a_step_without_signal_prepares_nothing(policy: Policy, seen: list[Tokens]) -> None:
    learner = Learner(copy.deepcopy(policy), settings_of(), temperature=1.0)
    learner.objective = MeanCapped()
    assert not learner.step(batch_of(settings_of(), [degenerate_group(0)])).applied
    assert seen == []


# ---- Their place in the loop


def test_the_loop_estimates_over_all_groups_of_a_step_and_obeys_settings_from_the_log(policy: Policy) -> None:
    training = {"steps": 2, "groups_per_step": 3}
    before = settings_of(training=training, advantages={"estimator": "gdpo", "weights": {"short": 0.5}})
    after = settings_of(training=training, advantages={"estimator": "leave_one_out"}, filters=[{"name": "overlong"}])
    groups = [encode(recorded(draw)) for draw in range(6)]
    log = RecordedLog([*groups[:3], after, *groups[3:]])
    learner = Learner(copy.deepcopy(policy), before, temperature=1.0)
    reports = list(train(learner, log, Position(), decode=decode))
    for report, settings in zip(reports, (before, after), strict=True):
        expected = step_advantages(report.groups, settings.advantages)
        assert [each.tolist() for each in report.advantages] == [each.tolist() for each in expected]
        assert ("dropped_overlong" in report.update.diagnostics) == bool(settings.filters)
