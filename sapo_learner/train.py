"""The training loop, on one screen: the learner as a deterministic state machine over the log.

A step is the next `groups_per_step` entries after the cursor, whatever becomes of them. Nothing here knows where the
log comes from, what a checkpoint or a metric is: callers do that between the reports that `train` yields.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sapo_learner.advantages import step_advantages
from sapo_learner.archive import GENESIS, Entry
from sapo_learner.batching import TrainingBatch, collate
from sapo_learner.config import LearnerSettings
from sapo_learner.control import GROUP, decode_settings
from sapo_learner.errors import InvalidTrajectory
from sapo_learner.learner import Learner
from sapo_learner.ledger import Ledger, Outcome
from sapo_learner.step_report import UpdateReport
from sapo_learner.trajectory import TrajectoryGroup

Decode = Callable[[bytes], TrajectoryGroup]
Attend = Callable[[str, Sequence[str]], None]
"""Told what is about to be done, in a word like "decoding", and with which entries."""


class Log(Protocol):
    def next(self, after: int, count: int) -> list[Entry] | None:
        """Exactly `count` entries after sequence `after`, waiting for them; None when asked to stop."""

    def controls(self, after: int, *, anywhere: bool = False) -> list[Entry]:
        """The entries right after `after` (anywhere: at any distance) that are no groups, as far as they are there
        already; never waits."""


@dataclass
class Position:
    """Where the state machine stands: everything but weights and optimizer."""

    cursor: int = 0
    chain: str = GENESIS
    ledger: Ledger = field(default_factory=Ledger)

    def advance(self, last: Entry, outcomes: Mapping[Outcome, int], *, control: int = 0) -> None:
        """Move behind `last`, having made `outcomes` of the groups up to there; `control` entries were none."""
        for outcome, count in outcomes.items():
            self.ledger = self.ledger.add(outcome, count)
        self.ledger = self.ledger.add_control(control)
        self.cursor, self.chain = last.sequence, last.chain


@dataclass(frozen=True)
class StepReport:
    """One step: what came in, and what the update did."""

    update: UpdateReport
    outcomes: Mapping[str, int]  # entries by outcome, every outcome named
    cursor: int  # last log sequence consumed
    groups: Sequence[TrajectoryGroup]  # those that were neither invalid nor stale nor skipped
    entries: Sequence[str]  # entry id of each group in `groups`
    fates: Mapping[str, Outcome]  # by entry id, of every group that came in
    advantages: Sequence[NDArray[np.float64]]  # [G] of each group in `groups`
    sequences: Sequence[tuple[int, int]]  # by sequence id: which of `groups`, and which of its responses
    invalid: Mapping[str, str]  # entry id -> what was wrong with it

    @property
    def reward(self) -> float:
        """Mean over responses."""
        rewards = [each.reward for group in self.groups for each in group.trajectories]
        return float(np.mean(rewards)) if rewards else 0.0


def train(
    learner: Learner,
    log: Log,
    position: Position,
    *,
    decode: Decode,
    skips: Collection[str] = (),
    attend: Attend = lambda *_: None,
) -> Iterator[StepReport]:
    """Consume the log from `position` (advanced in place) until the run's last step, or until the log says stop.

    A `config` entry is no group: it changes the learner's settings from the step on whose groups follow or surround it.
    skips: ids of entries that are left out; they count towards their step.
    """
    phases = learner.phases
    phases.taken()  # what was before is no step's
    while True:
        with phases("read"):
            entries = _due(learner, log, position)
        if entries is None:
            return
        settings = _obey(learner, position, [entry for entry in entries if entry.kind != GROUP])
        oldest_step = learner.step_count - settings.training.max_policy_age
        with phases("decode"):
            read = _read([entry for entry in entries if entry.kind == GROUP], decode, skips, oldest_step, attend)
        with phases("collate"):
            advantages = step_advantages(read.groups, settings.advantages)
            batch = _collate(read.groups, advantages, settings, learner)
        update = learner.step(batch, _announcing(attend, read.ids))
        fates = {**read.fates, **dict(zip(read.ids, _fates(batch, update), strict=True))}
        outcomes = Counter(fates.values())
        position.advance(entries[-1], outcomes)
        yield StepReport(
            update=update,
            outcomes={outcome.value: outcomes[outcome] for outcome in Outcome},
            cursor=position.cursor,
            groups=read.groups,
            entries=read.ids,
            fates=fates,
            advantages=advantages,
            sequences=batch.sequences,
            invalid=read.invalid,
        )


def _due(learner: Learner, log: Log, position: Position) -> list[Entry] | None:
    """The next step's entries, the last of them a group; None when all is done, or when the log says stop."""
    training = _obey(learner, position, log.controls(position.cursor)).training
    if learner.step_count >= training.steps and not _prolonged(learner, log, position):
        return None
    return _take(log, position.cursor, training.groups_per_step)


def _prolonged(learner: Learner, log: Log, position: Position) -> bool:
    """Whether a run that was complete goes on: groups may have been accepted before the entry that says so."""
    ahead = log.controls(position.cursor, anywhere=True)
    return any(decode_settings(entry).training.steps > learner.step_count for entry in ahead)


def _take(log: Log, after: int, groups: int) -> list[Entry] | None:
    """The next entries with so many groups among them; None when the log says stop."""
    entries: list[Entry] = []
    while missing := groups - sum(entry.kind == GROUP for entry in entries):
        more = log.next(after + len(entries), missing)
        if more is None:
            return None
        entries += more
    return entries


def _obey(learner: Learner, position: Position, controls: Sequence[Entry]) -> LearnerSettings:
    """Apply control entries in order; returns the settings in force then."""
    for entry in controls:
        learner.change_settings(decode_settings(entry))
        position.advance(entry, {}, control=1)
    return learner.settings


@dataclass
class _Read:
    """What came in: groups to train on with their entries' ids, what became of the others, and what was wrong."""

    groups: list[TrajectoryGroup] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    fates: dict[str, Outcome] = field(default_factory=dict)
    invalid: dict[str, str] = field(default_factory=dict)


def _read(entries: Sequence[Entry], decode: Decode, skips: Collection[str], oldest_step: int, attend: Attend) -> _Read:
    """A bad entry costs the run nothing but itself. oldest_step: groups from before it are stale."""
    read = _Read()
    for entry in entries:
        if entry.id in skips:
            read.fates[entry.id] = Outcome.skipped
            continue
        attend("decoding", [entry.id])
        try:
            group = decode(entry.payload)
        except InvalidTrajectory as error:
            read.fates[entry.id], read.invalid[entry.id] = Outcome.invalid, str(error)
            continue
        if group.oldest_step < oldest_step:
            read.fates[entry.id] = Outcome.stale
        else:
            read.groups.append(group)
            read.ids.append(entry.id)
    return read


def _fates(batch: TrainingBatch, update: UpdateReport) -> list[Outcome]:
    """Of the groups that were looked at. A step whose tokens were all dropped had nothing to learn from, either."""
    moved = Outcome.refused if update.refusal else Outcome.trained if update.applied else Outcome.degenerate
    return [moved if signal else Outcome.degenerate for signal in batch.signal]


def _announcing(attend: Attend, ids: Sequence[str]) -> Callable[[Sequence[int]], None]:
    return lambda groups: attend("training on", [ids[each] for each in groups])


def _collate(
    groups: Sequence[TrajectoryGroup],
    advantages: Sequence[NDArray[np.float64]],
    settings: LearnerSettings,
    learner: Learner,
) -> TrainingBatch:
    return collate(
        groups,
        advantages,
        step=learner.step_count,
        microbatch_tokens=settings.training.microbatch_tokens,
        normalise_by=settings.aggregation.normalise_by,
        ranks=learner.ranks.size,
    )
