"""Learner: one optimizer step from one TrainingBatch.

    log-probs (chunked) -> objective, filters -> weights per token -> backward, per microbatch; then clip, AdamW

Weights per token are made from counts over the whole step, so a microbatch's loss is a plain weighted sum and splitting
the step, also over ranks, changes nothing (I8). A step whose loss or gradient is not finite leaves the weights alone
and says why; so does one of whose tokens none counts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapo_learner import proximal, reference
from sapo_learner.aggregation import StepCounts, token_weights
from sapo_learner.batching import Microbatch, TrainingBatch
from sapo_learner.config import LearnerSettings
from sapo_learner.filters import build_all, combine
from sapo_learner.flops import ModelFlops, peak_flops
from sapo_learner.hidden_states import packs, use_packing
from sapo_learner.memory import enough_memory
from sapo_learner.objectives import Objective, Tokens, build, concatenated
from sapo_learner.optimizer import learning_rate, update
from sapo_learner.packed_logprobs import PackedLogprobs
from sapo_learner.packing import Packing
from sapo_learner.parallel import ALONE, Ranks
from sapo_learner.passes import Pass, passes
from sapo_learner.phases import Phases
from sapo_learner.policy import Policy
from sapo_learner.router_load import RouterLoad
from sapo_learner.sharding import ShardedPolicy, compute_dtype, root_of
from sapo_learner.step_report import StepFigures, UpdateReport


class Learner:
    """Owns the weights, the optimizer and the number of optimizer steps done."""

    def __init__(
        self,
        policy: Policy,
        settings: LearnerSettings,
        *,
        temperature: float,
        ranks: Ranks = ALONE,
        reference_directory: Path | None = None,
    ) -> None:
        """temperature: of the sampling distribution, applied to the logits before log-probs and entropy. ranks: those
        that share each step, each with its share of a sharded policy. reference_directory: where `reference.keep` has
        put the policy that the run began with."""
        self.policy, self.temperature, self.ranks = policy, temperature, ranks
        self.step_count = 0
        self.figures = StepFigures()
        """Of every token of the last step; None are kept of those before."""
        self.began_with: str | None = None
        """Digest of the policy that the run began with; None where nobody said."""
        self._reference_directory = reference_directory
        self._reference: Policy | None = None
        self._device = policy.head_weight.device
        if not isinstance(policy, ShardedPolicy):
            use_packing(policy)
        self._root = root_of(policy)
        self.phases = Phases(self._device)
        self._flops = ModelFlops.of(policy)
        self._router_load = RouterLoad(policy.model if packs(policy) else None)
        self.optimizer = torch.optim.AdamW(each for each in policy.model.parameters() if each.requires_grad)
        self.change_settings(settings)

    def change_settings(self, settings: LearnerSettings) -> None:
        """Use these from the next step on; the optimizer keeps its moments. Raises ConfigError, changing nothing."""
        objective = build(settings.objective.name, **settings.objective.options)
        objective.check(settings)
        proximal.check(settings, objective)
        filters = build_all(settings.filters)
        self.objective, self.filters = objective, filters
        self.settings, options = settings, settings.optimizer
        if not settings.reference.kl_coefficient:
            self._reference = None
        for group in self.optimizer.param_groups:
            group["betas"] = (options.beta1, options.beta2)
            group["eps"], group["weight_decay"] = options.eps, options.weight_decay

    def step(self, batch: TrainingBatch, before: Callable[[Sequence[int]], None] = lambda _: None) -> UpdateReport:
        """Apply one update; counts as a step whatever becomes of it. before: told each microbatch's groups."""
        rate = learning_rate(self.settings.optimizer, self.step_count, self.settings.training.steps)
        with self.phases("optimizer"):
            self.optimizer.zero_grad(set_to_none=True)
        self.figures = StepFigures()  # first, so that those of two steps are never held at once
        self.figures = figures = self._backward(batch, before) if batch.microbatches else self.figures
        with self.phases("optimizer"):
            # Adam's moments and the weight decay would move the weights without a gradient, too.
            norm, refusal = self._update(rate, figures.loss) if figures.learns else (0.0, "")
        self.step_count += 1
        with self.phases("loss"):
            report = figures.report(
                self._router_load.taken(self.ranks),
                step=self.step_count,
                applied=figures.learns and not refusal,
                refusal=refusal,
                learning_rate=rate,
                gradient_norm=norm,
                sequences=sum(len(microbatch.lengths) for microbatch in batch.microbatches),
            )
        return replace(report, **self._costs(batch.microbatches))

    def _costs(self, microbatches: Sequence[Microbatch]) -> dict[str, Any]:
        """What the step has cost; called on all ranks."""
        costs = self.phases.taken()
        slowest = self.ranks.largest(costs.update_seconds)
        speed = self._flops.of_step(microbatches) / slowest if self._flops and microbatches and slowest else None
        peak = peak_flops(self._device, compute_dtype(self.policy))
        return {
            "seconds": costs.seconds,
            "memory_bytes": costs.memory_bytes,
            "slowest_rank_seconds": slowest,
            "flops_per_second": speed,
            "mfu": speed / (peak * self.ranks.size) if speed and peak else None,
        }

    def tokens(self, microbatch: Microbatch) -> Tokens:
        """What the objective sees of a microbatch: current log-probs with gradient, and the recorded facts."""
        logprobs, entropy, predictors = self._forward(self._root, microbatch)
        tokens = self._tokens(microbatch, logprobs, entropy)
        asked = any(each.needs_hidden for each in self.filters.values())
        return replace(tokens, hidden=predictors.detach()) if asked else tokens

    def _tokens(self, microbatch: Microbatch, logprobs: Tensor, entropy: Tensor) -> Tokens:
        return Tokens(
            logprobs=logprobs,
            behaviour_logprobs=microbatch.behaviour_logprobs.to(self._device),
            advantages=microbatch.advantages.to(self._device, logprobs.dtype),
            loss_mask=microbatch.loss_mask.to(self._device),
            sequence_ids=microbatch.sequence_ids.to(self._device),
            entropy=entropy,
            policy_age=microbatch.policy_age.to(self._device),
            truncated=microbatch.truncated.to(self._device),
        )

    def _forward(self, root: PackedLogprobs, microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
        """[T] log-probs, [T] entropy and [T, H] the hidden states that they come from."""
        found: tuple[Tensor, Tensor, Tensor] = root(
            microbatch.input_ids.to(self._device),
            Packing(microbatch.lengths, self._device),
            microbatch.predictor.to(self._device),
            microbatch.targets.to(self._device),
            self.temperature,
        )
        return found

    def _backward(self, batch: TrainingBatch, before: Callable[[Sequence[int]], None]) -> StepFigures:
        """Gradients of the step, summed over all ranks, and what became of its tokens."""
        own = passes(batch.microbatches, self.ranks)
        objective, proximal_logprobs = self._looked_ahead(batch.microbatches, own, before)
        figures = StepFigures()
        for each in own:
            before(each.groups)
            with self._enough_memory(each.microbatch):
                if each.index is None:
                    self._take_part(each.microbatch)
                    continue
                with self.phases("forward"), self._router_load.watching():
                    tokens = replace(self.tokens(each.microbatch), proximal_logprobs=proximal_logprobs.get(each.index))
                with self.phases("loss"):
                    self._accumulate(each.index, each.microbatch, tokens, objective, batch.counts, figures)
        with self.phases("loss"):
            figures.complete(self.ranks)
        return figures

    def _take_part(self, microbatch: Microbatch) -> None:
        """In the exchanges that other ranks' microbatches need, adding nothing to the gradient."""
        with self.phases("forward"), self._router_load.watching(counting=False):
            logprobs, _, _ = self._forward(self._root, microbatch)
        if self.settings.reference.kl_coefficient:
            with self.phases("forward"), torch.no_grad():
                self._forward(root_of(self.held_reference()), microbatch)
        with self.phases("backward"):
            (0.0 * logprobs.sum()).backward()  # type: ignore[no-untyped-call]

    def _looked_ahead(
        self, microbatches: Sequence[Microbatch], own: Sequence[Pass], before: Callable[[Sequence[int]], None]
    ) -> tuple[Objective, dict[int, Tensor]]:
        """The objective with the constants of this step, and log-probs at its start by microbatch; costs a forward pass
        where either is asked for, else nothing."""
        recompute = self.settings.proximal.mode == "recompute"
        if not self.objective.needs_step and not recompute:
            return self.objective, {}
        found = {}
        for each in own:
            before(each.groups)
            with self.phases("forward"), torch.no_grad(), self._enough_memory(each.microbatch):
                logprobs, entropy, _ = self._forward(self._root, each.microbatch)
            if each.index is not None:
                found[each.index] = {"logprobs": logprobs, "entropy": entropy}
        objective = self.objective
        if objective.needs_step:
            with self.phases("loss"):
                objective = objective.prepare(self._whole_step(microbatches, found, recompute=recompute))
        return objective, {index: each["logprobs"] for index, each in found.items()} if recompute else {}

    def _whole_step(
        self, microbatches: Sequence[Microbatch], found: Mapping[int, Mapping[str, Tensor]], *, recompute: bool
    ) -> Tokens:
        """The tokens of all ranks, as the objective will see them: each has collated all, but computed only its own."""
        dtype = torch.promote_types(self.policy.head_weight.dtype, torch.float32)
        parts = []
        for index, each in self.ranks.gathered(found).items():
            logprobs, entropy = (each[name].to(self._device, dtype) for name in ("logprobs", "entropy"))
            tokens = self._tokens(microbatches[index], logprobs, entropy)
            parts.append(proximal.anchored(replace(tokens, proximal_logprobs=logprobs if recompute else None)))
        return concatenated(parts)

    def _enough_memory(self, microbatch: Microbatch) -> AbstractContextManager[None]:
        responses, longest = len(microbatch.lengths), max(microbatch.lengths)
        budget = self.settings.training.microbatch_tokens
        return enough_memory(
            f"training on {len(microbatch.input_ids)} tokens at once ({responses} responses of up to {longest})",
            where=f"step {self.step_count + 1}",
            fix=f"lower training.microbatch_tokens (now {budget}), or sampling.max_tokens in a new run",
        )

    def _accumulate(
        self,
        index: int,
        microbatch: Microbatch,
        tokens: Tokens,
        objective: Objective,
        counts: StepCounts,
        figures: StepFigures,
    ) -> None:
        """Backward of one microbatch's share of the step's loss: to the log-probs, and from there through the model."""
        logprobs = tokens.logprobs
        # Diagnostics ask for gradients, too, which must not reach the model: sharded layers would be gathered for them.
        tokens = replace(tokens, logprobs=logprobs.detach().requires_grad_())
        surrogate = proximal.decoupled(objective, tokens, self.settings.proximal.bound)
        keep, dropped = combine(self.filters, tokens)
        aggregation = self.settings.aggregation
        weights = token_weights(tokens, aggregation.mode, counts, length=aggregation.length)
        if keep is not None:
            weights = weights * keep  # after the denominators: what is dropped raises no other's weight
        per_token, own = surrogate.loss, surrogate.diagnostics | dropped
        if coefficient := self.settings.reference.kl_coefficient:
            own["reference_kl"] = divergence = self._reference_kl(microbatch, tokens)
            per_token = per_token + coefficient * divergence
        loss = weights * per_token
        figures.add(index, tokens, surrogate, own, weights, loss)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        with self.phases("backward"):
            logprobs.backward(tokens.logprobs.grad)  # type: ignore[no-untyped-call]

    def _reference_kl(self, microbatch: Microbatch, tokens: Tokens) -> Tensor:
        """[T], with gradient."""
        with self.phases("forward"), torch.no_grad():
            logprobs, _, _ = self._forward(root_of(self.held_reference()), microbatch)
        return reference.k3(tokens, logprobs)

    def held_reference(self) -> Policy:
        """The reference policy, read when it is first asked for; raises what `reference.load` does."""
        if self._reference is None:
            self._reference = reference.load(self._reference_directory, self.policy, self.began_with)
        return self._reference

    def _update(self, rate: float, loss: float) -> tuple[float, str]:
        """The gradient norm, and the reason for refusing."""
        where, limit = f"step {self.step_count + 1}", self.settings.optimizer.max_grad_norm
        return update(self.optimizer, self.policy.model, rate, loss, max_grad_norm=limit, where=where)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """AdamW's state as flat names, "<parameter>/<exp_avg | exp_avg_sq | step>"."""
        names: dict[Tensor, str] = {each: name for name, each in self.policy.model.named_parameters()}
        return {
            f"{names[parameter]}/{key}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `optimizer_tensors`, for a policy that is not sharded."""
        for name, own in self.empty_optimizer_tensors(tensors).items():
            own.copy_(tensors[name])

    def empty_optimizer_tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """A new state of the optimizer, to be filled in: tensors that `optimizer_tensors` would give, all zero."""
        parameters = dict(self.policy.model.named_parameters())
        self.optimizer.state.clear()
        for name in names:
            parameter_name, _, key = name.rpartition("/")
            parameter = parameters[parameter_name]
            # AdamW counts its steps in float32 on the CPU
            empty = torch.zeros(()) if key == "step" else torch.zeros_like(parameter, requires_grad=False)
            self.optimizer.state[parameter][key] = empty
        return self.optimizer_tensors()
