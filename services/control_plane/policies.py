"""Published policies: manifests in Redis and on disk, their blobs, and which of them are kept."""

import asyncio
import os
import time
from pathlib import Path

from sapo_learner.errors import NotFound
from sapo_learner.manifest import Manifest
from services.control_plane.blobs import BlobDirectory
from services.runstore import Policy, Published, RunStore

UPLOAD_GRACE_SECONDS = 600  # an uploaded blob may wait this long for the manifest that names it


class Policies:
    """Blobs and manifests under `directory`; numbers and the current version in the run store."""

    def __init__(self, store: RunStore, directory: Path, *, keep: int) -> None:
        self._store, self._keep = store, keep
        self.blobs = BlobDirectory(directory / "blobs")
        self._manifests = directory / "manifests"
        self._manifests.mkdir(parents=True, exist_ok=True)

    async def open(self, token: int) -> None:
        """Make Redis and the disk agree: a lost Redis is told what the disk knows, a torn publish is completed."""
        on_disk = [Manifest.from_json(path.read_bytes(), where=str(path)) for path in self._manifests.glob("*.json")]
        await self._store.restore_registry(
            token,
            [
                Policy(each.version, each.step, each.digest, each.model_copy(update={"version": None}).to_json())
                for each in on_disk
                if each.version is not None
            ],
        )
        for version in await self._store.versions():
            if not self._path(version).exists():
                self._write(await self.manifest(version))

    async def publish(self, token: int, manifest: Manifest) -> Published:
        """Register a snapshot whose blobs have been uploaded. token: the learner's. Raises NotFound, Fenced."""
        for blob in manifest.blobs():
            path = self.blobs.path(blob.sha256)
            if path.stat().st_size != blob.size:
                raise NotFound(
                    f"blob {blob.sha256} has {path.stat().st_size} bytes, not {blob.size}", fix="upload it again"
                )
        published = await self._store.publish(token, manifest.step, manifest.digest, manifest.to_json())
        self._write(manifest.model_copy(update={"version": published.version}))
        return published

    async def manifest(self, version: int) -> Manifest:
        """Raises NotFound."""
        policy = await self._store.manifest(version)
        return Manifest.from_json(policy.manifest_json).model_copy(update={"version": version})

    async def current(self) -> Manifest:
        """Raises NotFound while nothing is published."""
        policy = await self._store.current()
        if policy is None:
            raise NotFound("no policy is published yet", fix="the learner publishes version 0 when it has started")
        return Manifest.from_json(policy.manifest_json).model_copy(update={"version": policy.version})

    async def prune(self, pinned: set[int]) -> None:
        """Forget all but the newest versions and the pinned ones, and the blobs that only they used."""
        versions = sorted(await self._store.versions())
        for version in versions[: -self._keep]:
            if version not in pinned and await self._store.forget(version):
                self._path(version).unlink(missing_ok=True)
        manifests = [Manifest.from_json(path.read_bytes()) for path in self._manifests.glob("*.json")]
        wanted = {blob.sha256 for manifest in manifests for blob in manifest.blobs()}
        await asyncio.to_thread(self.blobs.keep_only, wanted, younger_than=time.time() - UPLOAD_GRACE_SECONDS)

    def _path(self, version: int) -> Path:
        return self._manifests / f"{version:08d}.json"

    def _write(self, manifest: Manifest) -> None:
        assert manifest.version is not None
        path = self._path(manifest.version)
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
