"""I8 for every objective, filter and advantage estimator: however a step is split and packed, its gradient is the same.
And what an objective that sees the whole step first (`prepare`) is given.
"""

import copy

import pytest
import torch
from torch import Tensor

from sapo_learner import filters, objectives
from sapo_learner.advantages import step_advantages
from sapo_learner.config import LearnerSettings
from sapo_learner.learner import Learner
from sapo_learner.objectives import Objective, Tokens
from sapo_learner.policy import Policy
from sapo_learner.step_report import UpdateReport
from sapo_learner.train import Position, train
from services.wire import decode, encode
from tests.recorded import RecordedLog, degenerate_group
from tests.sapo_learner.recorded_steps import (
    EPSILON,
    GROUPS,
    OPTIONS,
    MeanCapped,
    batch_of,
    double_policy,
    recorded,
    settings_of,
    stepped,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return double_policy()


def assert_same_however_split(
    policy: Policy, settings: LearnerSettings, objective: Objective | None = None
) -> tuple[UpdateReport, Tensor]:
    """The step in one row, one response at a time, packed in another order, and in padded rows."""
    whole = batch_of(settings)
    assert len(whole.microbatches) == 1
    report, expected = stepped(policy, settings, whole, objective)
    for other, gradient in (
        stepped(policy, settings, batch_of(settings, budget=1), objective),
        stepped(policy, settings, batch_of(settings, GROUPS[::-1], budget=40), objective),
        stepped(policy, settings, whole, objective, padded=True),
    ):
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
    assert told == [list(each.groups) for each in batch.microbatches] * passes


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
