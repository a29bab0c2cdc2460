"""Learner: one optimizer step from one TrainingBatch.

    log-probs (chunked) -> objective, filters -> weights per token -> backward, per microbatch; then clip, AdamW

Weights per token are made from counts over the whole step, so a microbatch's loss is a plain weighted sum and splitting
the step changes nothing (I8). A step whose loss or gradient is not finite leaves the weights alone and says why.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sapo_learner.aggregation import StepCounts, token_weights
from sapo_learner.batching import Microbatch, TrainingBatch
from sapo_learner.config import LearnerSettings, OptimizerSettings
from sapo_learner.diagnostics import StepDiagnostics
from sapo_learner.filters import build_all, combine
from sapo_learner.logprobs import token_logprobs
from sapo_learner.memory import enough_memory
from sapo_learner.objectives import Objective, Tokens, build, concatenated
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
    clamped_fraction: float  # of tokens whose log ratio was cut off, and with it their gradient
    log_ratio_std: float  # of current over behaviour log-prob, per token
    policy_age_mean: float  # optimizer steps
    policy_age_max: int
    diagnostics: Mapping[str, Mapping[str, float]]  # name -> group of tokens -> figure, see sapo_learner.diagnostics
    seconds: Mapping[str, float]  # phase -> wall seconds


class _Sums:
    """Sums of one step over the tokens that the loss sees, microbatch by microbatch; floats in double precision."""

    def __init__(self) -> None:
        self.tokens = 0
        self.policy_age = 0
        self.policy_age_max = 0
        self.every_objective = StepDiagnostics()
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._diagnostics: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])  # sum, tokens

    def add(self, tokens: Tokens, diagnostics: Mapping[str, Tensor]) -> None:
        mask = tokens.loss_mask
        assert tokens.policy_age is not None
        assert tokens.entropy is not None
        log_ratio, age = tokens.log_ratio.detach(), tokens.policy_age[mask]
        self.tokens += len(age)
        self.policy_age += int(age.sum())
        self.policy_age_max = max(self.policy_age_max, int(age.max()))  # a response in a microbatch has a token
        for name, values in {
            "entropy": tokens.entropy,
            "clamped": tokens.clamped,
            "log_ratio": log_ratio,
            "log_ratio_square": log_ratio.double() ** 2,
        }.items():
            self._totals[name] += float(values[mask].double().sum())
        signs = {"all": mask, "positive": mask & (tokens.advantages > 0), "negative": mask & (tokens.advantages < 0)}
        for name, values in diagnostics.items():
            for sign, chosen in signs.items():
                total = self._diagnostics[name, sign]
                total[0] += float(values[chosen].double().sum())
                total[1] += int(chosen.sum())

    def mean(self, name: str) -> float:
        return self._totals[name] / max(self.tokens, 1)

    @property
    def log_ratio_std(self) -> float:
        return math.sqrt(max(0.0, self.mean("log_ratio_square") - self.mean("log_ratio") ** 2))

    @property
    def diagnostics(self) -> dict[str, dict[str, float]]:
        means: dict[str, dict[str, float]] = {}
        for (name, sign), (total, count) in self._diagnostics.items():
            if count:
                means.setdefault(name, {})[sign] = total / count
        return means | self.every_objective.summary()


class Learner:
    """Owns the weights, the optimizer and the number of optimizer steps done."""

    def __init__(self, policy: Policy, settings: LearnerSettings, *, temperature: float) -> None:
        """temperature: of the sampling distribution, applied to the logits before log-probs and entropy."""
        self.policy, self.temperature = policy, temperature
        self.step_count = 0
        self._device = policy.head_weight.device
        self.optimizer = torch.optim.AdamW(policy.model.parameters())
        self.change_settings(settings)

    def change_settings(self, settings: LearnerSettings) -> None:
        """Use these from the next step on; the optimizer keeps its moments. Raises ConfigError, changing nothing."""
        objective = build(settings.objective.name, **settings.objective.options)
        objective.check(settings)
        filters = build_all(settings.filters)
        self.objective, self.filters = objective, filters
        self.settings, options = settings, settings.optimizer
        for group in self.optimizer.param_groups:
            group["betas"] = (options.beta1, options.beta2)
            group["eps"], group["weight_decay"] = options.eps, options.weight_decay

    def step(self, batch: TrainingBatch, before: Callable[[Sequence[int]], None] = lambda _: None) -> UpdateReport:
        """Apply one update; counts as a step whatever becomes of it. before: told each microbatch's groups."""
        started = time.perf_counter()
        rate = learning_rate(self.settings.optimizer, self.step_count, self.settings.training.steps)
        sums, loss = _Sums(), 0.0
        self.optimizer.zero_grad(set_to_none=True)
        objective = self._prepared(batch, before)
        for microbatch in batch.microbatches:
            before(microbatch.groups)
            loss += self._accumulate(microbatch, objective, batch.counts, sums)
        backward_done = time.perf_counter()
        norm, refusal = self._apply(rate, loss) if batch.microbatches else (0.0, "")
        self.step_count += 1
        return UpdateReport(
            step=self.step_count,
            applied=bool(batch.microbatches) and not refusal,
            refusal=refusal,
            learning_rate=rate,
            loss=loss,
            gradient_norm=norm,
            tokens=sums.tokens,
            sequences=sum(len(microbatch.input_ids) for microbatch in batch.microbatches),
            entropy=sums.mean("entropy"),
            clamped_fraction=sums.mean("clamped"),
            log_ratio_std=sums.log_ratio_std,
            policy_age_mean=sums.policy_age / max(sums.tokens, 1),
            policy_age_max=sums.policy_age_max,
            diagnostics=sums.diagnostics,
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
            truncated=microbatch.truncated.to(self._device),
            hidden=predictors.detach() if any(each.needs_hidden for each in self.filters.values()) else None,
        )

    def _prepared(self, batch: TrainingBatch, before: Callable[[Sequence[int]], None]) -> Objective:
        """The objective with the constants of this step; costs a forward pass where it needs them, else nothing."""
        if not self.objective.needs_step or not batch.microbatches:
            return self.objective
        parts = []
        for microbatch in batch.microbatches:
            before(microbatch.groups)
            with torch.no_grad(), self._enough_memory(microbatch):
                parts.append(replace(self.tokens(microbatch), hidden=None))
        return self.objective.prepare(concatenated(parts))

    def _enough_memory(self, microbatch: Microbatch) -> AbstractContextManager[None]:
        rows, length = microbatch.input_ids.shape
        budget = self.settings.training.microbatch_tokens
        return enough_memory(
            f"training on {rows} responses of up to {length} tokens at once",
            where=f"step {self.step_count + 1}",
            fix=f"lower training.microbatch_tokens (now {budget}), or sampling.max_tokens in a new run",
        )

    def _accumulate(self, microbatch: Microbatch, objective: Objective, counts: StepCounts, sums: _Sums) -> float:
        """Forward and backward of one microbatch; returns its share of the step's loss."""
        with self._enough_memory(microbatch):
            tokens = self.tokens(microbatch)
            surrogate = objective(tokens)
            keep, dropped = combine(self.filters, tokens)
            aggregation = self.settings.aggregation
            weights = token_weights(tokens, aggregation.mode, counts, length=aggregation.length)
            if keep is not None:
                weights = weights * keep  # after the denominators: what is dropped raises no other's weight
            loss = (weights * surrogate.loss).sum()
            sums.every_objective.add(tokens, surrogate)
            loss.backward()  # type: ignore[no-untyped-call]
        sums.add(tokens, surrogate.diagnostics | dropped)
        return float(loss.detach())

    def _apply(self, rate: float, loss: float) -> tuple[float, str]:
        """Clip and update, unless something is not finite; returns the gradient norm and the reason for refusing."""
        parameters = {name: each for name, each in self.policy.model.named_parameters() if each.grad is not None}
        total = torch.nn.utils.get_total_norm(each.grad for each in parameters.values())
        norm = float(total)
        if not math.isfinite(loss) or not math.isfinite(norm):
            reason = f"{_culprit(loss, parameters)} is not finite (loss {loss}, gradient norm {norm})"
            return norm, f"{reason}; weights and optimizer are left unchanged"
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), self.settings.optimizer.max_grad_norm, total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        where = f"step {self.step_count + 1}"
        with enough_memory(
            "applying the update", where=where, fix="the optimizer holds two more copies of the weights"
        ):
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
            parameter = parameters[parameter_name]
            device = tensor.device if key == "step" else parameter.device  # AdamW counts its steps on the CPU
            self.optimizer.state[parameter][key] = tensor.to(device, copy=True)


def _culprit(loss: float, parameters: Mapping[str, Tensor]) -> str:
    """What to name when an update is refused; before clipping, which would spread a NaN over every gradient."""
    if not math.isfinite(loss):  # then so is every gradient behind it
        return "the loss"
    bad = (name for name, each in parameters.items() if each.grad is not None and not each.grad.isfinite().all())
    return next((f"the gradient of {name}" for name in bad), "the sum of squared gradients")


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Rate of the update after `step` others: linear warm-up, then constant, linear or cosine to the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = min(1.0, (step - settings.warmup_steps) / max(1, steps - 1 - settings.warmup_steps))
    remaining = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * (settings.final_fraction + (1 - settings.final_fraction) * remaining)
