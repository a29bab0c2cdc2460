"""A run with real vLLM in its workers: its engine core is killed, then the worker itself, and the run goes on."""

import json
import signal
from pathlib import Path

import psutil
import pytest

from services.runtime.settings import dump_config
from tests.contract.vllm_engines import engine_cores, needs_vllm
from tests.end_to_end.test_interrupts import Up, begun, wait_for
from tests.system import jsonl_run

pytestmark = [pytest.mark.vllm, needs_vllm]


def worker_pid(directory: Path) -> int:
    return int(json.loads((directory / "services.json").read_text())["processes"]["rollout-0"]["pid"])


@pytest.mark.timeout(400)
def test_a_run_survives_kill_9_of_an_engine_core_and_of_its_worker(tmp_path: Path) -> None:
    config = jsonl_run(
        tmp_path, 8, "1", engine={"name": "vllm", "slots": 16}, local={"rollout_workers": 1},
        training={"steps": 150, "groups_per_step": 8}, optimizer={"learning_rate": 1e-3},
        evaluation={"every": 1000, "samples": 1, "boundary_samples": 1}, probe={"behaviour_every": 3},
        pacing={"lease_seconds": 5},
    )  # fmt: skip
    path, directory = tmp_path / "run.yaml", config.run.directory
    path.write_text(dump_config(config))
    up = Up(path)
    wait_for(up, lambda: begun(directory) >= 5)
    for victim in ("core", "worker"):
        before, seen = psutil.Process(worker_pid(directory)), begun(directory)
        (core,), engine = engine_cores(before), before.children(recursive=True)
        (core if victim == "core" else before).send_signal(signal.SIGKILL)
        wait_for(up, lambda: worker_pid(directory) != before.pid and begun(directory) > seen + 5)  # noqa: B023
        _, alive = psutil.wait_procs([*engine, before], timeout=20)
        assert not alive, f"left behind by the death of the {victim}"
    output = up.ended(120)  # the rest of the steps, too
    assert up.process.returncode == 0, output
    assert "ledger balances" in output
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["ledger_balanced"]
    assert summary["engine_logprob_max_abs_diff"] <= 1e-4
    assert summary["stale"] == 0
