"""Learner: one optimizer step from one TrainingBatch.

    log-probs (chunked) -> objective -> weights per token -> backward, per microbatch; then clip and AdamW, once

Weights per token are made from counts over the whole step, so a microbatch's loss is a plain weighted sum and splitting
the step changes nothing (I8). A step whose loss or gradient is not finite leaves the weights alone and says why.
"""

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sapo_learner.aggregation import StepCounts, token_weights
from sapo_learner.batching import Microbatch, TrainingBatch
from sapo_learner.config import LearnerSettings, OptimizerSettings
from sapo_learner.logprobs import token_logprobs
from sapo_learner.objectives import Tokens, build
from sapo_learner.policy import Policy


@dataclass(frozen=True)
class UpdateReport:
    """What one optimizer step did. Token means run over tokens that the loss sees."""

    step: int  # optimizer steps done, this one included
    applied: bool
    refusal: str  # why the update was not applied; "" when it was, or when there was no signal
    learning_rate: float
    loss: float
    gradient_norm: float  # global L2 norm before clipping
    tokens: int
    sequences: int
    entropy: float  # nats per token, of the current policy at the sampling temperature
    log_ratio_std: float  # of current over behaviour log-prob, per token
    policy_age_mean: float  # optimizer steps
    policy_age_max: int
    diagnostics: Mapping[str, Mapping[str, float]]  # name -> mean over {all, positive, negative} advantages
    seconds: Mapping[str, float]  # phase -> wall seconds


@dataclass
class _Sums:
    """Token sums of one step, over its microbatches."""

    values: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    diagnostics: defaultdict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: {key: [0.0, 0.0] for key in ("all", "positive", "negative")})
    )
    policy_age_max: int = 0

    def add(self, tokens: Tokens, diagnostics: Mapping[str, Tensor]) -> None:
        mask = tokens.loss_mask
        log_ratio = tokens.log_ratio.detach()[mask].double()
        assert tokens.policy_age is not None
        age = tokens.policy_age[mask]
        self.values["tokens"] += int(mask.sum())
        self.values["entropy"] += float(tokens.entropy[mask].sum()) if tokens.entropy is not None else 0.0
        self.values["log_ratio"] += float(log_ratio.sum())
        self.values["log_ratio_square"] += float((log_ratio**2).sum())
        self.values["policy_age"] += float(age.sum())
        self.policy_age_max = max(self.policy_age_max, int(age.max()) if len(age) else 0)
        signs = {"all": mask, "positive": mask & (tokens.advantages > 0), "negative": mask & (tokens.advantages < 0)}
        for name, value in diagnostics.items():
            for sign, chosen in signs.items():
                total = self.diagnostics[name][sign]
                total[0] += float(value[chosen].double().sum())
                total[1] += int(chosen.sum())


class Learner:
    """Owns the weights, the optimizer and the number of optimizer steps done."""

    def __init__(self, policy: Policy, settings: LearnerSettings, *, temperature: float) -> None:
        """temperature: of the sampling distribution, applied to the logits before log-probs and entropy."""
        self.policy, self.settings, self.temperature = policy, settings, temperature
        self.objective = build(settings.objective.name, **settings.objective.options)
        self.step_count = 0
        self._device = policy.head_weight.device
        options = settings.optimizer
        self.optimizer = torch.optim.AdamW(
            policy.model.parameters(),
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            weight_decay=options.weight_decay,
        )

    def step(self, batch: TrainingBatch) -> UpdateReport:
        """Apply one update; counts as a step whatever becomes of it."""
        started = time.perf_counter()
        rate = learning_rate(self.settings.optimizer, self.step_count, self.settings.training.steps)
        sums, loss = _Sums(), 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for microbatch in batch.microbatches:
            loss += self._accumulate(microbatch, batch.counts, sums)
        backward_done = time.perf_counter()
        norm, refusal = self._apply(rate, loss) if batch.microbatches else (0.0, "")
        self.step_count += 1
        tokens = max(int(sums.values["tokens"]), 1)
        mean_log_ratio = sums.values["log_ratio"] / tokens
        variance = max(0.0, sums.values["log_ratio_square"] / tokens - mean_log_ratio**2)
        return UpdateReport(
            step=self.step_count,
            applied=bool(batch.microbatches) and not refusal,
            refusal=refusal,
            learning_rate=rate,
            loss=loss,
            gradient_norm=norm,
            tokens=int(sums.values["tokens"]),
            sequences=sum(len(microbatch.input_ids) for microbatch in batch.microbatches),
            entropy=sums.values["entropy"] / tokens,
            log_ratio_std=math.sqrt(variance),
            policy_age_mean=sums.values["policy_age"] / tokens,
            policy_age_max=sums.policy_age_max,
            diagnostics={
                name: {sign: total / count for sign, (total, count) in by_sign.items() if count}
                for name, by_sign in sums.diagnostics.items()
            },
            seconds={"backward": backward_done - started, "optimizer": time.perf_counter() - backward_done},
        )

    def tokens(self, microbatch: Microbatch) -> Tokens:
        """What the objective sees of a microbatch: current log-probs with gradient, and the recorded facts."""
        hidden = self.policy.hidden(microbatch.input_ids.to(self._device), microbatch.attention_mask.to(self._device))
        predictors = hidden.flatten(0, 1)[microbatch.predictor.to(self._device)]
        targets = microbatch.targets.to(self._device)
        logprobs, entropy = token_logprobs(
            predictors, self.policy.head_weight, targets, temperature=self.temperature, bias=self.policy.head_bias
        )
        return Tokens(
            logprobs=logprobs,
            behaviour_logprobs=microbatch.behaviour_logprobs.to(self._device),
            advantages=microbatch.advantages.to(self._device, logprobs.dtype),
            loss_mask=microbatch.loss_mask.to(self._device),
            sequence_ids=microbatch.sequence_ids.to(self._device),
            entropy=entropy,
            policy_age=microbatch.policy_age.to(self._device),
        )

    def _accumulate(self, microbatch: Microbatch, counts: StepCounts, sums: _Sums) -> float:
        """Forward and backward of one microbatch; returns its share of the step's loss."""
        tokens = self.tokens(microbatch)
        surrogate = self.objective(tokens)
        weights = token_weights(tokens, self.settings.aggregation.mode, counts)
        loss = (weights * surrogate.loss).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        sums.add(tokens, surrogate.diagnostics)
        return float(loss.detach())

    def _apply(self, rate: float, loss: float) -> tuple[float, str]:
        """Clip and update, unless something is not finite; returns the gradient norm and the reason for refusing."""
        parameters = [each for each in self.policy.model.parameters() if each.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.settings.optimizer.max_grad_norm))
        if not math.isfinite(loss) or not math.isfinite(norm):
            culprit = next(
                (name for name, each in self.policy.model.named_parameters()
                 if each.grad is not None and not torch.isfinite(each.grad).all()),
                "the loss",
            )  # fmt: skip
            return norm, f"loss {loss}, gradient norm {norm}: not finite, first in {culprit}; weights left unchanged"
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return norm, ""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """AdamW's state as flat names, "<parameter>/<exp_avg | exp_avg_sq | step>"."""
        names: dict[Tensor, str] = {each: name for name, each in self.policy.model.named_parameters()}
        return {
            f"{names[parameter]}/{key}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `optimizer_tensors`."""
        parameters = dict(self.policy.model.named_parameters())
        self.optimizer.state.clear()
        for name, tensor in tensors.items():
            parameter_name, _, key = name.rpartition("/")
            self.optimizer.state[parameters[parameter_name]][key] = tensor.clone()


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Rate of the update after `step` others: linear warm-up, then constant, linear or cosine to the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - settings.warmup_steps) / max(1, steps - 1 - settings.warmup_steps)
    remaining = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * (settings.final_fraction + (1 - settings.final_fraction) * remaining)
