"""The files of one checkpoint: written, checked against their digests, and read; whole, or by ranks that share them.

    model.safetensors  optimizer.safetensors  rng.safetensors  checkpoint.json
    shards/ in place of the first two, where several ranks each hold a share

checkpoint.json names size and SHA-256 of the others and of itself.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from sapo_learner import formats, shards
from sapo_learner.checkpoint_facts import corrupt, digest_of, verified
from sapo_learner.checkpoint_names import FACTS
from sapo_learner.disk import naming
from sapo_learner.errors import NotFound
from sapo_learner.manifest import Blob
from sapo_learner.parallel import Ranks
from sapo_learner.segment import fsync
from sapo_learner.snapshot import LazyTensors, save_tensors, tensors_in

_SHARES = ("model", "optimizer")  # what ranks may each hold a share of
_TENSORS = (*_SHARES, "rng")


@dataclass
class CheckpointState:
    """step: optimizer steps done. cursor, chain: last log entry consumed and the log's hash there.

    model, optimizer, rng: flat names -> tensors that share no storage. ledger, environment (torch version, threads,
    world size, ...), published and extra must survive JSON; floats do exactly.
    """

    step: int
    cursor: int
    chain: str
    ledger: dict[str, int]
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    environment: dict[str, Any] = field(default_factory=dict)
    published: list[Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def load(path: Path) -> CheckpointState:
    """Read a checkpoint, checking every digest. Tensors are whole and on the CPU, each read when it is asked for where
    one process saved it (`tensors_in`).

    Raises Corrupt naming the file and another checkpoint to try, NotFound when there is no such directory.
    """
    return with_tensors(load_facts(path), path)


def with_tensors(state: CheckpointState, path: Path) -> CheckpointState:
    """`state` of the checkpoint at `path`, with its model and optimizer."""
    if is_sharded(path):
        for name, tensor in shards.read(path).items():
            kind, _, own = name.partition("/")
            getattr(state, kind)[own] = tensor
    else:
        state.model, state.optimizer = (_read(path / f"{name}.safetensors") for name in _SHARES)
    return state


def load_facts(path: Path) -> CheckpointState:
    """Everything but model and optimizer; their digests are checked, too. Raises what `load` does."""
    if not path.is_dir():
        raise NotFound("no such checkpoint", where=str(path))
    facts = verified(path)
    rest: dict[str, Any] = {
        each.name: facts[each.name] for each in fields(CheckpointState) if each.name not in _TENSORS
    }
    return CheckpointState(**rest, model={}, optimizer={}, rng=dict(_read(path / "rng.safetensors")))


def is_sharded(path: Path) -> bool:
    return (path / shards.METADATA).exists()


def load_whole(path: Path) -> Mapping[str, Tensor]:
    """Model and optimizer of a checkpoint that is not sharded, named as among shards; each read when asked for."""
    parts = {kind: tensors_in(path / f"{kind}.safetensors") for kind in _SHARES}
    held = {f"{kind}/{name}": each for kind, part in parts.items() for name, each in part.held.items()}

    def read(name: str, _: Tensor) -> Tensor:
        kind, own = name.split("/", 1)
        return parts[kind][own]

    return LazyTensors(held, read)


def share_of(state: CheckpointState) -> dict[str, Tensor]:
    """Model and optimizer as they are named among shards."""
    return {f"{kind}/{name}": each for kind in _SHARES for name, each in getattr(state, kind).items()}


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        return tensors_in(path)
    except safetensors.SafetensorError as error:
        raise corrupt(path, str(error)) from None


def write(directory: Path, state: CheckpointState, ranks: Ranks) -> None:
    """All files of a checkpoint, each on the disk, and then the directory."""
    share, files = share_of(state), dict[str, Blob]()
    if sharded := shards.are_sharded(share):
        files = shards.write(share, directory, ranks)
    ranks.decided(lambda: _write_rest(directory, state, ("rng",) if sharded else _TENSORS, files))


def _write_rest(directory: Path, state: CheckpointState, names: tuple[str, ...], files: dict[str, Blob]) -> None:
    for name in names:
        path = directory / f"{name}.safetensors"
        save_tensors(getattr(state, name), path)
        fsync(path)
        files[path.name] = Blob.of(path)
    facts = {each.name: getattr(state, each.name) for each in fields(state) if each.name not in _TENSORS}
    facts |= {"format": formats.CHECKPOINT.newest, "files": {name: blob.model_dump() for name, blob in files.items()}}
    path = directory / FACTS
    with naming(path):
        path.write_text(json.dumps(facts | {"digest": digest_of(facts)}, indent=1, allow_nan=False))
    fsync(path)
    fsync(directory)
