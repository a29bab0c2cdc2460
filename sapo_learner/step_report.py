"""What one optimizer step did, from the figures of every token that the loss saw.

A rank notes those of its own microbatches; `complete` adds the other ranks'. The report is then made from the same
numbers in the same order on every rank, and as one process alone would make it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sapo_learner import diagnostics
from sapo_learner.objectives import Surrogate, Tokens
from sapo_learner.parallel import Parts, Ranks

Values = NDArray[np.float64]
_OWN = "diagnostic/"  # before the names of what objective, filters and reference say themselves


@dataclass(frozen=True)
class UpdateReport:
    """What one optimizer step did. Token means run over tokens that the loss sees."""

    step: int  # optimizer steps done, this one included
    applied: bool
    refusal: str  # why the update was not applied; "" when it was, or when there was nothing to learn
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
    # What it cost, which is known when everything else is.
    seconds: Mapping[str, float] = field(default_factory=dict)  # phase -> wall seconds, see sapo_learner.phases
    memory_bytes: Mapping[str, int] = field(default_factory=dict)  # phase -> the most that was held, see there
    slowest_rank_seconds: float = 0.0  # of the update, on the rank that took longest
    flops_per_second: float | None = None  # model FLOPs of all ranks; None: nothing computed, or not known
    mfu: float | None = None  # model FLOPs utilisation, in [0, 1]; None where the hardware's peak is not known


@dataclass
class StepFigures:
    """Columns of figures, one value per token that the loss sees, microbatch by microbatch; double precision."""

    _parts: Parts = field(default_factory=dict)

    def add(
        self,
        microbatch: int,
        tokens: Tokens,
        surrogate: Surrogate,
        own: Mapping[str, Tensor],
        weights: Tensor,
        loss: Tensor,
    ) -> None:
        """Note the tokens of one microbatch; before backward, for the coefficient needs the graph.

        surrogate: of the objective alone. own: what objective, filters and reference say. weights, loss: [T] the weight
        of each token in the step's loss, and its share of it.
        """
        assert tokens.entropy is not None
        columns = {
            **diagnostics.columns(tokens, surrogate),
            "entropy": tokens.entropy,
            "sequence_id": tokens.sequence_ids,
            "weight": weights,
            "loss": loss,
            **{f"{_OWN}{name}": values for name, values in own.items()},
        }
        mask = tokens.loss_mask
        self._parts[microbatch] = {name: values.detach()[mask].double().cpu() for name, values in columns.items()}

    def complete(self, ranks: Ranks) -> None:
        """Add what the other ranks have noted."""
        self._parts = ranks.gathered(self._parts)

    def of_sequence(self, sequence_id: int) -> dict[str, Values]:
        """Columns of `sapo_learner.diagnostics` over one response's tokens that the loss sees, in order; {} without
        such tokens."""
        for part in self._parts.values():
            own = (part["sequence_id"] == sequence_id).numpy()
            if own.any():  # a response is never split
                return {name: part[name].numpy()[own] for name in diagnostics.COLUMNS if name in part}
        return {}

    @property
    def learns(self) -> bool:
        """Whether any token counts; else the step has nothing to learn from."""
        return bool((self._column("weight") != 0).any())

    @property
    def loss(self) -> float:
        """Of the whole step; 0 where no token counts."""
        return float(self._column("loss").sum()) if self.learns else 0.0

    def report(self, more: diagnostics.Groups, **facts: Any) -> UpdateReport:
        """more: diagnostics besides those of tokens. facts: the fields of UpdateReport that do not follow from them."""
        age, log_ratio = self._column("age"), self._column("log_ratio")
        return UpdateReport(
            loss=self.loss,
            tokens=len(age),
            entropy=_mean(self._column("entropy")),
            clamped_fraction=_mean(self._column("clamped")),
            log_ratio_std=math.sqrt(max(0.0, _mean(log_ratio**2) - _mean(log_ratio) ** 2)),
            policy_age_mean=_mean(age),
            policy_age_max=int(age.max(initial=0)),
            diagnostics=self._own_diagnostics() | self._of_every_objective() | more,
            **facts,
        )

    def histograms(self) -> dict[str, Any]:
        """See sapo_learner.diagnostics; {} for a step without a token that the loss saw."""
        found = self._comparable()
        return diagnostics.histograms(found) if found and len(found["log_ratio"]) else {}

    def _own_diagnostics(self) -> dict[str, dict[str, float]]:
        """Means by sign of the advantage, over the microbatches in which there is such a figure."""
        names = dict.fromkeys(name for part in self._parts.values() for name in part if name.startswith(_OWN))
        means: dict[str, dict[str, float]] = {}
        for name in names:
            values, advantages = self._column(name), self._column("advantage", beside=name)
            by_sign = {"all": values, "positive": values[advantages > 0], "negative": values[advantages < 0]}
            means[name.removeprefix(_OWN)] = {sign: _mean(each) for sign, each in by_sign.items() if len(each)}
        return means

    def _of_every_objective(self) -> dict[str, dict[str, float]]:
        found = self._comparable()
        return diagnostics.summary(found) if found else {}

    def _comparable(self) -> dict[str, Values]:
        """The columns that every microbatch has and every objective is compared by; {} without a microbatch."""
        names = [name for name in diagnostics.COLUMNS if all(name in part for part in self._parts.values())]
        return {name: self._column(name) for name in names} if self._parts else {}

    def _column(self, name: str, *, beside: str | None = None) -> Values:
        """[n] over the microbatches that have it, and the column `beside`."""
        found = [part[name].numpy() for part in self._parts.values() if name in part and (beside or name) in part]
        return np.concatenate(found) if found else np.zeros(0)


def _mean(values: Values) -> float:
    return float(values.mean()) if len(values) else 0.0
