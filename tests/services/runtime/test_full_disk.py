"""A process on a full disk or without memory: it goes on while its log cannot grow, and ends with one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.logs import log_text

PROGRAM = """
import asyncio, logging, os, resource, sys
from sapo_learner.errors import ConfigError
from services.runtime import lifecycle
from services.runtime.logging import configure

log, before = logging.getLogger("test"), resource.getrlimit(resource.RLIMIT_FSIZE)

def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

async def serve(life):
    {body}

configure("test")
sys.exit(lifecycle.run(serve))
"""
LOSE = "log.info('kept'); room(os.fstat(2).st_size + 10); log.info('torn'); print('p' * 9_000); log.error('lost'); "


def run(tmp_path: Path, body: str, *, unbuffered: str = "1") -> tuple[int, str]:
    """Exit code, and the file that both outputs go to, as `sapo up` has it."""
    with (tmp_path / "log").open("ab") as output:
        process = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(body=body)], stdout=output, stderr=output, timeout=60,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    return process.returncode, log_text(tmp_path / "log")


def test_a_process_goes_on_while_its_log_cannot_grow_and_says_so_afterwards(tmp_path: Path) -> None:
    code, log = run(tmp_path, LOSE + "room(None); log.info('after'); raise ConfigError('as usual')")
    assert code == 2
    assert "INFO kept" in log
    assert "2 times there was no room to write here" in log
    assert log.index("no room") < log.index("INFO after") < log.index("ERROR as usual")
    assert "Traceback" not in log
    assert "lost" not in log


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_log_does_not_change_how_a_process_ends(tmp_path: Path, unbuffered: str) -> None:
    """Python itself exits with 120 when its last flush fails."""
    code, log = run(tmp_path, LOSE + "raise ConfigError('unseen')", unbuffered=unbuffered)
    assert code == 2
    assert "Traceback" not in log


def test_a_full_disk_that_ends_a_process_is_one_sentence_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "state"
    body = f"room(100_000); open({str(path)!r}, 'wb').write(bytes(200_000))"
    code, log = run(tmp_path, "from sapo_learner.disk import naming; from pathlib import Path\n"
                              f"    with naming(Path({str(path)!r})): {body}")  # fmt: skip
    assert code == 8
    (line,) = log.splitlines()
    assert f"ERROR {path}: File too large (make room there" in line


def test_a_memory_that_is_full_is_one_sentence(tmp_path: Path) -> None:
    code, log = run(tmp_path, "bytearray(1 << 60)")
    assert code == 8
    (line,) = log.splitlines()
    assert "ERROR out of memory" in line
