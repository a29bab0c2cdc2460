"""The whole system in one process: the four services over real HTTP, gRPC and Redis, each as `sapo serve` runs it.

async with system(config, redis_url) as running:
    await running.finished()
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import SecretStr

from services.control_plane.service import serve as serve_control_plane
from services.ingest.service import serve as serve_ingest
from services.learner.service import serve as serve_learner
from services.rollout.service import serve as serve_rollout
from services.runtime.client import ControlPlaneClient
from services.runtime.lifecycle import Lifecycle
from services.runtime.settings import Environment, RunConfig
from tests.small_run import TOKEN, free_address


@dataclass
class System:
    config: RunConfig
    control: ControlPlaneClient
    lifecycles: dict[str, Lifecycle] = field(default_factory=dict)
    tasks: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)

    async def finished(self, seconds: float = 60) -> dict[str, Any]:
        """Wait for the run's end; the status then. Raises what a service died of."""
        async with asyncio.timeout(seconds):
            while (status := await self.control.status())["state"] != "finished":
                for task in self.tasks.values():
                    if task.done():
                        task.result()
                await asyncio.sleep(0.05)
            await self.tasks["learner"]
        return status

    async def stop(self, name: str) -> None:
        self.lifecycles[name].stopping.set()
        await asyncio.gather(self.tasks[name], return_exceptions=True)


@asynccontextmanager
async def system(config: RunConfig, redis_url: str, *, workers: int = 1) -> AsyncIterator[System]:
    addresses = {name: free_address() for name in ("control-plane", "grpc")}
    environment = Environment(
        control_plane_url=f"http://{addresses['control-plane']}",
        ingest_address=addresses["grpc"],
        redis_url=SecretStr(redis_url),
        token=SecretStr(TOKEN),
        patience_seconds=30,
    )
    any_port, threads = "127.0.0.1:0", torch.get_num_threads()
    async with ControlPlaneClient(environment.control_plane_url, TOKEN, patience=30) as control:
        running = System(config, control)

        def start(name: str, service: Any, /, *arguments: Any, **options: Any) -> None:
            lifecycle = running.lifecycles[name] = Lifecycle()
            running.tasks[name] = asyncio.create_task(service(lifecycle, *arguments, **options))

        start("control-plane", serve_control_plane, config, environment, listen=addresses["control-plane"])
        start("ingest", serve_ingest, environment, listen=addresses["grpc"], http_listen=any_port)
        start("learner", serve_learner, environment, http_listen=any_port)
        for index in range(workers):
            name = f"rollout-{index}"
            start(name, serve_rollout, environment, name=name, http_listen=any_port)
        try:
            yield running
        finally:
            for name in (*(each for each in running.tasks if each.startswith("rollout")), "learner", "ingest"):
                await running.stop(name)
            await running.stop("control-plane")
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(False)
