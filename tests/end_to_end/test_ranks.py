"""A learner of two processes, attacked in every part: a rank's disk and memory, each rank, their launcher, all at once.

One run by `sapo up`: it goes on after each attack, is interrupted, and is ended by a learner of one process. Tests read
what was seen.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from sapo_learner import checkpoint
from tests.end_to_end.conftest import Stack, end, running, wait_until
from tests.logs import log_text
from tests.system import jsonl_run

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]
GROUPS_PER_STEP, MORE_STEPS = 2, 4
LITTLE = 2000  # bytes, for a rank's share of a checkpoint
GREEDY = '''
"""SAPO, but a rank that finds its name in a file beside this wants more memory than there is."""

import os
from pathlib import Path

import torch
from sapo_learner.objectives import Surrogate, Tokens
from sapo_learner.objectives.sapo import SAPO


class Greedy(SAPO):
    def __call__(self, tokens: Tokens) -> Surrogate:
        if Path(__file__).with_name("greedy-" + os.environ.get("RANK", "alone")).exists():
            torch.empty(1 << 55)
        return super().__call__(tokens)
'''


@dataclass
class Attacked(Stack):
    said_at_full_disk: str = ""
    steps_at_full_disk: tuple[int, int] = (-1, -1)  # two looks, while the learner says that it waits
    learners_at_full_disk: set[int] = field(default_factory=set)  # process ids, before and after
    said_at_memory: str = ""
    page_at_memory: bytes = b"not looked at"  # what the learner worked on, as it lies there between two learners

    @property
    def log(self) -> str:
        return log_text(self.directory / "logs" / "learner.log")

    def rank(self, number: int) -> int:
        """Its process id."""
        for process in psutil.process_iter():
            try:
                environment, running = process.environ(), process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                continue
            ours = environment.get("SAPO_TOKEN") == self.environment["SAPO_TOKEN"]
            if ours and running and environment.get("RANK") == str(number):
                return process.pid
        raise KeyError(f"no rank {number}")

    def launcher(self) -> int:
        return int(self.services()["processes"]["learner"]["pid"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    root = tmp_path_factory.mktemp("ranks")
    (root / "greedy.py").write_text(GREEDY)
    config = jsonl_run(
        root, 8, "1", training={"steps": 10_000, "groups_per_step": GROUPS_PER_STEP}, parallel={"processes": 2},
        sampling={"group_size": 16, "max_tokens": 4}, checkpoint={"every": 2}, evaluation={"every": 100_000},
        objective={"name": str(root / "greedy.py")},
    )  # fmt: skip
    run = Attacked(config.run.directory, environment={"SAPO_TOKEN": secrets.token_hex(8)})
    (root / "run.yaml").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "services.cli", "up", str(root / "run.yaml")]
    with running(run, command) as process:
        goes_on(run, process, "the start")
        fill_disk(run, process)
        take_memory(run, process, root / "greedy-1")
        for name, victim in (("rank 0", 0), ("launcher", None)):
            os.kill(run.launcher() if victim is None else run.rank(victim), signal.SIGKILL)
            run.killed.append(name)
            goes_on(run, process, f"killing {name}")
        process.send_signal(signal.SIGINT)
        end(run, process)
    run.interrupted_at = checkpoint.list_whole(run.directory / "checkpoints")[0].step
    run.lines_before = len(run.lines("step"))
    changed = {"parallel.processes": 1, "training.steps": run.interrupted_at + MORE_STEPS}
    with running(run, [*command, *(f"--set={key}={value}" for key, value in changed.items())]) as process:
        end(run, process, seconds=120)
    return run


def goes_on(run: Attacked, process: "subprocess.Popen[str]", what: str) -> None:
    """Two steps more than were ever seen: those since the last checkpoint are done again."""
    seen = max((int(line["step"]) for line in run.lines("step")), default=0) if run.killed or run.said_at_memory else 0
    wait_until(lambda: max(int(line["step"]) for line in run.lines("step")) >= seen + 2, seconds=90,
               what=f"steps after {what}", process=process)  # fmt: skip


def fill_disk(run: Attacked, process: "subprocess.Popen[str]") -> None:
    """Rank 1 alone cannot write; then it can."""
    disk = psutil.Process(run.rank(1))
    run.learners_at_full_disk = {run.rank(0), run.rank(1)}
    before = disk.rlimit(psutil.RLIMIT_FSIZE)
    disk.rlimit(psutil.RLIMIT_FSIZE, (LITTLE, before[1]))
    wait_until(lambda: "training waits until there is room" in run.log, seconds=60, what="a full disk", process=process)
    first = len(run.lines("step"))
    wait_until(lambda: "room on the disk" in str(status(run)["learner"]["waiting_for"]), seconds=60,
               what="a status that says so", process=process)  # fmt: skip
    run.steps_at_full_disk = (first, len(run.lines("step")))
    disk.rlimit(psutil.RLIMIT_FSIZE, before)
    wait_until(lambda: len(run.lines("step")) >= first + 2, seconds=60, what="steps with room", process=process)
    run.learners_at_full_disk |= {run.rank(0), run.rank(1)}
    run.said_at_full_disk = run.log


def status(run: Attacked) -> dict[str, dict[str, object]]:
    headers = {"Authorization": f"Bearer {run.environment['SAPO_TOKEN']}"}
    return dict(httpx.get(f"{run.services()['control_plane_url']}/v1/status", headers=headers, timeout=30).json())


def take_memory(run: Attacked, process: "subprocess.Popen[str]", wish: Path) -> None:
    before = len(run.log)
    wish.touch()
    wait_until(lambda: "died (exit code 8)" in run.log[before:], seconds=60, what="its end", process=process)
    run.page_at_memory = (run.directory / "learner.attention").read_bytes()
    wish.unlink()
    run.said_at_memory = run.log[before:]
    goes_on(run, process, "a rank was out of memory")


def test_training_waits_for_one_rank_s_disk_and_no_process_ends(run: Attacked) -> None:
    first, second = run.steps_at_full_disk
    assert first == second
    assert len(run.learners_at_full_disk) == 2
    assert run.said_at_full_disk.count("training waits until there is room") == 1
    assert "rank 1: File too large" in run.said_at_full_disk
    assert "is saved; training goes on" in run.said_at_full_disk
    assert "Traceback" not in run.said_at_full_disk


def test_a_rank_out_of_memory_names_the_setting_and_others_do_not_bury_it(run: Attacked) -> None:
    lines = run.said_at_memory.splitlines()
    errors = [line for line in lines if " ERROR " in line]
    (cause,) = [line for line in errors if "out of memory while training on" in line]
    assert "rank 1 ERROR" in cause
    assert "lower training.microbatch_tokens" in cause
    assert len(errors) <= 3, "its own, rank 0's that it is gone, the launcher's"
    assert "Traceback" not in run.said_at_memory
    assert not run.page_at_memory.strip(b"\0"), "no entry is to blame"


def test_the_log_says_which_rank_died_of_what(run: Attacked) -> None:
    deaths = re.findall(r"launcher ERROR rank (\d) of 2 died \((\w+)", run.log)
    assert deaths == [("1", "exit"), ("0", "SIGKILL")]
    assert "rank 1 ERROR rank 1 of 2: another rank" not in run.log, "the first rank and the launcher say it"
    assert re.findall(r"sapo: learner died \(([\w ]+)", run.outputs[0]) == ["exit code 8", *2 * ["SIGKILL"]]


def test_every_restart_goes_on_from_the_newest_checkpoint(run: Attacked) -> None:
    resumed = [int(step) for step in re.findall(r"resumed step-0*(\d+)-", run.log)]
    assert len(resumed) == 4  # out of memory, two kills, and the second command
    assert resumed == sorted(resumed)
    assert resumed[-1] == run.interrupted_at


def test_no_process_is_left_behind(run: Attacked) -> None:
    assert run.left_over == [[], []]
    assert list((run.directory / "checkpoints").glob(".tmp-*")) == []


def test_ctrl_c_saves_and_ends_in_time(run: Attacked) -> None:
    last = max(int(line["step"]) for line in run.lines("step")[: run.lines_before])
    assert run.exit_codes[0] == 0
    assert run.interrupted_at >= last
    assert "did not stop within" not in run.outputs[0]
    assert "the same command goes on from here" in run.outputs[0]


def test_one_process_ends_what_two_began(run: Attacked) -> None:
    assert run.exit_codes[1] == 0, run.outputs[1]
    assert run.summary["steps"] == run.interrupted_at + MORE_STEPS
    assert "this learner differs from the one that saved it" in run.log


def test_the_ledger_balances(run: Attacked) -> None:
    result = run.sapo("ledger", str(run.directory), "--json")
    assert result.returncode == 0, result.stdout
    ledger = json.loads(result.stdout)
    assert ledger["balanced"]
    assert ledger["trained"] + ledger["degenerate"] == GROUPS_PER_STEP * (run.interrupted_at + MORE_STEPS)
    assert ledger["trained"] > 0


def test_replay_comes_to_the_same_policy(run: Attacked) -> None:
    result = run.sapo("replay", str(run.directory), timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
