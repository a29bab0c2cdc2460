"""deploy/examples/calculator.yaml, only smaller: responses of several turns, with a tool, through the whole stack."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sapo_learner.archive import Archive
from sapo_learner.trajectory import TrajectoryGroup
from services.judge import judge
from services.wire import decode
from tests.documents import ROOT

EXAMPLE = ROOT / "deploy" / "examples" / "calculator.yaml"
SMALLER = {
    "local.rollout_workers": 1,
    "training.steps": 3,
    "training.groups_per_step": 8,
    "sampling.group_size": 4,
    "evaluation.samples": 1,
    "evaluation.boundary_samples": 1,
    "probe.behaviour_every": 1,
    # A base that asks the calculator, and is sometimes wrong.
    "policy.warm_start.clean_steps": 55,
    "policy.warm_start.clean_extra_steps": 10,
    "policy.warm_start.clean_target": 0.3,
    "policy.warm_start.habit_steps": 1,
    "policy.warm_start.habit_target": 0.99,
    "policy.warm_start.samples": 1,
}

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Run:
    directory: Path
    groups: list[TrajectoryGroup]

    def sapo(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "services.cli", *arguments], capture_output=True, text=True, timeout=60
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, warm_starts: Path) -> Run:
    directory = tmp_path_factory.mktemp("calculator") / "run"
    settings = [f"--set={key}={value}" for key, value in {**SMALLER, "run.dir": directory}.items()]
    outcome = subprocess.run(
        [sys.executable, "-m", "services.cli", "up", str(EXAMPLE), *settings], capture_output=True, text=True,
        timeout=300, env=os.environ | {"SAPO_CACHE_DIR": str(warm_starts)},
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    archived = Archive(directory / "archive", None).entries()
    return Run(directory, [decode(each.payload) for each in archived])


def test_it_comes_to_its_end_and_the_ledger_balances(run: Run) -> None:
    ledger = run.sapo("ledger", str(run.directory), "--json")
    assert ledger.returncode == 0, ledger.stderr
    answer = json.loads(ledger.stdout)
    assert answer["balanced"], answer
    assert answer["accepted"] == len(run.groups) == 3 * 8
    assert answer["trained"] > 0
    summary = json.loads((run.directory / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["tokens_trained"] > 0


def test_what_the_calculator_said_stands_masked_between_sampled_tokens(run: Run) -> None:
    asked = 0
    for group in run.groups:
        for response in group.trajectories:
            sampled = response.loss_mask
            assert sampled[0], "the first turn is the policy's"
            edges = np.flatnonzero(np.diff(sampled.astype(np.int8)))
            asked += len(edges) >= 2  # sampled, masked, sampled again
            assert (response.behaviour_logprobs[sampled] < 0).all()
            assert (response.behaviour_logprobs[~sampled] == 0).all()
    assert asked >= 10


def test_I4_sampled_tokens_of_later_turns_have_the_log_probs_that_are_recomputed(run: Run) -> None:
    judgement = judge(run.directory)
    table = judgement.table
    assert len(table.recorded) == sum(int(each.loss_mask.sum()) for group in run.groups for each in group.trajectories)
    assert np.abs(table.recorded - table.logprobs).max() <= 1e-4
    summary = json.loads((run.directory / "summary.json").read_text())
    assert summary["engine_logprob_probes"] == 3
    assert summary["engine_logprob_max_abs_diff"] <= 1e-4
