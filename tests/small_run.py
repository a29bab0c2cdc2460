"""A run small enough for tests of the services: its configuration, groups, and a learner that only publishes. No torch.

config = run_config(tmp_path)
async with control_plane(config, redis_url) as running:
    learner = await Learner(running).start()      the log exists, version 0 is published
    answer = await running.client.lease(lease_request())
"""

import hashlib
import socket
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray

from sapo_learner.archive import Head
from sapo_learner.config import parse
from sapo_learner.ledger import Ledger
from sapo_learner.manifest import Blob, Manifest, TensorEntry
from sapo_learner.trajectory import SamplingParameters, Trajectory, TrajectoryGroup, VersionSpan
from services.control_plane.plane import ControlPlane
from services.control_plane.routes import add_routes
from services.runstore import RunStore
from services.runtime import api
from services.runtime.auth import Tokens
from services.runtime.client import ControlPlaneClient
from services.runtime.http import probe_app, serving
from services.runtime.lifecycle import Lifecycle
from services.runtime.metrics import ControlPlaneMetrics
from services.runtime.settings import RunConfig

TOKEN = "the-run's-token"
VOCABULARY = 20


def free_address() -> str:
    """HOST:PORT that nobody listens on now."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{holder.getsockname()[1]}"


def run_config(directory: Path, **settings: dict[str, Any]) -> RunConfig:
    """Two groups of two responses per step, five steps, nothing to evaluate; `settings` change sections of run.yaml."""
    defaults: dict[str, dict[str, Any]] = {
        "run": {"name": f"run-{uuid.uuid4().hex[:8]}", "dir": str(directory), "seed": 3},
        "task": {"name": "arithmetic", "held_out_every": 1 << 31},
        "sampling": {"group_size": 2, "max_tokens": 8},
        "training": {"steps": 5, "groups_per_step": 2, "max_policy_age": 2},
        "evaluation": {"every": 2, "samples": 1, "boundary_samples": 1},
    }
    for section, changes in settings.items():
        defaults[section] = defaults.get(section, {}) | changes
    return parse(RunConfig, defaults, where="test")


@dataclass
class Running:
    """A control plane that serves HTTP, and the run store beside it."""

    config: RunConfig
    plane: ControlPlane
    store: RunStore
    url: str
    client: ControlPlaneClient
    lifecycle: Lifecycle
    app: FastAPI


@asynccontextmanager
async def control_plane(
    config: RunConfig, redis_url: str, *, tokens: Tokens | None = None, token: str = TOKEN
) -> AsyncIterator[Running]:
    """As `sapo serve control-plane` starts it, on a free port and without its watch. token: the client's."""
    lifecycle, metrics = Lifecycle(), ControlPlaneMetrics()
    app = probe_app(lifecycle, metrics.registry)
    async with await RunStore.connect(redis_url, config.run.name) as store:
        plane = ControlPlane(config, store, await store.acquire_token("control-plane"), metrics)
        await plane.open()
        add_routes(app, plane, tokens or Tokens.one(TOKEN))
        try:
            async with (
                serving(app, "127.0.0.1:0") as url,
                ControlPlaneClient(url, token, patience=5.0) as client,
            ):
                lifecycle.ready()
                try:
                    yield Running(config, plane, store, url, client, lifecycle, app)
                finally:
                    await plane.close()
        finally:
            plane.record.close()


class Learner:
    """Publishes and reports as the learner does; trains nothing."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self.token = 0

    async def start(self, *, publish: bool = True) -> "Learner":
        self.token = await self._running.store.acquire_token("learner")
        if await self._running.store.needs_rebuild(Head()) is not None:
            await self._running.store.rebuild(self.token, Head(), [])
        if publish:
            await self.publish(0)
        return self

    async def publish(self, step: int, weights: str = "") -> api.PublishResponse:
        """Upload and register a policy whose bytes are `weights`, by default others at every step."""
        manifest = await self.upload(step, weights)
        return await self._running.client.publish(self.request(manifest))

    async def upload(self, step: int, weights: str = "") -> Manifest:
        contents = snapshot_files(weights or f"weights of step {step}")
        for name, content in contents.items():
            path = self._running.config.run.directory / f"staged-{name}"
            path.write_bytes(content)
            await self._running.client.upload(path, Blob.of(path))
        return snapshot_manifest(step, contents)

    def request(self, manifest: Manifest) -> api.PublishRequest:
        return api.PublishRequest(token=self.token, manifest=manifest.model_dump(mode="json"), facts=facts(manifest))

    async def report(self, state: str, step: int = 0, **fields: Any) -> None:
        ledger = Ledger(trained=fields.get("cursor", 0)).to_dict()
        report = {"state": state, "step": step, "cursor": 0, "ledger": ledger} | fields
        await self._running.client.learner_report(api.LearnerReport.model_validate(report))


def snapshot_files(weights: str) -> dict[str, bytes]:
    return {"part": weights.encode(), "config.json": b"{}", "tokenizer.json": b"{}"}


def snapshot_manifest(step: int, contents: dict[str, bytes]) -> Manifest:
    blobs = {name: Blob(sha256=sha256(content), size=len(content)) for name, content in contents.items()}
    part = blobs.pop("part")
    tensor = TensorEntry(dtype="float32", shape=(1,), sha256=part.sha256, part=0)
    return Manifest(
        step=step, digest=part.sha256, dtype="float32", tensors={"weight": tensor}, parts=[part], files=blobs
    )


def facts(manifest: Manifest) -> dict[str, str]:
    return {
        "vocabulary": str(VOCABULARY),
        "context": "64",
        "model_digest": manifest.model_digest,
        "tokenizer_digest": manifest.tokenizer_digest,
    }


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def lease_request(worker: str = "w", count: int = 1, policy: int = 0, **fields: Any) -> api.LeaseRequest:
    """policy: version and step at once."""
    defaults = {"worker": worker, "count": count, "version": policy, "step": policy, "evaluate": False}
    return api.LeaseRequest.model_validate(defaults | {"wait_seconds": 0} | fields)


def heartbeat(worker: str = "w", policy: int = 0, **fields: Any) -> api.Heartbeat:
    defaults = {"worker": worker, "version": policy, "step": policy, "rows": 0, "tokens": 0, "tokens_per_second": 0}
    return api.Heartbeat.model_validate(defaults | fields)


def answer(chunk: api.EvaluationChunk, worker: str = "w", correct: int = 1) -> api.ChunkResult:
    """`correct` right responses to every problem of the chunk."""
    return api.ChunkResult(
        worker=worker, evaluation=chunk.evaluation, chunk=chunk.chunk, version=chunk.version,
        correct=[correct] * len(chunk.prompts), samples=chunk.samples * len(chunk.prompts), tokens=10,
        examples=[f"answer to {prompt.id}" for prompt in chunk.prompts],
    )  # fmt: skip


async def evaluate_all(running: Running, worker: str = "w", policy: int = 0) -> int:
    """Answer chunks as a pinned worker does until there is none left; returns how many there were."""
    for count in range(100):
        chunk = (await running.client.lease(lease_request(worker, 0, policy, evaluate=True))).evaluation
        if chunk is None:
            return count
        await running.client.evaluated(answer(chunk, worker))
    raise AssertionError("there is no end to it")


def trajectory(token_ids: Sequence[int] | NDArray[np.int32] = (5, 6), *, version: int = 0, **fields: Any) -> Trajectory:
    count = len(token_ids)
    defaults: dict[str, Any] = {
        "token_ids": np.array(token_ids, np.int32),
        "behaviour_logprobs": np.full(count, -1.5, np.float32),
        "loss_mask": np.ones(count, np.bool_),
        "spans": (VersionSpan(count, version, version),),
        "rewards": {"correct": 1.0},
        "finish_reason": "stop",
    }
    return Trajectory(**(defaults | fields))


def group(draw: int = 0, attempt: int = 1, *, version: int = 0, **fields: Any) -> TrajectoryGroup:
    """A group that the run of `run_config` accepts when the draw is leased."""
    defaults: dict[str, Any] = {
        "draw": draw,
        "attempt": attempt,
        "task": "arithmetic",
        "prompt_id": "1+2+3=",
        "epoch": 0,
        "seed": 7,
        "prompt_ids": np.array([4, 5], np.int32),
        "trajectories": (trajectory(version=version), trajectory((7,), version=version)),
        "sampling": SamplingParameters(temperature=1.0, max_tokens=8),
        "engine": "test 1",
        "worker": "w",
    }
    return TrajectoryGroup(**(defaults | fields))
