"""`sapo serve` in several terminals: processes started one by one, in an order that could not be worse.

The workers first, then ingest and the learner, then the control plane, and Redis last of all. The learner is two ranks
under torchrun, one of which is killed. A third worker joins in mid-run, the first one leaves by SIGTERM; the others go
on to the end.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from services.runstore import EmbeddedRedis
from tests.end_to_end.conftest import SETTINGS
from tests.logs import log_text

STEPS = 40
TORCHRUN = [
    "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "-m", "services.cli",
]  # fmt: skip
TOKEN = "the-terminals'-token"


@dataclass
class Terminal:
    """One `sapo serve` and what it wrote."""

    name: str
    process: subprocess.Popen[bytes]
    http: str
    log: Path

    @property
    def said(self) -> str:
        return log_text(self.log)

    def waiting_for(self) -> list[str]:
        return list(httpx.get(f"http://{self.http}/readyz", timeout=5).json()["waiting_for"])

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=30)


@dataclass
class Terminals:
    directory: Path
    environment: dict[str, str]
    redis: EmbeddedRedis
    addresses: dict[str, str]
    open: dict[str, Terminal] = field(default_factory=dict)
    # What was seen on the way
    waited_for: dict[str, list[str]] = field(default_factory=dict)  # by service, before anything else was there
    exit_codes: dict[str, int] = field(default_factory=dict)
    leases_after_leaving: list[Any] = field(default_factory=list)  # of the worker that left
    left_at: int = 0  # step
    dies_of_sigpipe: list[str] = field(default_factory=list)
    killed_at: int = 0  # step; one of the learner's ranks
    status: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)

    def start(self, name: str, *options: str) -> Terminal:
        service = name.partition("-")[0] if name.startswith("rollout") else name
        http = self.addresses[name]
        listen = ["--listen", http] if name == "control-plane" else ["--http-listen", http]
        log = self.directory.parent / f"{name}.log"
        module = TORCHRUN if name == "learner" else ["services.cli"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *module, "serve", service, *options, *listen],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | self.environment,
            )  # fmt: skip
        self.open[name] = Terminal(name, process, http, log)
        return self.open[name]

    def sapo(self, *arguments: str) -> Any:
        result = subprocess.run(
            [sys.executable, "-m", "services.cli", *arguments],
            capture_output=True, text=True, timeout=60, env=os.environ | self.environment,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(result.stdout)

    def ask(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.get(f"http://{self.addresses['control-plane']}{path}", headers=headers, timeout=10).json()

    def wait(self, what: str, condition: Callable[[], Any], seconds: float = 150) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if found := condition():
                    return found
            except (httpx.TransportError, psutil.Error, KeyError, TypeError, FileNotFoundError):
                pass
            time.sleep(0.05)
        logs = "\n".join(f"--- {each.name}\n{each.said[-2000:]}" for each in self.open.values())
        pytest.fail(f"no {what} within {seconds} s\n{logs}")


@contextmanager
def opened(root: Path, cache: Path) -> Iterator[Terminals]:
    """Addresses are held open, as an operator would have chosen them beforehand."""
    holders = []

    def reserve() -> str:
        holder = socket.socket()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        holders.append(holder)
        return f"127.0.0.1:{holder.getsockname()[1]}"

    names = ("control-plane", "ingest", "learner", "rollout-0", "rollout-1", "rollout-2", "grpc")
    addresses = {name: reserve() for name in names}
    redis = EmbeddedRedis(root / "redis")
    environment = {
        "SAPO_CONTROL_PLANE_URL": f"http://{addresses['control-plane']}",
        "SAPO_INGEST_ADDRESS": addresses["grpc"],
        "SAPO_REDIS_URL": redis.url,
        "SAPO_TOKEN": TOKEN,
        "SAPO_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
    }
    terminals = Terminals(root / "run", environment, redis, addresses)
    try:
        yield terminals
    finally:
        for each in terminals.open.values():
            if each.process.poll() is None:
                each.process.kill()  # torchrun's ranks end with it
                each.process.wait()
        redis.stop()
        for holder in holders:
            holder.close()


def run(terminals: Terminals) -> None:
    settings = SETTINGS | {
        "run.name": "terminals", "run.dir": terminals.directory, "training.steps": STEPS, "evaluation.every": 1000,
    }  # fmt: skip
    _start_in_the_worst_order(terminals, [f"--set={key}={value}" for key, value in settings.items()])
    terminals.wait("third step", lambda: terminals.ask("/v1/status")["learner"]["step"] >= 3)
    _lose_a_rank(terminals)
    _join_and_leave(terminals)
    terminals.wait("end", lambda: terminals.ask("/v1/status")["state"] == "finished", seconds=120)
    terminals.exit_codes["learner"] = terminals.open["learner"].process.wait(timeout=30)
    terminals.status = terminals.sapo("status", terminals.environment["SAPO_CONTROL_PLANE_URL"], "--json")
    terminals.ledger = terminals.sapo("ledger", str(terminals.directory), "--json")
    for name in ("rollout-1", "rollout-2", "ingest", "control-plane"):
        terminals.exit_codes[name] = terminals.open[name].end()


def _start_in_the_worst_order(terminals: Terminals, settings: list[str]) -> None:
    (terminals.directory.parent / "run.yaml").write_text("policy: {source: tiny}\n")
    for name in ("rollout-0", "rollout-1"):
        terminals.start(name, "--name", name)
    terminals.start("ingest", "--listen", terminals.addresses["grpc"])
    terminals.start("learner")
    for each in list(terminals.open.values()):
        terminals.waited_for[each.name] = terminals.wait(
            f"word of what {each.name} waits for", lambda: [w for w in each.waiting_for() if "control plane" in w]  # noqa: B023
        )  # fmt: skip
    control = terminals.start("control-plane", str(terminals.directory.parent / "run.yaml"), *settings)
    terminals.waited_for["control-plane"] = terminals.wait(
        "word of what the control plane waits for", lambda: [w for w in control.waiting_for() if "Redis" in w]
    )
    terminals.wait(
        "word that the control plane waits for Redis",
        lambda: any("Redis" in each for each in terminals.open["learner"].waiting_for()),
    )
    terminals.redis.start()


def _join_and_leave(terminals: Terminals) -> None:
    terminals.dies_of_sigpipe = [each.name for each in terminals.open.values() if not ignores_sigpipe(each.process.pid)]
    terminals.wait("third worker", lambda: _tokens_of(terminals, "rollout-2") > 0)
    terminals.left_at = int(terminals.ask("/v1/status")["learner"]["step"])
    terminals.exit_codes["rollout-0"] = terminals.open["rollout-0"].end()
    terminals.leases_after_leaving = [
        each for each in terminals.ask("/v1/status")["slowest_draws"] if each["worker"] == "rollout-0"
    ]


def _lose_a_rank(terminals: Terminals) -> None:
    """kill -9 of rank 1, once there is a checkpoint; the agent starts both again. Meanwhile the third worker starts."""
    terminals.wait("checkpoint", lambda: any((terminals.directory / "checkpoints").glob("step-*[1-9]-*")))
    (victim,) = _ranks(terminals, "1")
    terminals.killed_at = int(terminals.ask("/v1/status")["learner"]["step"])
    victim.kill()
    terminals.start("rollout-2", "--name", "rollout-2")
    terminals.wait("rank in its place", lambda: [each for each in _ranks(terminals, "1") if each != victim])


def _ranks(terminals: Terminals, number: str) -> list[psutil.Process]:
    agent = psutil.Process(terminals.open["learner"].process.pid)
    return [each for each in agent.children() if each.is_running() and each.environ().get("RANK") == number]


def ignores_sigpipe(pid: int) -> bool:
    """Whether writing to a peer that has hung up is an error for the process, and not its silent end."""
    (mask,) = re.findall(r"SigIgn:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) & 1 << signal.SIGPIPE - 1)


def _tokens_of(terminals: Terminals, worker: str) -> int:
    return sum(each["tokens"] for each in terminals.ask("/v1/status")["workers"] if each["worker"] == worker)


def waits_said(terminal: Terminal, peer: str) -> list[str]:
    """The log's lines that say that the process waits for `peer`."""
    return re.findall(rf"waiting: {peer}.*", terminal.said, flags=re.IGNORECASE)
