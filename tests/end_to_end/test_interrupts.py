"""Ctrl-C at any moment, and once more during the drain: `sapo up` ends soon, alone, and can be taken up again."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from services.runtime.settings import dump_config
from tests.end_to_end.conftest import processes_of
from tests.system import jsonl_run

STEPS = 400


class Up:
    def __init__(self, config: Path) -> None:
        self._token = secrets.token_hex(8)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.cli", "up", str(config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=os.environ | {"SAPO_TOKEN": self._token}, start_new_session=True,
        )  # fmt: skip

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def ended(self, seconds: float = 40) -> str:
        """Everything it wrote."""
        output, _ = self.process.communicate(timeout=seconds)
        assert processes_of(self._token) == []
        assert "Traceback" not in output
        return output


def begun(directory: Path) -> int:
    """Lines of steps in the record."""
    record = directory / "record.jsonl"
    return record.read_text().count('"kind":"step"') if record.exists() else 0


def loads(up: Up, library: str) -> bool:
    """Before its first import, Python itself would answer Ctrl-C, with a traceback."""
    return any(library in each.path for each in psutil.Process(up.process.pid).memory_maps())


def wait_for(up: Up, condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert up.process.poll() is None, up.ended()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.timeout(240)
def test_ctrl_c_at_any_moment_and_again_during_the_drain(tmp_path: Path) -> None:
    config = jsonl_run(tmp_path, 8, "1", training={"steps": STEPS, "groups_per_step": 2})
    path, directory = tmp_path / "run.yaml", config.run.directory
    path.write_text(dump_config(config))

    up = Up(path)  # while modules load
    wait_for(up, lambda: loads(up, "_asyncio"))
    up.interrupt()
    up.ended()

    up = Up(path)  # while its processes start
    wait_for(up, lambda: (directory / "services.json").exists())
    up.interrupt()
    assert "draining" in up.ended()
    assert up.process.returncode == 0

    up = Up(path)  # while it trains, and while it drains
    wait_for(up, lambda: begun(directory))
    up.interrupt()
    time.sleep(0.3)
    up.interrupt()
    assert "draining" in up.ended()
    assert up.process.returncode == 0
    assert begun(directory) < STEPS

    ledger = subprocess.run(
        [sys.executable, "-m", "services.cli", "ledger", str(directory), "--json"], capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert ledger.returncode == 0, ledger.stderr
    assert json.loads(ledger.stdout)["balanced"]
