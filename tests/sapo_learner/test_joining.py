"""Ranks that torchrun starts again find each other, and not what those before them left in torchrun's store."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import os, signal, time
import torch
from sapo_learner.parallel import joined

attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
if attempt and rank == 0:
    time.sleep(0.5)  # so that the other one is there first, and finds the store as it was left
with joined(torch.device("cpu")) as ranks:
    said = ranks.said((ranks.rank, attempt))
    if attempt < 2 and rank == attempt:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.said(None)
    if rank == 0:
        print(said)
"""


@pytest.mark.timeout(150)
def test_ranks_join_anew_after_one_was_killed_and_another(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2",
         str(tmp_path / "rank.py")],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == ["[(0, 2), (1, 2)]"]
