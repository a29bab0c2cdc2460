"""Tensors of a sharded learner on disk, by torch.distributed.checkpoint: each rank writes its share, any number reads.

write   all ranks; every one needs the same directory, so several nodes need a file system that they share
fill    all ranks, into their shares, whatever number of ranks wrote
read    whole tensors, in a process alone
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from sapo_learner.disk import naming
from sapo_learner.errors import Corrupt
from sapo_learner.manifest import Blob
from sapo_learner.parallel import Ranks
from sapo_learner.segment import fsync

DIRECTORY = "shards"
METADATA = f"{DIRECTORY}/.metadata"
"""A file of every checkpoint that has shards."""


def are_sharded(tensors: Mapping[str, Tensor]) -> bool:
    return any(isinstance(each, DTensor) for each in tensors.values())


def write(tensors: Mapping[str, Tensor], checkpoint: Path, ranks: Ranks) -> dict[str, Blob]:
    """Into `checkpoint`/shards, durably; returns every file, by its name in `checkpoint`. Called on all ranks.

    Raises OSError on all ranks when a disk took nothing on one.
    """
    directory = checkpoint / DIRECTORY
    try:
        with naming(directory):
            save(dict(tensors), storage_writer=FileSystemWriter(directory, sync_files=True))
    except CheckpointException as error:
        raise _disk_failure(error, directory) from error
    return {name: blob for said in ranks.each(lambda: _own(directory, ranks)) for name, blob in said.items()}


def _own(directory: Path, ranks: Ranks) -> dict[str, Blob]:
    """What this rank wrote, read again; the first one sees to it that all files keep their names."""
    paths = sorted(directory.glob(f"__{ranks.rank}_*"))
    if ranks.first:
        fsync(directory)
        paths.append(directory.parent / METADATA)
    return {str(path.relative_to(directory.parent)): Blob.of(path) for path in paths}


def shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Of every tensor there, by name."""
    found = FileSystemReader(checkpoint / DIRECTORY).read_metadata().state_dict_metadata
    return {name: each.size for name, each in found.items() if isinstance(each, TensorStorageMetadata)}


def fill(tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Read into these, in place; called on all ranks. They are there, with these shapes (see `shapes`)."""
    try:
        load(dict(tensors), storage_reader=FileSystemReader(checkpoint / DIRECTORY))
    except CheckpointException as error:
        raise _damaged(error, checkpoint) from error


def read(checkpoint: Path) -> dict[str, Tensor]:
    """Everything there, whole, on the CPU; needs no process group. Raises Corrupt."""
    reader = FileSystemReader(checkpoint / DIRECTORY)
    found = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in reader.read_metadata().state_dict_metadata.items()
        if isinstance(each, TensorStorageMetadata)
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group
            load(found, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise _damaged(error, checkpoint) from error
    return found


def _disk_failure(error: CheckpointException, directory: Path) -> BaseException:
    for rank, (cause, _) in error.failures.items():
        if isinstance(cause, OSError):
            return OSError(cause.errno, f"rank {rank}: {cause.strerror}", cause.filename or str(directory))
    return error


def _damaged(error: CheckpointException, checkpoint: Path) -> Corrupt:
    cause = next(iter(error.failures.values()))[0]
    reason = " ".join(str(cause).split())[:200]
    return Corrupt(f"its shards cannot be read: {reason}", where=str(checkpoint), fix="try another checkpoint")
