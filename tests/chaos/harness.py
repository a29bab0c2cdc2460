"""`sapo up` with a proxy in front of Redis, ingest and the control plane, and an eye on when the run goes on again."""

import asyncio
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

from sapo_learner.config import parse
from services.local import LocalRun
from services.local_child import Child
from services.runstore import EmbeddedRedis, RunStore
from services.runtime.settings import RunConfig
from tests.chaos.proxy import AckReader, Proxy, SeenAck
from tests.end_to_end.conftest import SETTINGS

Fsync = Literal["always", "everysec"]
WORKERS = 2
PATIENCE_SECONDS = 60.0  # for anything that must happen by itself
LEASE_SECONDS = 2.5
DELAY_SECONDS = 0.1  # to ingest and back: a step or two a second, or their replay would take as long as the run
NICE = 10  # of the workers: on a few cores, restarts are not to be measured against sampling


class ChaosFailure(AssertionError):
    """The run did something that it must not do, or did not do what it must."""


def small_config(directory: Path, *, steps: int) -> RunConfig:
    """The run of the end-to-end tests, so that the same base policy serves both, with little to evaluate."""
    sections: dict[str, dict[str, Any]] = {}
    base = {key: value for key, value in SETTINGS.items() if key.startswith("policy.")}
    settings = base | {
        "run.name": "chaos", "run.dir": str(directory), "training.steps": steps, "training.groups_per_step": 16,
        "training.max_policy_age": 4, "sampling.group_size": 8, "sampling.max_tokens": 12,
        "optimizer.learning_rate": 1e-4, "pacing.lease_seconds": LEASE_SECONDS, "checkpoint.every": 5,
        "engine.slots": 32,
        "evaluation.every": 1 << 30, "evaluation.samples": 1, "evaluation.boundary_samples": 1,
    }  # fmt: skip
    for key, value in settings.items():
        *path, last = key.split(".")
        section: dict[str, Any] = sections
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return parse(RunConfig, sections, where="chaos")


class ChaosRun(LocalRun):
    """The processes of `sapo up`; each reaches its peers through `proxies` alone. Started and stopped as a LocalRun."""

    def __init__(self, config: RunConfig, *, fsync: Fsync = "always", acks: list[SeenAck] | None = None) -> None:
        super().__init__(config, workers=WORKERS)
        self.redis = self._redis = EmbeddedRedis(self.directory / "redis", fsync=fsync)
        self.acks = [] if acks is None else acks
        targets = {
            "control-plane": self.control.url.removeprefix("http://"),
            "ingest": self._ingest_address,
            "redis": f"127.0.0.1:{self.redis.port}",
        }
        self.proxies = {name: Proxy(self._reserve(), target) for name, target in targets.items()}
        self.proxies["ingest"] = Proxy(
            self.proxies["ingest"].address, targets["ingest"], lambda: AckReader(self.acks.append), DELAY_SECONDS
        )
        self.before_spawn: dict[str, Callable[[], None]] = {}  # once, before this child is started again
        self._steps = _Tail(self.directory / "record.jsonl")
        self._http = httpx.AsyncClient(timeout=2)

    @property
    def token(self) -> str:
        return self._token

    @property
    def ingest_address(self) -> str:
        """The real one."""
        return self._ingest_address

    def _environment(self, process: str) -> dict[str, str]:
        """Also what a process started by hand would be given."""
        redis = f"redis://:{self.redis.password}@{self.proxies['redis'].address}/0"
        return super()._environment(process) | {
            "SAPO_CONTROL_PLANE_URL": f"http://{self.proxies['control-plane'].address}",
            "SAPO_INGEST_ADDRESS": self.proxies["ingest"].address,
            "SAPO_REDIS_URL": redis,
        }

    async def start(self) -> None:
        for proxy in self.proxies.values():
            await proxy.accept()
        await super().start()

    async def stop(self) -> None:
        for proxy in self.proxies.values():
            proxy.speak()
        await super().stop()
        for proxy in self.proxies.values():
            await proxy.close()
        await self._http.aclose()

    async def _spawn(self, child: Child) -> None:
        if prepare := self.before_spawn.pop(child.name, None):
            prepare()
        await super()._spawn(child)
        if child.name.startswith("rollout") and child.pid:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(child.pid).nice(NICE)

    def by_hand(self, name: str, command: list[str]) -> "subprocess.Popen[bytes]":
        """Start a service from another terminal."""
        with self.log_of(name).open("ab") as output:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environment("learner")
            )

    def log_of(self, name: str) -> Path:
        return self.directory / "logs" / f"{name}.log"

    @property
    def restarts(self) -> int:
        return sum(child.restarts for child in self.children.values())

    @asynccontextmanager
    async def store(self) -> AsyncIterator[RunStore]:
        async with await RunStore.connect(self.redis.url, self.config.run.name) as store:
            yield store

    async def generation(self) -> int:
        async with self.store() as store:
            return (await store.state()).generation or 0

    def last_step(self) -> int:
        return max((line["step"] for line in self._steps.lines()), default=0)

    def first_step_after(self, moment: float) -> float | None:
        """When the first optimizer step ended that ended after `moment` (Unix seconds)."""
        return min((line["ended"] for line in self._steps.lines() if line["ended"] > moment), default=None)

    async def until(self, what: str, condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
        """Poll `condition`, which may be a coroutine function, until it is true. Raises ChaosFailure."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = condition()
            if isinstance(found, Awaitable):
                found = await found
            if found:
                return found
            if self._failure.done():
                raise ChaosFailure(f"the run ended while waiting for {what}: {self._failure.exception()}")
            await asyncio.sleep(0.05)
        raise ChaosFailure(f"no {what} within {seconds:.0f} s; {self._described()}")

    async def recovered(self, since: float) -> float:
        """Unix time at which every process was ready again and a step had ended that ended after `since`."""
        await self.until("readiness of every process", self._all_ready)
        ready = time.time()
        step: float = await self.until("optimizer step", lambda: self.first_step_after(since))
        return max(ready, step)

    async def _all_ready(self) -> bool:
        children = [child for child in self.children.values() if child.http]
        if self.children["redis"].pid is None:
            return False
        return all(await asyncio.gather(*(self._ready(child) for child in children)))

    async def _ready(self, child: Child) -> bool:
        if child.pid is None:
            return False
        try:
            return (await self._http.get(f"http://{child.http}/readyz")).status_code == 200
        except httpx.TransportError:
            return False

    def _described(self) -> str:
        states = ", ".join(f"{name}: {child.state}" for name, child in self.children.items())
        last = [f"--- {name}\n" + "\n".join(_last_lines(self.log_of(name))) for name in self.children]
        return f"{states}; status: {json.dumps(self.status.get('learner'))}\n" + "\n".join(last)


class _Tail:
    """The step lines of a record, read on from where the last look ended."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._found = path, 0, []  # type: ignore[var-annotated]

    def lines(self) -> list[dict[str, Any]]:
        if not self._path.exists() or os.path.getsize(self._path) == self._offset:
            return self._found
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, end, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(end)
        for text in whole.splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # torn by a kill
                continue
            if line["kind"] == "step":
                self._found.append(line)
        return self._found


def _last_lines(path: Path, count: int = 6) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-count:] if path.exists() else []
