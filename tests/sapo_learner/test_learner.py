"""The update: the paper's gradient, the same however the step is split (I8), refused whole when it is not finite."""

import copy
import math
import re
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from sapo_learner.advantages import group_advantages
from sapo_learner.attention import IMPLEMENTATION
from sapo_learner.batching import TrainingBatch, collate
from sapo_learner.config import LearnerSettings, OptimizerSettings
from sapo_learner.learner import Learner
from sapo_learner.objectives import Objective, Surrogate, Tokens
from sapo_learner.optimizer import learning_rate
from sapo_learner.policy import Policy, tiny_policy
from sapo_learner.snapshot import weights_digest
from sapo_learner.trajectory import TrajectoryGroup
from tests.recorded import ALPHABET, VOCABULARY, degenerate_group, group, random_group, response, sampled_group

torch.set_num_threads(1)

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sapo": {},
    "grpo": {"clip_low": 0.1, "clip_high": 0.1},  # so that a part of the tokens is clipped
    "gspo": {"clip_low": 0.03, "clip_high": 0.03},
}


def double_policy() -> Policy:
    """A GPT-2 in float64: unlike Qwen3's, its norms do not round to float32, so rounding cannot hide an error."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=24, n_layer=2, n_head=2, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # or every distribution would be uniform
    return Policy(model, None, {})


def settings_of(objective: str = "sapo", **changes: Any) -> LearnerSettings:
    data: dict[str, Any] = {
        "objective": {"name": objective, **OBJECTIVES[objective]},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "max_grad_norm": 1e9},
        "training": {"steps": 10},
    }
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value}
    return LearnerSettings.model_validate(data)


def batch_of(
    groups: Sequence[TrajectoryGroup], settings: LearnerSettings, *, step: int = 0, budget: int = 10**6
) -> TrainingBatch:
    advantages = [group_advantages([each.reward for each in one.trajectories], settings.advantages) for one in groups]
    return collate(
        groups, advantages, step=step, microbatch_tokens=budget, normalise_by=settings.aggregation.normalise_by
    )


def gradients(
    policy: Policy, settings: LearnerSettings, batch: TrainingBatch, temperature: float = 1.0, *, padded: bool = False
) -> Tensor:
    """The step's gradient as one vector, before clipping (max_grad_norm is large)."""
    learner = Learner(copy.deepcopy(policy), settings, temperature=temperature)
    assert learner.policy.model.config._attn_implementation == IMPLEMENTATION
    if padded:  # as for a model that cannot have packed rows
        learner.policy.model.set_attn_implementation("sdpa")
    assert learner.step(batch).applied
    return flat(learner.policy)


def flat(policy: Policy) -> Tensor:
    return torch.cat([each.grad.flatten() for each in policy.model.parameters()])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- The gradient


@pytest.mark.parametrize("normalise_by", ["step", "signal"])
@pytest.mark.parametrize(
    ("objective", "mode"),
    [*product(("sapo", "grpo"), ("sequence_mean", "token_mean", "constant")), ("gspo", "sequence_mean")],
)
def test_i8_microbatches_order_and_padding_do_not_change_the_gradient(objective, mode, normalise_by):
    policy = double_policy()
    length = {"length": 7} if mode == "constant" else {}
    settings = settings_of(objective, aggregation={"mode": mode, "normalise_by": normalise_by, **length})
    groups = [*(random_group(draw) for draw in range(3)), degenerate_group(3)]
    whole = batch_of(groups, settings)
    expected = gradients(policy, settings, whole)
    assert len(whole.microbatches) == 1
    for other in (
        batch_of(groups, settings, budget=1),
        batch_of(groups, settings, budget=40),
        batch_of(groups[::-1], settings, budget=40),
    ):
        assert relative(gradients(policy, settings, other), expected) < 1e-12
    assert relative(gradients(policy, settings, whole, padded=True), expected) < 1e-12


def naive_sapo_loss(policy: Policy, groups: Sequence[TrajectoryGroup], temperature: float) -> Tensor:
    """arXiv 2511.20347 Eq. 5 and 6, negated: one forward pass per response, the paper's sums written out."""
    total, responses = torch.zeros((), dtype=torch.float64), 0
    for one in groups:
        rewards = [each.reward for each in one.trajectories]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
        for each, reward in zip(one.trajectories, rewards, strict=True):
            advantage = (reward - mean) / (std + 1e-6)
            tau = 1.0 if advantage > 0 else 1.05
            ids = torch.tensor([*one.prompt_ids.tolist(), *each.token_ids.tolist()])
            logprobs = (policy.model(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)
            inner = torch.zeros((), dtype=torch.float64)
            for t in range(len(each.token_ids)):
                if each.loss_mask[t]:
                    at = len(one.prompt_ids) + t
                    ratio = (logprobs[at - 1, ids[at]] - float(each.behaviour_logprobs[t])).exp()
                    inner = inner + 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage
            total = total + inner / each.loss_mask.sum()
            responses += 1
    return -total / responses


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_of_a_sapo_step_is_that_of_the_papers_formula(temperature):
    policy, settings = double_policy(), settings_of("sapo")
    groups = [*(random_group(draw) for draw in range(3)), degenerate_group(3)]
    found = gradients(policy, settings, batch_of(groups, settings, budget=40), temperature)
    naive_sapo_loss(policy, groups, temperature).backward()
    assert relative(found, flat(policy)) < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("make", [double_policy, lambda: tiny_policy(ALPHABET, seed=0)])
def test_logprobs_and_entropy_are_those_of_the_models_logits_at_the_temperature(make, temperature):
    policy, settings = make(), settings_of()
    groups = [random_group(draw) for draw in range(2)]
    (microbatch,) = batch_of(groups, settings).microbatches
    tokens = Learner(policy, settings, temperature=temperature).tokens(microbatch)
    rows = (each[None] for each in microbatch.input_ids.split(microbatch.lengths))
    logits = torch.cat([policy.model(input_ids=row).logits[0] for row in rows])
    everything = (logits / temperature).log_softmax(-1)[microbatch.predictor]
    tolerance = 1e-12 if tokens.logprobs.dtype == torch.float64 else 1e-5
    expected = everything.gather(1, microbatch.targets[:, None])[:, 0]
    torch.testing.assert_close(tokens.logprobs, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(tokens.entropy, -(everything.exp() * everything).sum(-1), rtol=0, atol=tolerance)


def test_on_one_batch_sampled_at_age_0_sapo_grpo_and_gspo_give_the_same_first_update():
    policy = tiny_policy(ALPHABET, seed=0)
    groups = [sampled_group(policy, prompt, size=8, draw=draw) for draw, prompt in enumerate(("1+2+3=", "9-4+1="))]
    before = torch.cat([each.detach().flatten() for each in policy.model.parameters()])
    deltas = {}
    for objective in OBJECTIVES:
        settings = LearnerSettings.model_validate({"objective": {"name": objective}, "optimizer": {"warmup_steps": 0}})
        learner = Learner(copy.deepcopy(policy), settings, temperature=1.0)
        report = learner.step(batch_of(groups, settings))
        assert report.applied
        assert report.log_ratio_std < 1e-6
        assert report.policy_age_max == 0
        deltas[objective] = torch.cat([each.detach().flatten() for each in learner.policy.model.parameters()]) - before
    assert deltas["sapo"].norm() > 0
    assert relative(deltas["grpo"], deltas["sapo"]) < 1e-4
    assert relative(deltas["gspo"], deltas["sapo"]) < 1e-4


# ---- The optimizer step


def stepped(settings: LearnerSettings, steps: int, learner: Learner | None = None) -> Learner:
    """A tiny policy's learner after so many more steps, each on groups of its own."""
    learner = learner or Learner(tiny_policy(ALPHABET, seed=0), settings, temperature=1.0)
    for _ in range(steps):
        step = learner.step_count
        learner.step(batch_of([random_group(10 * step), random_group(10 * step + 1)], settings, step=step))
    return learner


def state(learner: Learner) -> tuple[str, str]:
    return weights_digest(learner.policy.tensors()), weights_digest(learner.optimizer_tensors())


def test_optimizer_tensors_continue_bit_for_bit():
    settings = settings_of(optimizer={"weight_decay": 0.01, "max_grad_norm": 0.1})
    expected = stepped(settings, 4)
    saved = stepped(settings, 2)
    weights = {name: tensor.clone() for name, tensor in saved.policy.tensors().items()}
    restored = Learner(tiny_policy(ALPHABET, seed=5), settings, temperature=1.0)
    with torch.no_grad():
        for name, tensor in restored.policy.tensors().items():
            tensor.copy_(weights[name])
    restored.load_optimizer_tensors(saved.optimizer_tensors())
    restored.step_count = saved.step_count
    stepped(settings, 1, saved)  # what was loaded is a copy
    assert state(stepped(settings, 2, restored)) == state(expected)


def test_the_gradient_is_clipped_to_its_norm_and_reported_before():
    settings = settings_of(optimizer={"max_grad_norm": 0.01})
    learner = Learner(tiny_policy(ALPHABET, seed=0), settings, temperature=1.0)
    report = learner.step(batch_of([random_group(0)], settings))
    assert report.gradient_norm > 0.1
    assert float(flat(learner.policy).double().norm()) == pytest.approx(0.01, rel=1e-5)
    loose = settings_of()
    unclipped = gradients(tiny_policy(ALPHABET, seed=0), loose, batch_of([random_group(0)], loose))
    assert float(unclipped.double().norm()) == pytest.approx(report.gradient_norm, rel=1e-5)


class NotANumber(Objective):
    """A loss that is not finite, though its gradient is."""

    def __call__(self, tokens: Tokens) -> Surrogate:
        return Surrogate(loss=tokens.logprobs + math.nan, diagnostics={})


@pytest.mark.parametrize(
    ("factor", "culprit"),
    [
        (math.nan, r"gradient of model\.layers\.1\.mlp\.up_proj\.weight is not finite .*norm nan"),
        (math.inf, r"gradient of model\.layers\.1\.mlp\.up_proj\.weight is not finite"),
        (1e30, r"sum of squared gradients is not finite .*norm inf"),
        (None, r"the loss is not finite \(loss nan"),
    ],
)
@pytest.mark.parametrize("steps_before", [0, 1])
def test_an_update_that_is_not_finite_changes_nothing_but_the_count(factor, culprit, steps_before):
    settings = settings_of()
    learner = stepped(settings, steps_before)
    before = state(learner)
    healthy = learner.objective
    if factor is None:
        learner.objective = NotANumber()
    else:
        poisoned = learner.policy.model.get_parameter("model.layers.1.mlp.up_proj.weight")
        hook = poisoned.register_hook(lambda gradient: gradient * factor)
    report = learner.step(batch_of([random_group(0)], settings))
    assert not report.applied
    assert re.search(culprit, report.refusal), report.refusal
    assert state(learner) == before
    assert report.step == learner.step_count == steps_before + 1
    if factor is None:
        learner.objective = healthy
    else:
        hook.remove()
    assert learner.step(batch_of([random_group(0)], settings)).applied  # nothing of it is left behind
    assert all(each.isfinite().all() for each in learner.policy.model.parameters())


def test_a_step_without_signal_counts_and_changes_nothing():
    settings = settings_of(optimizer={"weight_decay": 0.1})
    learner = stepped(settings, 1)
    before = state(learner)
    report = learner.step(batch_of([degenerate_group(0)], settings))
    assert (report.applied, report.refusal, report.tokens, report.diagnostics) == (False, "", 0, {})
    assert report.step == learner.step_count == 2
    assert state(learner) == before


def test_the_schedules_rate_is_what_adamw_uses():
    settings = settings_of(optimizer={"warmup_steps": 2, "learning_rate": 1e-3})
    learner = Learner(tiny_policy(ALPHABET, seed=0), settings, temperature=1.0)
    before = torch.cat([each.detach().flatten() for each in learner.policy.model.parameters()])
    assert learner.step(batch_of([random_group(0)], settings)).learning_rate == 5e-4
    after = torch.cat([each.detach().flatten() for each in learner.policy.model.parameters()])
    assert float((after - before).abs().max()) == pytest.approx(5e-4, rel=1e-3)  # Adam's first step has the rate's size


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 4, [0.25, 0.5, 0.75, 1, 1, 1]),
        ("constant", 12, [1 / 12, 2 / 12, 3 / 12, 4 / 12, 5 / 12, 6 / 12]),
        ("linear", 1, [1, 1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 0, [1, 0.84, 0.68, 0.52, 0.36, 0.2]),
        ("cosine", 1, [1, 1, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2]),
    ],
)
def test_learning_rate_by_hand(schedule, warmup, expected):
    options = OptimizerSettings(learning_rate=2.0, warmup_steps=warmup, schedule=schedule, final_fraction=0.2)
    rates = [learning_rate(options, step, 6) for step in range(6)]
    assert rates == pytest.approx([2 * each for each in expected], rel=1e-12)


# ---- The report


def test_the_report_counts_exactly_the_tokens_that_the_loss_sees():
    good = response([5, 6, 7], reward=1.0, steps=[2, 2, 4], mask=[True, False, True])
    bad = response([8, 9], reward=0.0, steps=1, logprobs=[-30.0, -3.0])
    settings = settings_of()
    batches = [batch_of([group([good, bad])], settings, step=5, budget=budget) for budget in (1, 1000)]
    for batch in batches:
        learner = Learner(tiny_policy(ALPHABET, seed=0), settings, temperature=1.0)
        tokens = [learner.tokens(each) for each in batch.microbatches]
        report = learner.step(batch)
        log_ratios = torch.cat([each.log_ratio.detach()[each.loss_mask] for each in tokens]).double()
        entropies = torch.cat([each.entropy[each.loss_mask] for each in tokens]).double()
        assert (report.tokens, report.sequences) == (4, 2)
        assert report.policy_age_mean == (3 + 1 + 4 + 4) / 4
        assert report.policy_age_max == 4
        assert report.clamped_fraction == 1 / 4  # one log ratio is above 20
        assert report.entropy == pytest.approx(float(entropies.mean()), rel=1e-12)
        assert report.log_ratio_std == pytest.approx(float(log_ratios.std(correction=0)), rel=1e-9)
        ratios = log_ratios.exp()
        positive = torch.cat([each.advantages[each.loss_mask] > 0 for each in tokens])
        assert report.diagnostics["ratio"] == pytest.approx(
            {
                "all": float(ratios.mean()),
                "positive": float(ratios[positive].mean()),
                "negative": float(ratios[~positive].mean()),
            },
            rel=1e-6,
        )


def test_the_reported_loss_is_the_steps_whatever_the_split():
    settings, policy = settings_of(), double_policy()
    groups = [random_group(draw) for draw in range(3)]
    losses = [
        Learner(copy.deepcopy(policy), settings, temperature=1.0).step(batch_of(groups, settings, budget=budget)).loss
        for budget in (1, 50, 10**6)
    ]
    naive = float(naive_sapo_loss(policy, groups, 1.0).detach())  # with the paper's constant 2 A / tau
    tokenwise = sum(
        float(advantage) * 2 / (1.0 if advantage > 0 else 1.05)
        for one in groups
        for advantage in group_advantages([each.reward for each in one.trajectories], settings.advantages)
    )
    assert losses == pytest.approx([naive + tokenwise / 12] * 3, rel=1e-12)
