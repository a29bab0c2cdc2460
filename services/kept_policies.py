"""Which policies a run's directory still has, and the one nearest to a step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sapo_learner.archive import Archive
from sapo_learner.checkpoint_facts import facts_of
from sapo_learner.checkpoint_names import list_whole
from sapo_learner.errors import Corrupt
from sapo_learner.manifest import Manifest
from services.run_directory import run_config

if TYPE_CHECKING:
    from sapo_learner.policy import Policy


@dataclass(frozen=True)
class Kept:
    """The policy after `step` optimizer steps. kind: what it is kept as. load: raises what reading it does."""

    kind: str
    step: int
    load: Callable[[], "Policy"]


def nearest_policy(directory: Path, archive: Archive, step: int) -> Kept | None:
    """Of equally near ones the older, and a checkpoint before a snapshot, which may be rounded; None without any.

    Checkpoints of a branch that the log has left do not count.
    """
    kept = [*_checkpoints(directory, archive), *_snapshots(directory / "snapshots", directory / "model")]
    return min(kept, key=lambda each: (abs(each.step - step), each.step), default=None)  # the first of equals


def _checkpoints(directory: Path, archive: Archive) -> Iterator[Kept]:
    for found in list_whole(directory / "checkpoints"):
        try:
            facts = facts_of(found.path)
        except Corrupt:
            continue
        if archive.chain_at(int(facts["cursor"])) == facts["chain"]:
            yield Kept("checkpoint", found.step, lambda path=found.path: _from_checkpoint(directory, path))  # type: ignore[misc]


def _from_checkpoint(directory: Path, path: Path) -> "Policy":
    from sapo_learner import checkpoint
    from sapo_learner.resume import load_state
    from services.learner.base_policy import shaped_policy

    policy = shaped_policy(directory, run_config(directory))
    load_state(policy, checkpoint.load(path), where=str(path))
    return policy.merged()


def _snapshots(directory: Path, model: Path) -> Iterator[Kept]:
    """The newest version first: of a step that was taken again, it is the one that counts."""
    for path in sorted((directory / "manifests").glob("*.json"), reverse=True):
        manifest = Manifest.from_json(path.read_bytes(), where=str(path))
        kind = f"{manifest.dtype} snapshot"
        yield Kept(kind, manifest.step, lambda each=manifest: _from_snapshot(each, directory, model))  # type: ignore[misc]


def _from_snapshot(manifest: Manifest, directory: Path, model: Path) -> "Policy":
    from sapo_learner.policy import load_policy, load_weights
    from sapo_learner.snapshot import read_snapshot

    policy = load_policy(model, weights=False)
    load_weights(policy, read_snapshot(manifest, lambda sha256: directory / "blobs" / sha256))
    return policy
