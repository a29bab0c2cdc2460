"""What must be true of a small machine's run when it has ended; nothing of it is asked of the parts that ran."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import takewhile

import pytest

from sapo_learner import checkpoint
from sapo_learner.archive import Archive, Entry
from sapo_learner.checkpoint import CheckpointState
from sapo_learner.control import GROUP
from sapo_learner.errors import SapoError
from sapo_learner.learner import Learner
from sapo_learner.ledger import Ledger
from sapo_learner.manifest import Manifest
from sapo_learner.snapshot import snapshot_digest, weights_digest
from sapo_learner.train import Position, train
from services.control_plane.record import read
from services.run_directory import audit_run
from services.wire import decode
from tests.chaos.small_machine import GROUPS, STEPS, SmallMachine, accepted_as, base_policy


async def examine(machine: SmallMachine) -> list[str]:
    """What is wrong; nothing, it should be."""
    try:
        return [*machine.problems, *await _examined(machine)]
    except SapoError as error:  # what cannot be read is wrong, too
        return [*machine.problems, f"unreadable: {error}"]


async def _examined(machine: SmallMachine) -> list[str]:
    entries = list(Archive(machine.directory / "archive", None).entries())
    final = checkpoint.load_newest(machine.directory / "checkpoints").state
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SAPO_REDIS_URL", machine.redis.url)
        audit = await audit_run(machine.directory)
    replayed = _Replayed(machine, entries)
    seen = machine.seen | await _known(machine)
    return [
        *_log(entries, machine),
        *(f"ledger: {problem}" for problem in audit.problems),
        *_checkpoint(final, entries, replayed),
        *_versions(seen, replayed.digests),
    ]


def _log(entries: Sequence[Entry], machine: SmallMachine) -> Iterator[str]:
    times = Counter(entry.draw for entry in entries if entry.kind == GROUP)
    for draw in sorted(times.keys() | set(range(STEPS * GROUPS))):
        if times[draw] != (draw < STEPS * GROUPS):
            yield f"draw {draw} is in the log {times[draw]} times"
    if [entry.sequence for entry in entries] != list(range(1, len(entries) + 1)):
        yield "the archive has gaps"
    there = {accepted_as(entry.id, entry.payload) for entry in entries if entry.kind == GROUP}
    for each in machine.accepted:
        if each not in there and each not in machine.forgiven:
            yield f"{each} is lost"


def _checkpoint(final: CheckpointState, entries: Sequence[Entry], replayed: "_Replayed") -> Iterator[str]:
    if final.step != STEPS:
        yield f"the newest checkpoint is of step {final.step}"
    if not entries or (final.cursor, final.chain) != (entries[-1].sequence, entries[-1].chain):
        yield f"the checkpoint's cursor is {final.cursor}, the archive has {len(entries)} entries"
    if final.ledger != Ledger(trained=STEPS * GROUPS).to_dict():
        yield f"not every group was trained on: {final.ledger}"
    if weights_digest(final.model) != replayed.weights:
        yield "a replay of the archive gives other weights"


def _versions(seen: set[tuple[int | None, int, str]], replayed: dict[int, str]) -> Iterator[str]:
    by_version, by_content = defaultdict(set), defaultdict(set)
    for version, step, digest in seen:
        by_version[version].add((step, digest))
        by_content[step, digest].add(version)
        if replayed.get(step) != digest:
            yield f"version {version} is not what a replay has at step {step}"
    for version, contents in by_version.items():
        if len(contents) > 1:
            yield f"version {version} has {len(contents)} contents"
    for (step, _), versions in by_content.items():
        if len(versions) > 1:
            yield f"the policy of step {step} has {len(versions)} versions"


async def _known(machine: SmallMachine) -> set[tuple[int | None, int, str]]:
    """What the control plane's disk, its record and Redis say of versions."""
    manifests = [Manifest.from_json(path.read_bytes()) for path in machine.directory.glob("snapshots/manifests/*.json")]
    found = {(each.version, each.step, each.digest) for each in manifests}
    for line in read(machine.directory / "record.jsonl"):
        if line["kind"] == "policy":
            found.add((line["version"], line["step"], line["digest"]))
    for version in await machine.store.versions():
        policy = await machine.store.manifest(version)
        found.add((version, policy.step, policy.digest))
    return found


class _Replayed:
    """The log trained on from the base policy, uninterrupted. digests: step -> what its snapshot would be."""

    def __init__(self, machine: SmallMachine, entries: Sequence[Entry]) -> None:
        config, self._entries = machine.config, entries
        learner = Learner(base_policy(), config.learner, temperature=config.sampling.temperature)

        def digest() -> str:
            return snapshot_digest(learner.policy.tensors(), config.policy.dtype)

        self.digests = {0: digest()}
        for step in train(learner, self, Position(), decode=decode):
            self.digests[step.update.step] = digest()
        self.weights = weights_digest(learner.policy.tensors())

    def next(self, after: int, count: int) -> list[Entry] | None:
        found = list(self._entries[after : after + count])
        return found if len(found) == count else None

    def controls(self, after: int, *, anywhere: bool = False) -> list[Entry]:
        entries = self._entries[after:]
        if anywhere:
            return [entry for entry in entries if entry.kind != GROUP]
        return list(takewhile(lambda entry: entry.kind != GROUP, entries))
