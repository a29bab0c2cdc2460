"""The benchmark against TRL still runs, and both sides still do the same job; its figures mean nothing at this size."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl.trainer.grpo_trainer")


def test_it_measures_both_sides_and_holds_their_gradients_against_one_another(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.learner", "--small", "--lengths", "heavy-tailed"]
    done = subprocess.run([*command, "--out", tmp_path / "learner.md"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [re.split(r" \| ", line.strip("| ")) for line in (tmp_path / "learner.md").read_text().splitlines()]
    cells = [row for row in rows if row[0] == "heavy-tailed"]
    assert [row[2] for row in cells[:2]] == ["ours", "TRL"]
    assert float(cells[0][4]) < float(cells[1][4])  # positions: theirs are padded
    ratio, difference = float(cells[2][1]), float(cells[2][4])
    assert ratio > 0
    assert 0 < difference < 1e-4
