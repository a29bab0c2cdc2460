"""Several learner processes as one job: it ends as the rank did that ended it, soon, and nothing of it stays."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from torch.distributed.elastic.multiprocessing import ProcessFailure

from sapo_learner.errors import ConfigError
from services.learner.launch import cause
from services.runtime.processes import PARENT
from tests.logs import text_of

UNREACHABLE = {
    "SAPO_CONTROL_PLANE_URL": "http://127.0.0.1:9", "SAPO_REDIS_URL": "redis://127.0.0.1:9", "SAPO_TOKEN": "a token",
}  # fmt: skip


def failure(rank: int, code: int, second: int) -> ProcessFailure:
    found = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="")
    found.timestamp = second
    return found


@pytest.mark.parametrize(
    ("failures", "guilty"),
    [
        ([(0, 8, 5), (1, -9, 5)], 1),  # rank 0 says that rank 1 is gone
        ([(0, -9, 5), (1, 8, 5)], 0),
        ([(0, -15, 5), (1, 8, 5), (2, -11, 6)], 2),
        ([(0, 8, 6), (1, 8, 5)], 1),  # out of memory: whoever was first
        ([(0, 2, 5), (1, 2, 5)], 0),
    ],
)
def test_the_cause_is_who_died_first_and_not_of_another(failures: list[tuple[int, int, int]], guilty: int) -> None:
    assert cause([failure(*each) for each in failures]).local_rank == guilty


def launcher(**environment: str) -> "subprocess.Popen[str]":
    without = {name: value for name, value in os.environ.items() if not name.startswith("SAPO_")}
    return subprocess.Popen(
        [sys.executable, "-m", "services.learner.launch", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=without | environment,
    )  # fmt: skip


@pytest.mark.timeout(120)
def test_a_mistake_is_said_once_and_ends_all_ranks_at_once() -> None:
    """Rank 0 ends before it has joined; torchrun's agent would wait half a minute for one that does not heed it."""
    process = launcher()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == ConfigError.exit_code, output
    said, ended = [line for line in text_of(output).splitlines() if " ERROR " in line]
    assert "SAPO_CONTROL_PLANE_URL: not set" in said
    assert "rank 0 of 2 died (exit code 2)" in ended
    assert "Traceback" not in output
    assert "Unable to shutdown" not in output


@pytest.mark.timeout(120)
def test_ranks_end_with_a_launcher_that_is_killed() -> None:
    process, ranks = launcher(**UNREACHABLE), list[psutil.Process]()
    try:
        ranks = until_two(psutil.Process(process.pid))
        process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert alive == []
    finally:
        for each in (process, *ranks):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.communicate()


@pytest.mark.timeout(120)
def test_the_launcher_dies_of_the_signal_that_a_rank_died_of() -> None:
    process = launcher(**UNREACHABLE)
    try:
        until_two(psutil.Process(process.pid))[1].kill()
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert "of 2 died (SIGKILL, by the kernel because memory ran out, or by somebody)" in output


def until_two(launcher: psutil.Process) -> list[psutil.Process]:
    deadline = time.monotonic() + 60
    while len(ranks := launcher.children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return ranks


def test_a_rank_whose_launcher_is_gone_already_does_not_begin() -> None:
    code = "from services.runtime.processes import end_with_parent; end_with_parent(); print('begun')"
    for parent, lives in ((os.getpid(), True), (1, False)):
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=os.environ | {PARENT: str(parent)},
            timeout=60,
        )
        assert (result.stdout, result.returncode) == (("begun\n", 0) if lives else ("", -signal.SIGKILL))
