"""Bugs found in public implementations of SAPO: each one built into ours on purpose, and the check that catches it.

Every row of BUGS has a check that the right code passes and the wrong one fails. Not in the table, because our contract
leaves no room for them: a temperature by the sign of the reward (an objective sees advantages alone), and citing the
paper under other authors (that is not code).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sapo_learner.advantages import group_advantages
from sapo_learner.aggregation import StepCounts, count, token_weights
from sapo_learner.config import AdvantageSettings, AggregationSettings
from sapo_learner.objectives import Surrogate, Tokens
from sapo_learner.objectives.sapo import SAPO

torch.set_num_threads(1)


def tokens_at(ratios: Sequence[float], advantages: Sequence[float], ids: Sequence[int] | None = None) -> Tokens:
    """Every token its own response unless `ids` says otherwise."""
    logprobs = torch.tensor([math.log(r) for r in ratios], dtype=torch.float64).requires_grad_()
    return Tokens(
        logprobs=logprobs,
        behaviour_logprobs=torch.zeros_like(logprobs).detach(),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        loss_mask=torch.ones(len(ratios), dtype=torch.bool),
        sequence_ids=torch.arange(len(ratios)) if ids is None else torch.tensor(ids),
    )


def gradients(objective: SAPO, ratios: Sequence[float], advantages: Sequence[float]) -> list[float]:
    tokens = tokens_at(ratios, advantages)
    (found,) = torch.autograd.grad(objective(tokens).loss.sum(), tokens.logprobs)
    return found.tolist()


# ---- Checks


def slope_one_on_policy(objective: SAPO) -> None:
    """T2: at r = 1 the gradient is that of REINFORCE, -A, whatever tau is."""
    assert gradients(objective, [1.0, 1.0], [2.0, -3.0]) == pytest.approx([-2, 3])


def gate_closes_far_from_policy(objective: SAPO) -> None:
    """The rows r = 4 of the check values."""
    found = gradients(objective, [4.0, 4.0], [1.0, -1.0])
    assert found == pytest.approx([-0.722826555695, 0.630444560901], abs=1e-12)


def temperature_by_the_sign_of_the_advantage(objective: SAPO) -> None:
    """tau_pos for A > 0 alone: A = 0 has no gradient, but it has a gate, and that is tau_neg's."""
    gate = objective(tokens_at([2.0] * 3, [1.0, -1.0, 0.0])).diagnostics["gate"]
    assert gate.tolist() == pytest.approx([1 / math.cosh(t / 2) ** 2 for t in (1.0, 1.05, 1.05)])


def diagnostics_show_what_the_gate_takes(objective: SAPO) -> None:
    """There is no clip whose fraction could look healthy; the gate of a far token does show."""
    diagnostics = objective(tokens_at([4.0], [1.0])).diagnostics
    assert not any("clip" in name for name in diagnostics)
    assert diagnostics["gate"].item() < 0.5


Weights = Callable[[Tokens], Tensor]


def length_of_a_response_does_not_count(weights: Weights) -> None:
    """T10: every token of one response twice leaves the paper's double mean where it was."""
    once, twice = tokens_at([2.0, 0.5], [1.0, -1.0]), tokens_at([2.0, 2.0, 0.5], [1.0, 1.0, -1.0], ids=[0, 0, 1])
    values = [(weights(each) * SAPO()(each).loss).sum().item() for each in (once, twice)]
    assert values[0] == pytest.approx(values[1])


def a_group_is_compared_as_a_whole(estimator: Callable[[list[float]], Any]) -> None:
    """(R - mean) / std over all siblings, in python floats."""
    rewards = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    std = math.sqrt(sum((each - 1 / 2) ** 2 for each in rewards) / 6)
    assert list(estimator(rewards)) == pytest.approx([(each - 1 / 2) / (std + 1e-6) for each in rewards])


Share = Callable[[Tokens, StepCounts, int], Tensor]


def microbatches_add_up(share: Share) -> None:
    """I8: unequal microbatches, summed, are one big batch. share: weights of a microbatch, the step's counts, and how
    many microbatches there are."""
    ratios, advantages, ids = [2.0, 0.5, 1.5, 3.0], [1.0, -1.0, -1.0, 2.0], [0, 1, 1, 2]
    whole = tokens_at(ratios, advantages, ids)
    counts = count(whole.loss_mask, whole.sequence_ids)
    expected = (share(whole, counts, 1) * SAPO()(whole).loss).sum().item()
    parts = [tokens_at(ratios[cut], advantages[cut], ids[cut]) for cut in (slice(0, 3), slice(3, 4))]
    assert sum((share(each, counts, 2) * SAPO()(each).loss).sum().item() for each in parts) == pytest.approx(expected)


# ---- Mutants


class Wrong(SAPO):
    """SAPO with its loss replaced."""

    def loss(self, tokens: Tokens, f: Tensor, tau: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, tokens: Tokens) -> Surrogate:
        advantages, ratio = tokens.masked_advantages, tokens.log_ratio.exp()
        tau = torch.where(advantages > 0, torch.full_like(ratio, self.tau_pos), self.tau_neg)
        f = 4 / tau * torch.sigmoid(tau * (ratio - 1))
        return Surrogate(self.loss(tokens, f, tau), super().__call__(tokens).diagnostics)


class Right(Wrong):
    """What the mutants depart from: the paper's loss, uncentred, which passes every check."""

    def loss(self, tokens: Tokens, f: Tensor, tau: Tensor) -> Tensor:
        return -f * tokens.masked_advantages


class ScoreFunctionOfTheGate(Wrong):
    """The gate's value as the coefficient: 2/tau on-policy, and growing where it should close."""

    def loss(self, tokens: Tokens, f: Tensor, tau: Tensor) -> Tensor:
        return -tokens.masked_advantages * f.detach() * tokens.logprobs


class GateIsTheLoss(Wrong):
    def loss(self, tokens: Tokens, f: Tensor, tau: Tensor) -> Tensor:
        return f


class WithoutFourOverTau(Wrong):
    def loss(self, tokens: Tokens, f: Tensor, tau: Tensor) -> Tensor:
        return -f * tau / 4 * tokens.masked_advantages


class GateTimesRatio(Wrong):
    def loss(self, tokens: Tokens, f: Tensor, tau: Tensor) -> Tensor:
        return -f * tokens.log_ratio.exp() * tokens.masked_advantages


class RatioToItself(Wrong):
    """logprob - logprob.detach(): r is 1 everywhere, and the gate is inert."""

    def loss(self, tokens: Tokens, f: Tensor, tau: Tensor) -> Tensor:
        ratio = (tokens.logprobs - tokens.logprobs.detach()).exp()
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * tokens.masked_advantages


class SwappedTemperatures(SAPO):
    def __call__(self, tokens: Tokens) -> Surrogate:
        return SAPO(tau_pos=self.tau_neg, tau_neg=self.tau_pos)(tokens)


class ZeroCountsAsPositive(SAPO):
    """tau_pos for A >= 0."""

    def __call__(self, tokens: Tokens) -> Surrogate:
        positive = SAPO(tau_pos=self.tau_pos, tau_neg=self.tau_pos)(tokens).diagnostics["gate"]
        right = super().__call__(tokens)
        gate = torch.where(tokens.masked_advantages >= 0, positive, right.diagnostics["gate"])
        return Surrogate(right.loss, right.diagnostics | {"gate": gate})


class ClipFractionOfNoClip(SAPO):
    def __call__(self, tokens: Tokens) -> Surrogate:
        right = super().__call__(tokens)
        return Surrogate(right.loss, right.diagnostics | {"clipped": torch.zeros_like(right.loss)})


def by_default(tokens: Tokens) -> Tensor:
    return token_weights(tokens, AggregationSettings().mode)


def token_mean(tokens: Tokens) -> Tensor:
    return token_weights(tokens, "token_mean")


def group_std(rewards: list[float]) -> Any:
    return group_advantages(rewards, AdvantageSettings())


def std_of_what_lies_on_this_rank(rewards: list[float]) -> Any:
    half = len(rewards) // 2
    return np.concatenate([group_std(rewards[:half]), group_std(rewards[half:])])


def counts_of_the_step(tokens: Tokens, counts: StepCounts, microbatches: int) -> Tensor:
    return token_weights(tokens, "sequence_mean", counts)


def mean_of_means(tokens: Tokens, counts: StepCounts, microbatches: int) -> Tensor:
    return token_weights(tokens, "sequence_mean") / microbatches


#: check, right code, wrong code
BUGS: dict[str, tuple[Callable[[Any], None], Any, Any]] = {
    "1 value of the gate as coefficient, on-policy": (slope_one_on_policy, SAPO(), ScoreFunctionOfTheGate()),
    "1 value of the gate as coefficient, far": (gate_closes_far_from_policy, SAPO(), ScoreFunctionOfTheGate()),
    "2 the advantage is left out": (slope_one_on_policy, SAPO(), GateIsTheLoss()),
    "3 the factor 4/tau is left out": (slope_one_on_policy, SAPO(), WithoutFourOverTau()),
    "4 f times r": (slope_one_on_policy, SAPO(), GateTimesRatio()),
    "5 the ratio is that of the policy to itself": (gate_closes_far_from_policy, SAPO(), RatioToItself()),
    "6 temperatures swapped": (temperature_by_the_sign_of_the_advantage, SAPO(), SwappedTemperatures()),
    "6 A = 0 counts as positive": (temperature_by_the_sign_of_the_advantage, SAPO(), ZeroCountsAsPositive()),
    "7 token mean for the paper's": (length_of_a_response_does_not_count, by_default, token_mean),
    "8 a clip fraction of 0": (diagnostics_show_what_the_gate_takes, SAPO(), ClipFractionOfNoClip()),
    "9 std of a part of the group": (a_group_is_compared_as_a_whole, group_std, std_of_what_lies_on_this_rank),
    "10 a mean per microbatch": (microbatches_add_up, counts_of_the_step, mean_of_means),
}


@pytest.mark.parametrize("name", BUGS)
def test_the_check_passes_the_right_code_and_catches_the_bug(name: str) -> None:
    check, right, wrong = BUGS[name]
    check(right)
    with pytest.raises(AssertionError):
        check(wrong)


@pytest.mark.parametrize("check", dict.fromkeys(check for check, right, _ in BUGS.values() if isinstance(right, SAPO)))
def test_the_frame_of_the_mutants_is_right(check: Callable[[SAPO], None]) -> None:
    """So that what a check catches is the bug, not the frame it is built into."""
    check(Right())
