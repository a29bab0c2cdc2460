"""Ranks that torchrun starts again find each other, and not what those before them left in torchrun's store; and what
those before them had half saved is no checkpoint (I2)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sapo_learner import checkpoint

RANK = """
import gc
gc.disable()  # six of these start, each for a moment
import os, signal, sys, time
from pathlib import Path
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from sapo_learner import checkpoint, shards
from sapo_learner.parallel import joined

directory = Path(sys.argv[1])
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
fsync = os.fsync

def state(step):
    share = distribute_tensor(torch.arange(8) + float(step), init_device_mesh("cpu", (2,)), [Shard(0)])
    return checkpoint.CheckpointState(step, step, "", {}, {"w": share}, {}, {})

def dying(descriptor):
    # in the middle of this rank's own shard
    path = f"/proc/self/fd/{descriptor}"
    if os.readlink(path).endswith(f"__{rank}_0.distcp"):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

if attempt and rank == 0:
    time.sleep(0.5)  # so that the other one is there first, and finds the store as it was left
with joined(torch.device("cpu")) as ranks:
    if attempt == 0:
        checkpoint.save(directory, state(10), token=1, ranks=ranks)
    newest = ranks.decided(lambda: checkpoint.load_newest(directory, read=checkpoint.load_facts))
    found = state(0)
    shards.fill({"model/w": found.model["w"]}, newest.found.path)
    said = ranks.said((rank, attempt, newest.found.step, newest.reason, found.model["w"].to_local().tolist()))
    if attempt < 2 and rank == attempt:
        os.fsync = dying
    checkpoint.save(directory, state(20 + attempt), token=attempt + 1, ranks=ranks)
    if rank == 0:
        print(said)
"""


@pytest.mark.timeout(150)
def test_I2_ranks_join_anew_after_one_was_killed_while_saving_and_another(tmp_path: Path) -> None:
    """First rank 0 in the middle of its shard, then rank 1; the third time they go on from what was whole."""
    (tmp_path / "rank.py").write_text(RANK)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2",
         str(tmp_path / "rank.py"), str(tmp_path / "checkpoints")],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    shares = [10.0, 11.0, 12.0, 13.0], [14.0, 15.0, 16.0, 17.0]
    said = [(rank, 2, 10, "", share) for rank, share in enumerate(shares)]
    assert result.stdout.splitlines() == [str(said)]
    whole = [(each.step, each.token) for each in checkpoint.list_whole(tmp_path / "checkpoints")]
    assert whole == [(22, 3), (10, 1)]
    assert list((tmp_path / "checkpoints").glob(".tmp-*")) == []
    loaded = checkpoint.load_newest(tmp_path / "checkpoints")
    assert torch.equal(loaded.state.model["w"], torch.arange(8) + 22.0)
