"""The training loop, on one screen: the learner as a deterministic state machine over the log.

A step is the next `groups_per_step` entries after the cursor, whatever becomes of them. Nothing here knows where the
log comes from, what a checkpoint or a metric is: callers do that between the reports that `train` yields.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sapo_learner.advantages import group_advantages, has_signal
from sapo_learner.archive import GENESIS, Entry
from sapo_learner.batching import collate
from sapo_learner.config import LearnerSettings
from sapo_learner.errors import InvalidTrajectory
from sapo_learner.learner import Learner, UpdateReport
from sapo_learner.ledger import Ledger, Outcome
from sapo_learner.trajectory import TrajectoryGroup

Decode = Callable[[bytes], TrajectoryGroup]


class Log(Protocol):
    def next(self, after: int, count: int) -> list[Entry] | None:
        """Exactly `count` entries after sequence `after`, waiting for them; None when asked to stop."""


@dataclass
class Position:
    """Where the state machine stands: everything but weights and optimizer."""

    cursor: int = 0
    chain: str = GENESIS
    ledger: Ledger = field(default_factory=Ledger)


@dataclass(frozen=True)
class StepReport:
    """One step: what came in, and what the update did."""

    update: UpdateReport
    outcomes: Mapping[str, int]  # groups by outcome
    cursor: int  # last log sequence consumed
    groups: Sequence[TrajectoryGroup]  # those that decoded
    advantages: Sequence[NDArray[np.float64]]  # [G] of each group in `groups`
    invalid: Mapping[str, str]  # entry id -> what was wrong with it

    @property
    def reward(self) -> float:
        """Mean over responses."""
        rewards = [each.reward for group in self.groups for each in group.trajectories]
        return float(np.mean(rewards)) if rewards else 0.0


def train(
    learner: Learner, log: Log, position: Position, *, settings: LearnerSettings, decode: Decode
) -> Iterator[StepReport]:
    """Consume the log from `position` (advanced in place) until the run's last step, or until the log says stop."""
    while learner.step_count < settings.training.steps:
        entries = log.next(position.cursor, settings.training.groups_per_step)
        if entries is None:
            return
        outcomes: dict[str, Outcome] = {}
        groups, invalid = _decode(entries, decode, outcomes)
        fresh = {}
        for entry_id, group in groups.items():
            if learner.step_count - group.oldest_step > settings.training.max_policy_age:
                outcomes[entry_id] = Outcome.stale
            else:
                fresh[entry_id] = group
        advantages = {
            entry_id: group_advantages(np.array([each.reward for each in group.trajectories]), settings.advantages)
            for entry_id, group in fresh.items()
        }
        batch = collate(
            list(fresh.values()),
            list(advantages.values()),
            step=learner.step_count,
            microbatch_tokens=settings.training.microbatch_tokens,
            normalise_by=settings.aggregation.normalise_by,
        )
        update = learner.step(batch)
        for entry_id, values in advantages.items():
            if not has_signal(values):
                outcomes[entry_id] = Outcome.degenerate
            else:
                outcomes[entry_id] = Outcome.refused if update.refusal else Outcome.trained
        for outcome in outcomes.values():
            position.ledger = position.ledger.add(outcome)
        position.cursor, position.chain = entries[-1].sequence, entries[-1].chain
        yield StepReport(
            update=update,
            outcomes={kind.value: sum(each == kind for each in outcomes.values()) for kind in Outcome},
            cursor=position.cursor,
            groups=list(fresh.values()),
            advantages=list(advantages.values()),
            invalid=invalid,
        )


def _decode(
    entries: Sequence[Entry], decode: Decode, outcomes: dict[str, Outcome]
) -> tuple[dict[str, TrajectoryGroup], dict[str, str]]:
    """Groups by entry id; an entry that does not decode is `invalid`, named, and costs the run nothing else."""
    groups, invalid = {}, {}
    for entry in entries:
        try:
            groups[entry.id] = decode(entry.payload)
        except InvalidTrajectory as error:
            outcomes[entry.id] = Outcome.invalid
            invalid[entry.id] = str(error)
    return groups, invalid
