"""Publishes snapshots beside training: one in flight, and the newest waits; those between are skipped."""

import asyncio
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sapo_learner.errors import Fenced
from sapo_learner.manifest import Manifest, Probe
from sapo_learner.policy import Policy
from sapo_learner.snapshot import write_snapshot
from services.runtime import api
from services.runtime.client import ControlPlaneClient
from services.runtime.metrics import LearnerMetrics

log = logging.getLogger(__name__)
RETRY_SECONDS = 2.0  # between two tries to write to a disk that is full


@dataclass(frozen=True)
class Snapshot:
    """Weights as they were after a step, whatever training does next. probe: what the learner makes of them."""

    step: int
    tensors: Mapping[str, Tensor]
    probe: Probe | None = None


def copy_weights(policy: Policy, step: int, dtype: str = "float32") -> Snapshot:
    """dtype: what they will be published in, torch's name; the copies are rounded to it, but keep the policy's own."""
    return Snapshot(step, policy.copied(dtype))


class Publisher:
    def __init__(
        self,
        control: ControlPlaneClient,
        policy: Policy,
        *,
        dtype: str,
        staging: Path,
        token: int,
        metrics: LearnerMetrics,
    ) -> None:
        """staging: a directory of the run's learners; each has one of its own in there, emptied around each upload."""
        self._control, self._files, self._dtype = control, dict(policy.files), dtype
        self._staging, self._token, self._metrics = staging / f"{token:08d}", token, metrics
        self._limits = {"vocabulary": str(policy.vocabulary)}
        if policy.context is not None:
            self._limits["context"] = str(policy.context)
        self._waiting: Snapshot | None = None
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._full = False  # staging's disk, and that it has been said
        self.published_step = -1
        self.publish_seconds = 0.0
        """That the last publication took, from the snapshot to its version."""

    def write_model_directory(self, directory: Path) -> Path:
        """Configuration and tokenizer as a model directory without weights."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (directory / name).write_bytes(content)
        return directory

    def submit(self, snapshot: Snapshot) -> None:
        """Publish when the one in flight is done; replaces whatever waits."""
        if self._waiting is not None:
            log.debug("step %d is not published: step %d overtook it", self._waiting.step, snapshot.step)
        self._waiting = snapshot
        self._idle.clear()
        self._changed.set()

    async def run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._waiting is not None:
                snapshot, self._waiting = self._waiting, None
                await self.publish(snapshot)
            self._idle.set()

    async def drain(self) -> None:
        """Wait until nothing is in flight or waiting."""
        await self._idle.wait()

    async def publish(self, snapshot: Snapshot) -> Manifest:
        """Write, upload what is not there yet, register. Raises Corrupt for weights that are not finite.

        While the disk takes nothing, training goes on, and the newest snapshot takes this one's place.
        """
        started = time.monotonic()
        while (manifest := await self._write(snapshot)) is None:
            await asyncio.sleep(RETRY_SECONDS)
            if self._waiting is not None:
                log.debug("step %d is not published: step %d overtook it", snapshot.step, self._waiting.step)
                snapshot, self._waiting = self._waiting, None
        await self._upload(manifest)
        facts = {
            **self._limits,
            "model_digest": manifest.model_digest,
            "tokenizer_digest": manifest.tokenizer_digest,
        }
        request = api.PublishRequest(token=self._token, manifest=manifest.model_dump(mode="json"), facts=facts)
        if (response := await self._control.publish(request)).version is None:
            log.info("the policy of step %d is held back for %s", snapshot.step, response.held_for)
        while response.version is None:
            response = await self._control.publish(request)
        self._empty_staging()
        self.published_step = snapshot.step
        self.publish_seconds = time.monotonic() - started
        self._metrics.publish_seconds.observe(self.publish_seconds)
        return manifest.model_copy(update={"version": response.version})

    async def _write(self, snapshot: Snapshot) -> Manifest | None:
        """Into staging; None when the disk takes nothing, which is said once."""
        self._empty_staging()
        try:
            manifest = await asyncio.to_thread(
                write_snapshot, snapshot.tensors, step=snapshot.step, dtype=self._dtype, files=self._files,
                directory=self._staging,
            )  # fmt: skip
        except OSError as error:
            if not self._full:
                what = "snapshot of step %d: %s; nothing is published until there is room in %s, training goes on"
                log.error(what, snapshot.step, error, self._staging)
            self._full = True
            self._empty_staging()
            return None
        self._full = False
        return manifest.model_copy(update={"probe": snapshot.probe})

    async def _upload(self, manifest: Manifest) -> None:
        try:
            for blob in manifest.blobs():
                await self._control.upload(self._staging / blob.sha256, blob)
                self._metrics.publish_bytes.inc(blob.size)
        except FileNotFoundError:  # while this process was stopped
            raise Fenced(
                "a newer learner has cleared this one's files away", where=str(self._staging), fix="stop this process"
            ) from None

    def _empty_staging(self) -> None:
        """Of older learners, too, which may have been killed; a newer one's files are not ours to touch."""
        for path in self._staging.parent.glob("*"):
            if path.name <= self._staging.name:
                shutil.rmtree(path, ignore_errors=True)
