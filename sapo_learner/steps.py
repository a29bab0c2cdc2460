"""Which entries of the log make which step, and their advantages, read off the log alone: no weights, no torch.

The same rule as in `sapo_learner.train`, which a test holds this against: a step is the next `groups_per_step` groups,
under the settings that are in force once all `config` entries up to its last group are obeyed.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from sapo_learner.advantages import Vector, step_advantages
from sapo_learner.archive import Archive, Entry
from sapo_learner.checkpoint_facts import facts_of
from sapo_learner.checkpoint_names import list_whole
from sapo_learner.config import LearnerSettings
from sapo_learner.control import GROUP, decode_settings, parse_settings
from sapo_learner.errors import Corrupt, InvalidTrajectory
from sapo_learner.trajectory import TrajectoryGroup


@dataclass(frozen=True)
class Beginning:
    """A place from which steps can be counted: settings in force there, optimizer steps done, last entry consumed."""

    settings: LearnerSettings
    done: int = 0
    cursor: int = 0


@dataclass(frozen=True)
class Step:
    """number: optimizer steps done with it. entries: its groups, in order. missing: groups that are not there yet."""

    number: int
    entries: tuple[Entry, ...]
    settings: LearnerSettings
    missing: int = 0

    def groups(
        self, decode: Callable[[bytes], TrajectoryGroup], skips: Collection[str] = ()
    ) -> dict[str, TrajectoryGroup]:
        """Entry id -> group, of those that it learns from: not skipped, readable, not stale."""
        oldest_step, found = self.number - 1 - self.settings.training.max_policy_age, {}
        for entry in self.entries:
            if entry.id in skips:
                continue
            try:
                group = decode(entry.payload)
            except InvalidTrajectory:
                continue
            if group.oldest_step >= oldest_step:
                found[entry.id] = group
        return found

    def advantages(self, decode: Callable[[bytes], TrajectoryGroup], skips: Collection[str] = ()) -> dict[str, Vector]:
        """Entry id -> [G] advantages, of `groups`; only of a step without `missing` they are those of training."""
        groups = self.groups(decode, skips)
        return dict(zip(groups, step_advantages([*groups.values()], self.settings.advantages), strict=True))


def beginning(checkpoints: Path, archive: Archive, before: int) -> Beginning | None:
    """The last whole checkpoint of this log that has not consumed entry `before` yet; None where none is kept."""
    found: Beginning | None = None
    for each in list_whole(checkpoints):
        try:
            facts = facts_of(each.path)
        except Corrupt:
            continue
        cursor, recorded = int(facts["cursor"]), facts["extra"].get("settings")
        closer = cursor < before and (found is None or cursor > found.cursor)
        if closer and recorded and archive.chain_at(cursor) == facts["chain"]:
            found = Beginning(parse_settings(recorded, where=str(each.path)), each.step, cursor)
    return found


def steps(archive: Archive, begin: Beginning) -> Iterator[Step]:
    """Every step behind `begin`, the last one perhaps with groups missing. What a complete run never read is in none.

    Raises Corrupt for an entry of an unknown kind.
    """
    prolonged = {
        entry.sequence: decode_settings(entry).training.steps
        for entry in archive.entries(begin.cursor)
        if entry.kind != GROUP
    }
    settings, done, wanted, taken = begin.settings, begin.done, 0, list[Entry]()
    for entry in archive.entries(begin.cursor):
        if entry.kind != GROUP:
            settings = decode_settings(entry)
            continue
        if not taken:  # a step begins: entries right before it are obeyed already
            ahead = [last for sequence, last in prolonged.items() if sequence > entry.sequence]
            if done >= max(settings.training.steps, *ahead, 0):
                return
            wanted = settings.training.groups_per_step
        taken.append(entry)
        if len(taken) == wanted:
            done += 1
            yield Step(done, tuple(taken), settings)
            taken = []
    if taken:
        yield Step(done + 1, tuple(taken), settings, wanted - len(taken))
