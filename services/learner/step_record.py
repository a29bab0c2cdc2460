"""A step's line in the run's record."""

import time
from typing import Any

import numpy as np

from sapo_learner.phases import Costs
from sapo_learner.step_report import StepFigures
from sapo_learner.train import StepReport

HISTOGRAM_SECONDS = 1.0


class Histograms:
    """A step's, at most one a second: they are for people, and larger than the rest of the line."""

    def __init__(self) -> None:
        self._next = 0.0  # time.monotonic

    def of(self, figures: StepFigures) -> dict[str, Any]:
        """What to add to the step's line."""
        if time.monotonic() < self._next or not (found := figures.histograms()):
            return {}
        self._next = time.monotonic() + HISTOGRAM_SECONDS
        return {"histograms": found}


def step_record(step: StepReport, started: float, ended: float, waited: float, after: Costs) -> dict[str, Any]:
    """Times are Unix seconds, from the step's first entry to its update. after: costs of what followed the update.

    `seconds` holds wall seconds by phase (sapo_learner.phases), from the line before this one to this one.
    """
    update = step.update
    costs = Costs(update.seconds, update.memory_bytes) + after
    responses = [response for group in step.groups for response in group.trajectories]
    names = sorted({name for response in responses for name in response.rewards})
    return {
        "kind": "step",
        "step": update.step,
        "started": started,
        "ended": ended,
        "waited_seconds": waited,
        "outcomes": dict(step.outcomes),
        "cursor": step.cursor,
        "reward": step.reward,
        "rewards": {name: _mean([each.rewards[name] for each in responses if name in each.rewards]) for name in names},
        "response_tokens": float(np.mean([len(response.token_ids) for response in responses])) if responses else 0.0,
        "stopped": float(np.mean([response.finish_reason == "stop" for response in responses])) if responses else 0.0,
        "mixed_version_responses": sum(len(response.spans) > 1 for response in responses),
        "applied": update.applied,
        "refusal": update.refusal,
        "learning_rate": update.learning_rate,
        "loss": update.loss,
        "gradient_norm": update.gradient_norm,
        "tokens": update.tokens,
        "sequences": update.sequences,
        "entropy": update.entropy,
        "log_ratio_std": update.log_ratio_std,
        "clamped_fraction": update.clamped_fraction,
        "policy_age_mean": update.policy_age_mean,
        "policy_age_max": update.policy_age_max,
        "diagnostics": {
            name: {group: float(f"{value:.6g}") for group, value in values.items()}
            for name, values in update.diagnostics.items()
        },
        "seconds": {phase: round(spent, 6) for phase, spent in costs.seconds.items()},
        "memory_bytes": dict(costs.memory_bytes),
        "slowest_rank_seconds": update.slowest_rank_seconds,
        "flops_per_second": update.flops_per_second,
        **({} if update.mfu is None else {"mfu": update.mfu}),
    }


def _mean(values: list[float]) -> float:
    return float(np.mean(values))
