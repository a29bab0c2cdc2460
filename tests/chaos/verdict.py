"""What must be true of a run after everything that was done to it."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from protos.sapo.v1 import ingest_pb2 as pb
from protos.sapo.v1.trajectory_pb2 import TrajectoryGroup
from sapo_learner import checkpoint
from sapo_learner.archive import Archive, Entry
from sapo_learner.config import LearnerSettings
from sapo_learner.control import GROUP
from sapo_learner.learner import Learner
from sapo_learner.ledger import Ledger
from sapo_learner.snapshot import weights_digest
from sapo_learner.train import Position, train
from services.learner.base_policy import base_policy
from services.replay import ArchivedLog
from services.run_directory import audit_run, run_config
from services.wire import decode
from tests.chaos.harness import ChaosRun
from tests.chaos.proxy import SeenAck


@dataclass
class Verdict:
    """problems: what is wrong whatever was done. lost: accepted by ingest's word, and not in the archive."""

    steps: int = 0
    draws: int = 0
    accepted: int = 0  # acknowledgements seen
    skipped: list[int] = field(default_factory=list)  # draws
    duplicated: list[int] = field(default_factory=list)  # draws
    lost: list[SeenAck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def described(self) -> str:
        counts = f"{self.steps} steps, {self.draws} draws: {len(self.lost)} lost, {len(self.duplicated)} duplicated"
        return "; ".join([f"{counts}, {len(self.skipped)} skipped", *self.problems])


async def examine(directory: Path, begun_with: LearnerSettings, acks: Sequence[SeenAck]) -> Verdict:
    """directory: of a finished run whose processes have ended."""
    config = run_config(directory)
    verdict = Verdict(steps=config.training.steps, draws=config.training.steps * config.training.groups_per_step)
    entries = await asyncio.to_thread(lambda: list(Archive(directory / "archive", None).entries()))
    _draws(verdict, entries)
    _acknowledged(verdict, entries, acks)
    audit = await audit_run(directory)
    verdict.problems += [f"ledger: {problem}" for problem in audit.problems]
    final = checkpoint.load_newest(directory / "checkpoints").state
    if final.step != verdict.steps:
        verdict.problems.append(f"the newest checkpoint is of step {final.step}")
    if (final.cursor, final.chain) != (entries[-1].sequence, entries[-1].chain):
        verdict.problems.append(f"trained up to entry {final.cursor}, the archive ends at {entries[-1].id}")
    replayed = await asyncio.to_thread(_replayed, directory, begun_with)
    if replayed.ledger.to_dict() != final.ledger or replayed.chain != final.chain:
        verdict.problems.append("a replay of the archive consumes other entries than the run did")
    if replayed.digest != weights_digest(final.model):
        verdict.problems.append("a replay of the archive gives other weights than the run ended with")
    return verdict


def _draws(verdict: Verdict, entries: Sequence[Entry]) -> None:
    """Every draw once; and the archive's own promise, gapless from the first entry to the last."""
    times = Counter(entry.draw for entry in entries if entry.kind == GROUP)
    verdict.skipped = [draw for draw in range(verdict.draws) if not times[draw]]
    verdict.duplicated = sorted(draw for draw, count in times.items() if count > 1)
    if beyond := sorted(draw for draw in times if draw >= verdict.draws):
        verdict.problems.append(f"draws beyond the run's last one: {beyond[:5]}")
    if [entry.sequence for entry in entries] != list(range(1, len(entries) + 1)):
        verdict.problems.append("the archive has gaps")


async def missing(run: ChaosRun) -> list[SeenAck]:
    """Groups accepted until now that neither the archive nor Redis holds. Entries move from Redis to the archive."""
    accepted = [ack for ack in run.acks if ack.status == pb.Ack.STATUS_ACCEPTED]
    async with run.store() as store:
        streamed = await store.read(0, 1 << 20)
    archived = await asyncio.to_thread(lambda: list(Archive(run.directory / "archive", None).entries()))
    held = _held([*streamed, *archived])
    return [ack for ack in accepted if (ack.entry_id, ack.draw, ack.attempt) not in held]


def _held(entries: Sequence[Entry]) -> set[tuple[str, int, int]]:
    """Id, draw and attempt of each group: a forgotten entry may have left its id to another one."""
    groups = [entry for entry in entries if entry.kind == GROUP]
    return {(each.id, each.draw, TrajectoryGroup.FromString(each.payload).attempt) for each in groups}


def _acknowledged(verdict: Verdict, entries: Sequence[Entry], acks: Sequence[SeenAck]) -> None:
    held = _held(entries)
    accepted = [ack for ack in acks if ack.status == pb.Ack.STATUS_ACCEPTED]
    verdict.accepted = len(accepted)
    verdict.lost = [ack for ack in accepted if (ack.entry_id, ack.draw, ack.attempt) not in held]
    if len(accepted) < len(held) // 2:
        verdict.problems.append(f"{len(accepted)} acknowledgements were seen for {len(held)} groups: some went by")


@dataclass(frozen=True)
class _Replay:
    digest: str
    chain: str
    ledger: Ledger


def _replayed(directory: Path, begun_with: LearnerSettings) -> _Replay:
    """The archive trained on from the base policy, in this process, uninterrupted."""
    config = run_config(directory)
    policy, _ = base_policy(config, lambda *_: None)
    position = Position()
    with _as_in_the_run(config.training.threads):
        learner = Learner(policy, begun_with, temperature=config.sampling.temperature)
        for _ in train(learner, ArchivedLog(directory / "archive"), position, decode=decode):
            pass
        return _Replay(weights_digest(learner.policy.tensors()), position.chain, position.ledger)


@contextmanager
def _as_in_the_run(threads: int) -> Iterator[None]:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
