"""`sapo serve rollout`: one inference engine and the loops around it."""

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from protos.sapo.v1 import ingest_pb2 as pb
from sapo_learner.errors import ConfigError, Mismatch, NotFound
from sapo_learner.manifest import Manifest
from sapo_learner.trajectory import SCHEMA_VERSION
from services.rollout.engines.starting import Started, start_engine
from services.rollout.follower import Follower, PolicyStore, listen, served
from services.rollout.responder import Responder
from services.rollout.scoring import Scorer
from services.rollout.sender import GroupSender
from services.rollout.worker import Worker
from services.runtime import api
from services.runtime.client import ControlPlaneClient
from services.runtime.http import probe_app, serving
from services.runtime.lifecycle import Lifecycle
from services.runtime.logging import adopt_libraries, of_run
from services.runtime.metrics import RolloutMetrics
from services.runtime.settings import Environment, RunConfig

log = logging.getLogger(__name__)
FIRST_POLICY_TRIES = 5


@dataclass(frozen=True)
class _Parts:
    """What outlives the engine."""

    name: str
    control: ControlPlaneClient
    store: PolicyStore
    scorer: Scorer
    metrics: RolloutMetrics


async def serve(lifecycle: Lifecycle, environment: Environment, *, name: str, http_listen: str) -> None:
    url, _ = (environment.require(name) for name in ("control_plane_url", "ingest_address"))
    token, tls = environment.credential(), environment.tls
    metrics, patience = RolloutMetrics(), environment.patience_seconds
    with _scratch(f"{url} {name}") as scratch:
        async with (
            serving(probe_app(lifecycle, metrics.registry), http_listen),
            ControlPlaneClient(
                url, token, tls=tls, patience=patience, waiting=lifecycle.peer("control plane")
            ) as control,
        ):
            config = await control.config()
            of_run(control.run)
            # What a process of this name held that was killed is offered again now, not when its leases run out.
            await control.release(api.ReleaseRequest(worker=name, leases=[], leaving=True))
            if config.engine.name == "vllm":
                metrics.include("vllm:")
            torch.set_num_threads(config.engine.threads)
            with Scorer(config.scored, config.scoring, metrics) as scorer:
                parts = _Parts(name, control, PolicyStore(control, scratch, metrics.sync_bytes.inc), scorer, metrics)
                first = await _first_policy(lifecycle, config, parts.store)
                adopt_libraries()  # an engine's are imported when it starts
                if first is not None:
                    await _work(lifecycle, environment, config, parts, *first)


@contextlib.contextmanager
def _scratch(worker: str) -> Iterator[Path]:
    """A directory for blobs: the same one for a worker that was killed and comes back, so that none is left behind."""
    path = Path(tempfile.gettempdir()) / f"sapo-{hashlib.sha256(worker.encode()).hexdigest()[:16]}"
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("a worker of this name runs here", where="--name", fix="choose another name") from None
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


async def _first_policy(lifecycle: Lifecycle, config: RunConfig, store: PolicyStore) -> tuple[Manifest, Started] | None:
    """The current policy and an engine that serves it; None when asked to stop before there is one."""
    failures = 0
    while not lifecycle.stopping.is_set():
        try:
            manifest = await store.fetch()
            return manifest, await start_engine(config, store, manifest, served(manifest))
        except NotFound:  # nothing published yet, or superseded while being fetched
            lifecycle.wait_for("start", "the learner's first policy")
            await lifecycle.sleep(0.25)
        except Mismatch as error:  # damaged on its way: what differs has been deleted
            failures += 1
            if failures == FIRST_POLICY_TRIES:
                raise
            log.warning("version not taken: %s", error)
            await lifecycle.sleep(failures)
    return None


async def _work(
    lifecycle: Lifecycle,
    environment: Environment,
    config: RunConfig,
    parts: _Parts,
    manifest: Manifest,
    started: Started,
) -> None:
    engine = started.engine
    try:
        hello = pb.Hello(
            worker=parts.name, tokenizer_digest=manifest.tokenizer_digest, model_digest=manifest.model_digest,
            schema_version=SCHEMA_VERSION,
        )  # fmt: skip
        sender = GroupSender(
            environment.require("ingest_address"), environment.credential(), hello,
            tls=environment.tls, patience=environment.patience_seconds,
        )  # fmt: skip
        parts.metrics.credits.set_function(lambda: sender.credits)
        parts.metrics.unacknowledged.set_function(lambda: sender.unacknowledged)
        responder = Responder(engine, started.tokenizer, parts.scorer, config, parts.metrics)
        follower = Follower(
            engine, parts.store, parts.metrics, dtype=_computes_in(config, manifest), on_miss=config.probe.on_miss
        )
        worker = Worker(parts.name, config, engine, responder, follower, parts.control, sender, parts.metrics)
        async with worker.last_words():
            lifecycle.wait_for("start", "the engine's answer to the probe")
            await follower.prove(manifest)
            log.info("worker %s serves version %d with %s", parts.name, engine.policy_version.version, engine.name)
            lifecycle.ready()
            await _run(lifecycle, worker, follower, sender, parts.control)
    finally:
        await engine.close()


def _computes_in(config: RunConfig, manifest: Manifest) -> str:
    """The dtype of the engine's arithmetic: the small engine's is float32, whatever the weights were rounded to."""
    return config.engine.vllm.dtype or manifest.dtype if config.engine.name == "vllm" else "float32"


async def _run(
    lifecycle: Lifecycle, worker: Worker, follower: Follower, sender: GroupSender, control: ControlPlaneClient
) -> None:
    """Everything at once, until the process shall stop or one of them fails."""
    async with asyncio.TaskGroup() as tasks:
        leasing = tasks.create_task(worker.lease_forever(tasks))
        background = [
            tasks.create_task(work)
            for work in (
                sender.run(), follower.run(worker.beat), listen(control, follower.hint), worker.heartbeat_forever()
            )
        ]  # fmt: skip
        await lifecycle.stopping.wait()
        leasing.cancel()
        await worker.drain()
        for task in background:
            task.cancel()
