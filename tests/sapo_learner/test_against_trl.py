"""Losses and gradients against TRL's own implementation, run as a library on the same random batch.

Of its trainer only the loss is used: log-probs are given numbers, and what surrounds the loss (accelerator, metrics) is
one process that does nothing. Conventions that differ are named where they are compared; docs/objectives.md lists them.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sapo_learner.aggregation import Mode, token_weights
from sapo_learner.filters import build as build_filter
from sapo_learner.objectives import Tokens, build

trainer = pytest.importorskip("trl.trainer.grpo_trainer")
ROWS, LENGTH = 6, 9
EXACT, ONE_CAST = 1e-9, 1e-6


class Loss(trainer.GRPOTrainer):  # type: ignore[misc, name-defined]
    """TRL's `_compute_loss` and nothing else of its trainer."""

    def __init__(self, **settings: Any) -> None:
        arguments = {"delta": None, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0,
                     "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}  # fmt: skip
        self.args = SimpleNamespace(**{name: settings.pop(name, value) for name, value in arguments.items()})
        self.aux_loss_enabled = self.use_vllm = self._entropy_bonus_enabled = False
        self.top_entropy_quantile, self.off_policy_mask_threshold, self.beta = 1.0, None, 0.0
        self.importance_sampling_level, self.epsilon_low, self.epsilon_high = "token", 0.2, 0.2
        self.max_completion_length, self.current_gradient_accumulation_steps = LENGTH, 1
        self.model = SimpleNamespace(training=False)
        self.accelerator = SimpleNamespace(
            num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
        )
        self._metrics: dict[str, Any] = {"eval": defaultdict(list)}
        vars(self).update(settings)

    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        return self.given, torch.ones_like(self.given), None

    def of(self, batch: "Batch") -> tuple[float, Tensor]:
        """Loss, and its gradient with respect to the log-probs [ROWS, LENGTH]."""
        self.given = batch.logprobs.clone().requires_grad_()
        zeros = torch.zeros(ROWS, 1, dtype=torch.int64)
        inputs = {
            "prompt_ids": zeros, "prompt_mask": zeros + 1, "completion_ids": batch.mask.long(),
            "completion_mask": batch.mask.long(), "advantages": batch.advantages,
            "old_per_token_logps": batch.behaviour, "num_items_in_batch": batch.mask.sum(),
        }  # fmt: skip
        loss = self._compute_loss(None, inputs)
        (gradient,) = torch.autograd.grad(loss, self.given)
        return float(loss.detach()), gradient


class Batch:
    """Responses of different lengths in rows; float64. Ratios are on both sides of every bound."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.behaviour = -normal(ROWS, LENGTH).abs() - 0.1
        self.logprobs = self.behaviour + 0.5 * normal(ROWS, LENGTH)
        self.advantages = normal(ROWS)
        lengths = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=generator)
        self.mask = torch.arange(LENGTH)[None] < lengths

    def tokens(self, logprobs: Tensor) -> Tokens:
        rows = torch.arange(ROWS)[:, None].expand(ROWS, LENGTH)
        return Tokens(
            logprobs=logprobs.flatten(), behaviour_logprobs=self.behaviour.flatten(),
            advantages=self.advantages[:, None].expand(ROWS, LENGTH).flatten(), loss_mask=self.mask.flatten(),
            sequence_ids=rows.flatten(),
        )  # fmt: skip


def ours(batch: Batch, name: str, mode: Mode, length: int | None = None, **options: Any) -> tuple[float, Tensor]:
    logprobs = batch.logprobs.clone().requires_grad_()
    tokens = batch.tokens(logprobs)
    loss = (token_weights(tokens, mode, length=length) * build(name, **options)(tokens).loss).sum()
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return float(loss.detach()), gradient


seeds = pytest.mark.parametrize("seed", range(5))


@seeds
@pytest.mark.parametrize(("tau_pos", "tau_neg"), [(1.0, 1.05), (10.0, 12.0)])
def test_sapo(seed: int, tau_pos: float, tau_neg: float) -> None:
    """TRL's temperatures become float32 in a torch.where of two numbers (1.05 is then 1.0499999523), and its value is
    not centred: ours leaves out 2 / tau."""
    batch = Batch(seed)
    theirs, gradient = Loss(loss_type="sapo", sapo_temperature_pos=tau_pos, sapo_temperature_neg=tau_neg).of(batch)
    value, own = ours(batch, "sapo", "sequence_mean", tau_pos=tau_pos, tau_neg=tau_neg)
    tau = torch.where(batch.advantages > 0, tau_pos, tau_neg)
    assert value - float((2 / tau * batch.advantages).mean()) == pytest.approx(theirs, abs=ONE_CAST)
    torch.testing.assert_close(own, gradient, atol=ONE_CAST, rtol=ONE_CAST)


@seeds
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.1, 0.5)])
def test_grpo(seed: int, low: float, high: float) -> None:
    batch = Batch(seed)
    theirs, gradient = Loss(loss_type="grpo", epsilon_low=low, epsilon_high=high).of(batch)
    value, own = ours(batch, "grpo", "sequence_mean", clip_low=low, clip_high=high)
    assert value == pytest.approx(theirs, abs=EXACT)
    torch.testing.assert_close(own, gradient, atol=EXACT, rtol=EXACT)


@seeds
def test_dapo(seed: int) -> None:
    batch = Batch(seed)
    theirs, gradient = Loss(loss_type="dapo", epsilon_high=0.28).of(batch)
    value, own = ours(batch, "grpo", "token_mean", clip_low=0.2, clip_high=0.28)
    assert value == pytest.approx(theirs, abs=EXACT)
    torch.testing.assert_close(own, gradient, atol=EXACT, rtol=EXACT)


@seeds
def test_dr_grpo(seed: int) -> None:
    batch = Batch(seed)
    theirs, gradient = Loss(loss_type="dr_grpo").of(batch)
    value, own = ours(batch, "grpo", "constant", length=LENGTH)
    assert value == pytest.approx(theirs, abs=EXACT)
    torch.testing.assert_close(own, gradient, atol=EXACT, rtol=EXACT)


@seeds
def test_gspo(seed: int) -> None:
    """In TRL: loss_type grpo with importance_sampling_level sequence."""
    batch = Batch(seed)
    loss = Loss(loss_type="grpo", importance_sampling_level="sequence", epsilon_low=0.1, epsilon_high=0.3)
    theirs, gradient = loss.of(batch)
    value, own = ours(batch, "gspo", "sequence_mean", clip_low=0.1, clip_high=0.3)
    assert value == pytest.approx(theirs, abs=EXACT)
    torch.testing.assert_close(own, gradient, atol=EXACT, rtol=EXACT)


@seeds
def test_cispo(seed: int) -> None:
    """TRL's epsilon_high is the bound itself, ours the width above 1; its value is a score-function form's, ours is 0
    on-policy, so gradients alone are compared."""
    batch = Batch(seed)
    _, gradient = Loss(loss_type="cispo", epsilon_high=1.3).of(batch)
    _, own = ours(batch, "cispo", "token_mean", clip_high=0.3)
    torch.testing.assert_close(own, gradient, atol=EXACT, rtol=EXACT)


@seeds
def test_vespo(seed: int) -> None:
    """TRL's constants become float32 in a torch.where of two numbers; gradients alone, as for CISPO."""
    batch = Batch(seed)
    _, gradient = Loss(loss_type="vespo").of(batch)
    _, own = ours(batch, "vespo", "token_mean")
    torch.testing.assert_close(own, gradient, atol=ONE_CAST, rtol=ONE_CAST)


@seeds
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.5])
def test_negative_sequence_mask(seed: int, threshold: float) -> None:
    batch = Batch(seed)
    _, gradient = Loss(loss_type="grpo", off_policy_mask_threshold=threshold).of(batch)
    logprobs = batch.logprobs.clone().requires_grad_()
    tokens = batch.tokens(logprobs)
    keep = build_filter("negative_sequence_mask", threshold=threshold)(tokens)
    loss = (token_weights(tokens, "sequence_mean") * keep * build("grpo")(tokens).loss).sum()
    (own,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(own, gradient, atol=EXACT, rtol=EXACT)
