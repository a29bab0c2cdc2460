"""One run of the whole stack, started, interrupted, attacked and finished as a user would; many tests read it.

1. `sapo up` until a few steps are done, then Ctrl-C             -> InterruptedRun
2. the same command with changed settings, Prometheus beside it; kill -9 of every process in turn, and of Prometheus,
   then end  -> FinishedRun
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from sapo_learner import checkpoint
from tests.prometheus import Prometheus, Scrape, looking_back, scraping

STEPS, GROUPS_PER_STEP, GROUP_SIZE, MAX_POLICY_AGE = 40, 16, 8, 4
SETTINGS = {
    "run.name": "stack",
    "training.steps": STEPS,
    "training.groups_per_step": GROUPS_PER_STEP,
    "training.max_policy_age": MAX_POLICY_AGE,
    "sampling.group_size": GROUP_SIZE,
    "sampling.max_tokens": 12,
    "optimizer.learning_rate": 1e-4,
    "pacing.lease_seconds": 5,
    "checkpoint.every": 5,
    "evaluation.every": 20,
    "evaluation.samples": 198,
    "evaluation.boundary_samples": 396,
    "probe.behaviour_every": 2,
    "record.writers": "[tensorboard]",
    # A base that is good enough to have signal, in a few seconds.
    "policy.warm_start.clean_steps": 350,
    "policy.warm_start.clean_target": 0.5,
    "policy.warm_start.samples": 198,
}

CHANGED = {"optimizer.learning_rate": 8e-5, "checkpoint.every": 4}  # when the run is taken up again


@dataclass
class Stack:
    """A run directory, how `sapo up` ended each time, and what was seen on the way."""

    directory: Path
    exit_codes: list[int] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    left_over: list[list[str]] = field(default_factory=list)  # command lines that survived each `sapo up`
    killed: list[str] = field(default_factory=list)
    interrupted_at: int = 0
    resumed_at: int = 0
    lines_before: int = 0  # of steps in the record, when the run was taken up again
    live_ledgers: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    by_url: subprocess.CompletedProcess[str] | None = None  # `sapo eval URL` while the run went on
    environment: dict[str, str] = field(default_factory=dict)
    scrape: Scrape | None = None  # what Prometheus saw; None where it is not installed

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "summary.json").read_text()))

    @property
    def record(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "record.jsonl").read_text().splitlines()]

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.record if line["kind"] == kind]

    def services(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "services.json").read_text()))

    def sapo(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "services.cli", *arguments],
            capture_output=True, text=True, timeout=timeout, env=os.environ | self.environment,
        )  # fmt: skip


def wait_until(condition: Callable[[], Any], *, seconds: float, what: str, process: subprocess.Popen[str]) -> Any:
    """Poll until something is truthy; fails with the run's output when its process ends first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            found = condition()
        except (FileNotFoundError, ValueError, KeyError):
            found = None
        if found:
            return found
        if process.poll() is not None:
            pytest.fail(f"`sapo up` ended while waiting for {what}:\n{process.communicate()[0]}")
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no {what} within {seconds} s:\n{process.communicate()[0]}")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, warm_starts: Path) -> Stack:
    root = tmp_path_factory.mktemp("stack")
    stack = Stack(root / "run", environment={"SAPO_CACHE_DIR": str(warm_starts), "SAPO_TOKEN": secrets.token_hex(8)})
    stack.environment["SAPO_LOG_LEVEL"] = "debug"
    (root / "run.yaml").write_text("policy: {source: tiny}\n")
    command = [sys.executable, "-m", "services.cli", "up", str(root / "run.yaml")]
    command += [f"--set={key}={value}" for key, value in {**SETTINGS, "run.dir": stack.directory}.items()]

    with running(stack, command) as process:
        wait_until(lambda: last_step(stack) >= 6, seconds=120, what="step 6", process=process)
        process.send_signal(signal.SIGINT)
        end(stack, process)
    stack.interrupted_at = checkpoint.list_whole(stack.directory / "checkpoints")[0].step
    stack.lines_before = len(stack.lines("step"))

    changed = [f"--set={key}={value}" for key, value in CHANGED.items()]
    with running(stack, [*command, *changed]) as process:
        # Prometheus is killed, too; after that the run goes on for the rest of its steps.
        with scraping(root / "prometheus", stack.directory) as stack.scrape:
            attack(stack, process)
        end(stack, process, seconds=180)
    return stack


@pytest.fixture(scope="module")
def prometheus(stack: Stack) -> Iterator[Prometheus]:
    """What one saw of the second run until it was killed."""
    with looking_back(stack.scrape) as server:
        yield server


class running:
    def __init__(self, stack: Stack, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | stack.environment,
            start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> subprocess.Popen[str]:
        return self._process

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def end(stack: Stack, process: subprocess.Popen[str], seconds: float = 60) -> None:
    output, _ = process.communicate(timeout=seconds)
    stack.exit_codes.append(process.returncode)
    stack.outputs.append(output)
    stack.left_over.append(processes_of(stack.environment["SAPO_TOKEN"]))


def processes_of(token: str) -> list[str]:
    """Command lines of processes that still carry the run's token."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SAPO_TOKEN") == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def last_step(stack: Stack) -> int:
    return max((int(line["step"]) for line in stack.lines("step")), default=0)


def attack(stack: Stack, process: subprocess.Popen[str]) -> None:
    """kill -9 of every process, one after the other, each time after the run has gone on; look in meanwhile."""
    first = wait_until(
        lambda: next((line for line in stack.lines("step")[stack.lines_before :]), None), seconds=60,
        what="a step after resuming", process=process,
    )  # fmt: skip
    stack.resumed_at = int(first["step"])
    look_in(stack)
    for name in ("rollout-0", "ingest", "control-plane", "redis", "learner"):
        os.kill(stack.services()["processes"][name]["pid"], signal.SIGKILL)
        stack.killed.append(name)
        seen = len(stack.lines("step"))
        wait_until(lambda: len(stack.lines("step")) > seen, seconds=60, what=f"a step after killing {name}",  # noqa: B023
                   process=process)  # fmt: skip
    look_in(stack)


def look_in(stack: Stack) -> None:
    """What a user sees from another terminal: every process' metrics, the ledger by directory, a policy by URL.

    The workers are stopped meanwhile, so that the run cannot come to its end before everything was looked at.
    """
    import httpx

    services = stack.services()
    for name, each in services["processes"].items():
        if each["http"]:
            with contextlib.suppress(httpx.TransportError):  # one that is being restarted: looked at another time
                stack.metrics[name] = httpx.get(f"http://{each['http']}/metrics", timeout=5).text
    workers = [each["pid"] for name, each in services["processes"].items() if name.startswith("rollout")]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        result = stack.sapo("ledger", str(stack.directory), "--json")
        answer = json.loads(result.stdout or "{}")
        stack.live_ledgers.append({"exit_code": result.returncode, "stderr": result.stderr, **answer})
        if stack.by_url is None:
            stack.by_url = stack.sapo("eval", services["control_plane_url"], "--samples", "1", "--json")
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
