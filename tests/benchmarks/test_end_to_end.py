"""The benchmark of the whole way still runs, on either side; its figures mean nothing in four steps."""

import subprocess
import sys
from pathlib import Path

import pytest

from sapo_learner.policy import tiny_policy, write_policy
from tests.recorded import ALPHABET

pytest.importorskip("trl.trainer.grpo_trainer")
pytestmark = pytest.mark.timeout(300)
SERVICES = {"sapo up", "redis", "control-plane", "ingest", "learner", "rollout-0"}


def rows(side: str, directory: Path) -> list[list[str]]:
    """Of all tables of a report."""
    write_policy(tiny_policy(ALPHABET, seed=0), directory / "policy")
    command = [sys.executable, "-m", "benchmarks.end_to_end", "--small", "--sides", side]
    files = ["--policy", directory / "policy", "--out", directory / "report.md"]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (directory / "report.md").read_text().splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]


def test_it_measures_every_process_of_the_stack(tmp_path: Path) -> None:
    found = rows("ours", tmp_path)
    (ours,) = (row for row in found if row[0] == "0")
    assert ours[1] == "ours"
    assert ours[3] == "2"  # the first policy that was kept
    went = {row[0]: float(row[1]) + float(row[2]) for row in found if row[0] in SERVICES}
    assert went.keys() == SERVICES
    assert min(went.values()) >= 0
    assert went["learner"] > 0.1
    assert sum(went.values()) == pytest.approx(float(ours[5]), abs=0.1 * (len(went) + 1))  # each is rounded


def test_it_measures_trl(tmp_path: Path) -> None:
    (trl,) = (row for row in rows("TRL", tmp_path) if row[0] == "0")
    assert trl[1] == "TRL"
    assert trl[3] == "2"
    assert float(trl[5]) > 0.1
