"""`sapo serve rollout`: one inference engine and the loops around it."""

import asyncio
import logging
import tempfile
from pathlib import Path

import torch

from protos.sapo.v1 import ingest_pb2 as pb
from sapo_learner.errors import NotFound
from sapo_learner.manifest import Manifest
from sapo_learner.policy import Policy, load_policy, load_weights
from sapo_learner.trajectory import SCHEMA_VERSION
from services.rollout.engines import PolicyVersion
from services.rollout.engines.torch_engine import TorchEngine
from services.rollout.follower import Follower, PolicyStore, listen
from services.rollout.sender import GroupSender
from services.rollout.worker import Worker
from services.runtime.client import ControlPlaneClient
from services.runtime.http import probe_app, serving
from services.runtime.lifecycle import Lifecycle
from services.runtime.metrics import RolloutMetrics
from services.runtime.settings import Environment, RunConfig
from services.tasks import build

log = logging.getLogger(__name__)


async def serve(lifecycle: Lifecycle, environment: Environment, *, name: str, http_listen: str) -> None:
    token = environment.require("token")
    metrics = RolloutMetrics()
    with tempfile.TemporaryDirectory(prefix=f"sapo-{name}-") as scratch:
        async with (
            serving(probe_app(lifecycle, metrics.registry), http_listen),
            ControlPlaneClient(environment.require("control_plane_url"), token) as control,
        ):
            lifecycle.wait_for("start", "the control plane's configuration")
            config = await control.config()
            torch.set_num_threads(config.engine.threads)
            store = PolicyStore(control, Path(scratch))
            manifest = await _first_policy(lifecycle, store)
            if manifest is not None:
                await _work(lifecycle, environment, config, name, control, store, manifest, metrics)


async def _first_policy(lifecycle: Lifecycle, store: PolicyStore) -> Manifest | None:
    while not lifecycle.stopping.is_set():
        try:
            return await store.fetch()
        except NotFound:
            lifecycle.wait_for("start", "the learner's first policy")
            await lifecycle.sleep(0.25)
    return None


async def _work(
    lifecycle: Lifecycle,
    environment: Environment,
    config: RunConfig,
    name: str,
    control: ControlPlaneClient,
    store: PolicyStore,
    manifest: Manifest,
    metrics: RolloutMetrics,
) -> None:
    policy = _load(store, manifest)
    assert manifest.version is not None
    engine = TorchEngine(policy, PolicyVersion(manifest.version, manifest.step), slots=config.engine.slots)
    metrics.version.set(manifest.version)
    hello = pb.Hello(
        worker=name,
        tokenizer_digest=manifest.tokenizer_digest,
        model_digest=manifest.model_digest,
        schema_version=SCHEMA_VERSION,
    )
    sender = GroupSender(environment.require("ingest_address"), environment.require("token"), hello)
    worker = Worker(name, config, engine, policy.tokenizer, build(config.task), control, sender, metrics)
    worker.follower = Follower(engine, store, metrics, worker.beat)
    log.info("worker %s serves version %d with %s", name, manifest.version, engine.name)
    lifecycle.ready()
    try:
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(work)
                for work in (
                    sender.run(), worker.follower.run(), listen(control, worker.follower.hint),
                    worker.heartbeat_forever(), worker.lease_forever(tasks),
                )
            ]  # fmt: skip
            await lifecycle.stopping.wait()
            background[-1].cancel()
            await worker.drain()
            for task in background:
                task.cancel()
    finally:
        await engine.close()


def _load(store: PolicyStore, manifest: Manifest) -> Policy:
    policy = load_policy(store.write_model_directory(manifest), weights=False)
    load_weights(policy, store.tensors(manifest))  # type: ignore[arg-type]
    return policy
