"""The whole system in one process: the four services over real HTTP, gRPC and Redis, each as `sapo serve` runs it.

async with system(config, redis_url) as running:
    await running.finished()
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import SecretStr

from sapo_learner.policy import tiny_policy, write_policy
from services.control_plane.service import serve as serve_control_plane
from services.ingest.service import serve as serve_ingest
from services.learner.service import serve as serve_learner
from services.rollout.service import serve as serve_rollout
from services.runtime.client import ControlPlaneClient
from services.runtime.lifecycle import Lifecycle
from services.runtime.settings import Environment, RunConfig
from tests.recorded import ALPHABET
from tests.small_run import TOKEN, free_address, run_config

ANY_PORT = "127.0.0.1:0"


def jsonl_run(directory: Path, prompts: int, answer: str, **sections: dict[str, Any]) -> RunConfig:
    """Prompts of the tiny policy's alphabet, all with one answer; everything is trained on, two are held out."""
    model, problems, held_out = directory / "model-in", directory / "problems.jsonl", directory / "held-out.jsonl"
    directory.mkdir(exist_ok=True)
    write_policy(tiny_policy(ALPHABET, seed=0), model)
    lines = [json.dumps({"prompt": f"{number}+1=", "answer": answer}) for number in range(prompts)]
    problems.write_text("\n".join(lines))
    held_out.write_text("\n".join(lines[:2]))
    config = run_config(directory / "run", policy={"source": str(model)}, **sections)
    task = {"name": "jsonl", "path": str(problems), "held_out_path": str(held_out), "match": "regex", "pattern": "(.)"}
    return RunConfig.model_validate(config.model_dump() | {"task": task})


@dataclass
class System:
    config: RunConfig
    control: ControlPlaneClient
    environment: Environment
    """Of the workers."""
    addresses: dict[str, str]
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

    def start(self, name: str, service: Any, /, *arguments: Any, **options: Any) -> None:
        lifecycle = self.lifecycles[name] = Lifecycle()
        self.tasks[name] = asyncio.create_task(service(lifecycle, *arguments, **options))

    def start_worker(self, name: str) -> None:
        self.start(name, serve_rollout, self.environment, name=name, http_listen=ANY_PORT)

    async def stop(self, name: str) -> None:
        self.lifecycles[name].stopping.set()
        await asyncio.gather(self.tasks[name], return_exceptions=True)


@asynccontextmanager
async def system(
    config: RunConfig, redis_url: str, *, workers: int = 1, secured: Callable[[str], dict[str, Any]] | None = None
) -> AsyncIterator[System]:
    """secured: what the environments say of tokens and TLS, under which everything is then; it is told whose: control,
    ingest, learner, rollout, or viewer, who asks for the status."""
    addresses = {name: free_address() for name in ("control-plane", "grpc")}
    https = "https://" if secured else ""

    def environment(service: str) -> Environment:
        return Environment(
            control_plane_url=f"{https or 'http://'}{addresses['control-plane']}",
            ingest_address=https + addresses["grpc"],
            redis_url=SecretStr(redis_url),
            patience_seconds=30,
            **(secured(service) if secured else {"token": SecretStr(TOKEN)}),
        )

    threads, viewer = torch.get_num_threads(), environment("viewer")
    async with ControlPlaneClient(
        viewer.control_plane_url, viewer.credential(), tls=viewer.tls, patience=30
    ) as control:
        running = System(config, control, environment("rollout"), addresses)
        running.start(
            "control-plane", serve_control_plane, config, environment("control"), listen=addresses["control-plane"]
        )
        running.start("ingest", serve_ingest, environment("ingest"), listen=addresses["grpc"], http_listen=ANY_PORT)
        running.start("learner", serve_learner, environment("learner"), http_listen=ANY_PORT)
        for index in range(workers):
            running.start_worker(f"rollout-{index}")
        try:
            yield running
        finally:
            for name in (*(each for each in running.tasks if each.startswith("rollout")), "learner", "ingest"):
                await running.stop(name)
            await running.stop("control-plane")
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(False)
