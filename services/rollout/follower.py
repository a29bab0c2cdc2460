"""Follows the run's newest policy: hears of it, fetches it, verifies every digest, has the engine swap to it, confirms.

Hearing is a hint (server-sent events, or a heartbeat's answer); what counts is the manifest fetched then. A snapshot
whose digests differ is never served (I5): the worker goes on under the policy it has and tries again.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from torch import Tensor

from sapo_learner.errors import Mismatch, NotFound, SapoError
from sapo_learner.manifest import Manifest
from sapo_learner.snapshot import read_snapshot
from services.rollout.engines import Engine, PolicyVersion
from services.runtime.client import ControlPlaneClient
from services.runtime.metrics import RolloutMetrics

log = logging.getLogger(__name__)
RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 30.0
MAX_FAILURES = 12  # about four minutes
SWAP_SECONDS = 600.0  # an engine that takes longer for new weights hangs


class PolicyStore:
    """Fetches snapshots into a scratch directory of the worker's."""

    def __init__(self, control: ControlPlaneClient, scratch: Path) -> None:
        self._control, self._blobs, self.model_directory = control, scratch / "blobs", scratch / "model"
        self._blobs.mkdir(parents=True, exist_ok=True)

    async def fetch(self, version: int | None = None) -> Manifest:
        """Download a version (None: the current one) and forget every other one's blobs."""
        manifest = await self._control.manifest(version)
        for blob in manifest.blobs():
            await self._control.download(blob, self._blobs)
        wanted = {blob.sha256 for blob in manifest.blobs()}
        for path in self._blobs.iterdir():
            if path.name.removesuffix(".part") not in wanted:
                path.unlink()
        return manifest

    def write_model_directory(self, manifest: Manifest) -> Path:
        """The small files (configuration, tokenizer) as a model directory without weights."""
        self.model_directory.mkdir(exist_ok=True)
        for name, blob in manifest.files.items():
            shutil.copyfile(self._blobs / blob.sha256, self.model_directory / name)
        return self.model_directory

    def tensors(self, manifest: Manifest) -> dict[str, Tensor]:
        """Verified weights; what does not verify is deleted, so that the next try fetches it anew."""
        try:
            return read_snapshot(manifest, lambda sha256: self._blobs / sha256)
        except Mismatch:
            for part in manifest.parts:
                (self._blobs / part.sha256).unlink(missing_ok=True)
            raise


class Follower:
    def __init__(
        self, engine: Engine, store: PolicyStore, metrics: RolloutMetrics, *, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        self._engine, self._store, self._metrics, self._retry_seconds = engine, store, metrics, retry_seconds
        self._heard, self._hint = -1, asyncio.Event()
        self._swapping = asyncio.Lock()  # no pin is taken while a swap is under way or waits for the pins
        self._pins, self._unpinned = 0, asyncio.Event()
        self._unpinned.set()

    def hint(self, version: int) -> None:
        """A version that exists; older ones than the one served are ignored."""
        self._heard = max(self._heard, version)
        if self._heard > self._engine.policy_version.version:
            self._hint.set()

    @asynccontextmanager
    async def pinned(self) -> AsyncIterator[None]:
        """Keep the served version while the block runs. Not to be nested."""
        async with self._swapping:
            self._pins += 1
            self._unpinned.clear()
        try:
            yield
        finally:
            self._pins -= 1
            if not self._pins:
                self._unpinned.set()

    async def run(self, confirm: Callable[[], Awaitable[None]]) -> None:
        """Follow for ever. confirm: called after each swap, to tell the control plane.

        Raises what keeps this worker from taking a version, after MAX_FAILURES tries in a row.
        """
        failures = 0
        while True:
            await self._hint.wait()
            self._hint.clear()
            try:
                swapped = await self._advance()
            except SapoError as error:
                failures += 1
                if failures == MAX_FAILURES:
                    raise
                await self._bear(error, failures)
                self._hint.set()
                continue
            failures = 0
            if swapped:
                await confirm()

    async def _bear(self, error: SapoError, failures: int) -> None:
        if isinstance(error, NotFound) and failures == 1:
            return  # superseded while being fetched: the newest is another one by now
        self._metrics.sync_failures.inc()
        log.warning("version %d not taken: %s", self._heard, error)
        await asyncio.sleep(min(self._retry_seconds * 2 ** (failures - 1), MAX_RETRY_SECONDS))

    async def _advance(self) -> bool:
        """Serve the newest version; False when it is served already."""
        started = time.monotonic()
        manifest = await self._store.fetch()
        if served(manifest).version <= self._engine.policy_version.version:
            return False
        tensors = await asyncio.to_thread(self._store.tensors, manifest)
        async with self._swapping:
            await self._unpinned.wait()
            async with asyncio.timeout(SWAP_SECONDS):
                await self._engine.update_weights(tensors, served(manifest))
        self._metrics.sync_seconds.observe(time.monotonic() - started)
        self._metrics.version.set(served(manifest).version)
        return True


def served(manifest: Manifest) -> PolicyVersion:
    """What an engine that serves a published manifest calls its policy."""
    assert manifest.version is not None
    return PolicyVersion(manifest.version, manifest.step)


async def listen(control: ControlPlaneClient, hint: Callable[[int], None]) -> None:
    """Hand every version that the control plane announces to `hint`, reconnecting for ever."""
    while True:
        try:
            async for event in control.events():
                if event["data"] and event["data"]["version"] is not None:
                    hint(event["data"]["version"])
        except SapoError as error:
            log.debug("%s", error)  # heartbeats say it when the control plane is gone
        await asyncio.sleep(RETRY_SECONDS)
