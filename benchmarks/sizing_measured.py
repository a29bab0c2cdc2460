"""What benchmarks.sizing multiplies with: bytes of groups, snapshots and checkpoints, speed of the control plane."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import psutil
import torch

from sapo_learner.archive import Archive
from sapo_learner.checkpoint import save
from sapo_learner.config import LearnerSettings, parse
from sapo_learner.entry import GENESIS, Entry, Head, link
from sapo_learner.learner import Learner
from sapo_learner.manifest import Blob
from sapo_learner.policy import Policy
from sapo_learner.resume import capture
from sapo_learner.snapshot import write_snapshot
from sapo_learner.train import Position
from sapo_learner.trajectory import SamplingParameters, Trajectory, TrajectoryGroup, VersionSpan
from services.runstore import RunStore
from services.runstore.embedded import EmbeddedRedis
from services.runtime.client import ControlPlaneClient
from services.wire import encode
from tests.small_run import TOKEN, free_address

GROUPS = 24
BLOB_BYTES = 256 << 20
READERS = 4


@dataclass(frozen=True)
class LogBytes:
    """Bytes per sampled token of a group: as it travels and lies in Redis, in Redis' memory, in the archive."""

    wire: float
    redis: float
    archive: float


@dataclass(frozen=True)
class PolicyBytes:
    """Per parameter: of a published snapshot in bfloat16, of a checkpoint. manifest: per tensor."""

    snapshot: float
    checkpoint: float
    manifest: float


@dataclass(frozen=True)
class Speed:
    """Bytes per CPU second of the control plane."""

    upload: float
    download: float


def groups(tokens: int, vocabulary: int, group_size: int) -> list[TrajectoryGroup]:
    """Responses of `tokens` tokens on average, log-normal; ids by Zipf's law, log-probs with all their digits."""
    return [_group(draw, tokens, vocabulary, group_size) for draw in range(GROUPS)]


def _group(draw: int, tokens: int, vocabulary: int, group_size: int) -> TrajectoryGroup:
    random = np.random.default_rng(draw)
    weights = 1 / np.arange(1, vocabulary + 1)
    weights /= weights.sum()

    def response(index: int) -> Trajectory:
        length = max(1, int(random.lognormal(np.log(tokens) - 0.5**2 / 2, 0.5)))
        return Trajectory(
            token_ids=random.choice(vocabulary, length, p=weights).astype(np.int32),
            behaviour_logprobs=-random.exponential(0.7, length).astype(np.float32),
            loss_mask=np.ones(length, np.bool_), spans=(VersionSpan(length, 7, 7),),
            rewards={"correct": float(index % 2)}, finish_reason="stop",
        )  # fmt: skip

    prompt = random.choice(vocabulary, max(4, tokens // 8), p=weights).astype(np.int32)
    return TrajectoryGroup(
        draw=draw, attempt=1, task="synthetic", prompt_id=str(draw), epoch=0, seed=draw, prompt_ids=prompt,
        trajectories=tuple(map(response, range(group_size))), sampling=SamplingParameters(1.0, 8 * tokens),
        engine="vllm 0.32.0", worker="rollout-7d9c8b5f6-x2x4z",
    )  # fmt: skip


def log_bytes(written: list[TrajectoryGroup]) -> LogBytes:
    tokens = sum(len(each.token_ids) for group in written for each in group.trajectories)
    payloads = [encode(each) for each in written]
    sizes = sum(map(len, payloads)), asyncio.run(_redis_bytes(payloads)), _archive_bytes(payloads)
    return LogBytes(*(size / tokens for size in sizes))


async def _redis_bytes(payloads: list[bytes]) -> int:
    """What Redis' memory grows by, with all its bookkeeping."""
    with tempfile.TemporaryDirectory() as directory:
        async with EmbeddedRedis(Path(directory)) as url, await RunStore.connect(url, "sizing") as store:
            token = await store.acquire_token("learner")
            await store.rebuild(token, Head(), [])
            before = int((await store._info())["used_memory"])
            for payload in payloads:
                await store.append_control(token, "group", payload)
            return int((await store._info())["used_memory"]) - before


def _archive_bytes(payloads: list[bytes]) -> int:
    """On disk, appended as the learner does: what has come in together is one frame; here each group is one."""
    with tempfile.TemporaryDirectory() as directory, Archive(Path(directory), 1) as archive:
        for entry in _entries(payloads):
            archive.append([entry])
        return sum(path.stat().st_size for path in Path(directory).glob("segment-*"))


def _entries(payloads: list[bytes]) -> Iterator[Entry]:
    chain = GENESIS
    for number, payload in enumerate(payloads):
        chain = link(chain, f"1-{number + 1}", "group", sha256(payload).hexdigest())
        yield Entry(1, number + 1, "group", number, chain, payload)


def policy_bytes(policy: Policy) -> PolicyBytes:
    """policy: large enough for headers not to count. It is trained for one step, so that there are moments."""
    learner = Learner(policy, parse(LearnerSettings, {}, where="sizing"), temperature=1.0)
    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    count = sum(each.numel() for each in policy.model.parameters())
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        manifest = write_snapshot(
            policy.copied("bfloat16"), step=0, dtype="bfloat16", files={}, directory=directory / "snapshot"
        )
        saved = save(directory / "checkpoints", capture(learner, Position()), token=1)
        checkpoint = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    described = len(json.dumps(manifest.model_dump(mode="json"))) / len(manifest.tensors)
    return PolicyBytes(sum(each.size for each in manifest.parts) / count, checkpoint / count, described)


async def control_plane_speed() -> Speed:
    """One upload, then several downloads at once, of a control plane that is a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        path = directory / "blob"
        path.write_bytes(np.random.default_rng(0).bytes(BLOB_BYTES))
        blob = Blob.of(path)
        async with EmbeddedRedis(directory / "redis") as redis_url, _control_plane(directory, redis_url) as serving:
            process, url = serving
            async with ControlPlaneClient(url, TOKEN, patience=60.0) as client:
                await client.config()
                started = _cpu_seconds(process)
                await client.upload(path, blob)
                uploaded = _cpu_seconds(process)
                async with asyncio.TaskGroup() as tasks:
                    for number in range(READERS):
                        (reader := directory / f"reader-{number}").mkdir()
                        tasks.create_task(client.download(blob, reader))
                ended = _cpu_seconds(process)
    return Speed(BLOB_BYTES / (uploaded - started), READERS * BLOB_BYTES / (ended - uploaded))


@asynccontextmanager
async def _control_plane(directory: Path, redis_url: str) -> AsyncIterator[tuple[psutil.Process, str]]:
    (directory / "run.yaml").write_text("run: {name: sizing}\n")
    address = free_address()
    environment = os.environ | {"SAPO_REDIS_URL": redis_url, "SAPO_TOKEN": TOKEN}
    command = [sys.executable, "-m", "services.cli", "serve", "control-plane", "run.yaml", "--listen", address]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=log)
    try:
        yield psutil.Process(process.pid), f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
