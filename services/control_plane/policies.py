"""Published policies: manifests on disk and in Redis, their blobs, and which of them are kept.

The disk goes first: a manifest is durable under its number before Redis makes it current, so a version that any worker
may have seen is on disk, and a Redis that lost it is told (`reconcile`). That is why numbers never repeat with other
content, whichever of the two dies when.
"""

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path

from sapo_learner.disk import naming
from sapo_learner.errors import Fenced, NotFound, Unavailable
from sapo_learner.manifest import Manifest
from sapo_learner.segment import fsync
from services.control_plane.blobs import BlobDirectory
from services.control_plane.fence import our_fence
from services.runstore import Policy, Published, RunState, RunStore
from services.runtime.disk_usage import DiskUsage, disk_usage


class Policies:
    """Blobs and manifests under `directory`; numbers and the current version in the run store.

    token: the control plane's. keep: versions kept, at least. max_policy_age: steps that a version may lie behind the
    current one and still be what groups in training were sampled under. steps_back: how far a restored learner may go
    back and publish again.
    """

    def __init__(
        self, store: RunStore, token: int, directory: Path, *, keep: int, max_policy_age: int, steps_back: int
    ) -> None:
        self._store, self._token, self._keep, self._max_policy_age = store, token, keep, max_policy_age
        self._steps_back = steps_back
        self.blobs = BlobDirectory(directory / "blobs")
        self._directory = directory
        self._manifests, self._facts = directory / "manifests", directory / "facts.json"
        self._manifests.mkdir(parents=True, exist_ok=True)
        self._publishing = asyncio.Lock()

    async def open(self) -> None:
        """Make Redis and the disk agree."""
        await self._restore()
        for version in await self._store.versions():
            if not self._path(version).exists():
                policy = await self._store.manifest(version)
                _write(self._path(version), _numbered(Manifest.from_json(policy.manifest_json), version).to_json())

    async def reconcile(self, state: RunState) -> bool:
        """Tell Redis what it lost, if it did: all of the registry, or its newest versions. Returns whether it had."""
        async with self._publishing:
            if not self._behind(state):
                return False
            await self._restore()
            return True

    async def publish(self, token: int, manifest: Manifest, facts: Mapping[str, str]) -> Published:
        """Register a snapshot whose blobs have been uploaded. token: the learner's. Raises NotFound, Fenced."""
        for blob in manifest.blobs():
            path = self.blobs.path(blob.sha256)
            if path.stat().st_size != blob.size:
                raise NotFound(
                    f"blob {blob.sha256} has {path.stat().st_size} bytes, not {blob.size}", fix="upload it again"
                )
        async with self._publishing:
            state = await self._store.state()
            if token < state.learner_token:
                raise Fenced(f"a newer learner (token {state.learner_token}) has taken over", fix="stop this process")
            if self._behind(state):
                await self._restore()
            if facts:
                await asyncio.to_thread(_write, self._facts, json.dumps({"token": token, "facts": dict(facts)}))
                await self._store.set_facts(token, facts)
            return await self._register(token, manifest)

    async def _register(self, token: int, manifest: Manifest) -> Published:
        expected = self.newest() + 1
        try:
            await asyncio.to_thread(_write, self._path(expected), _numbered(manifest, expected).to_json())
        except OSError:  # what may not be durable must not be restored from
            self._path(expected).unlink(missing_ok=True)
            raise
        try:
            published = await self._store.publish(
                token, manifest.step, manifest.digest, _numbered(manifest, None).to_json()
            )
        except Fenced:
            self._path(expected).unlink()
            raise
        if published.version != expected:  # it had a number already
            self._path(expected).unlink()
        return published

    async def manifest(self, version: int) -> Manifest:
        """Raises NotFound."""
        policy = await self._store.manifest(version)
        return _numbered(Manifest.from_json(policy.manifest_json), version)

    async def versions(self) -> dict[int, int]:
        """Kept version -> optimizer step."""
        return await self._store.versions()

    async def current(self) -> Manifest:
        """Raises NotFound while nothing is published."""
        policy = await self._store.current()
        if policy is not None:
            return _numbered(Manifest.from_json(policy.manifest_json), policy.version)
        if self.newest() >= 0:
            raise Unavailable("the policy registry is being restored", where="Redis", fix="try again")
        raise NotFound("no policy is published yet", fix="the learner publishes version 0 when it has started")

    async def prune(self, pinned: set[int]) -> None:
        """Forget every version that no group in training can name, and the blobs that only they used.

        Kept by step, not by number alone: a learner that was restored may publish several versions of one step.
        """
        async with self._publishing:
            steps = await self._store.versions()
            if not steps:
                return
            versions = sorted(steps)
            newest = steps[versions[-1]]
            oldest, oldest_again = newest - self._max_policy_age, newest - self._steps_back
            forgotten: dict[str, float] = {}  # blob -> when a manifest that named it was registered
            for version in versions[: -self._keep]:
                if steps[version] >= oldest or version in pinned:
                    continue
                if await self._store.forget(version, oldest_again):
                    forgotten |= self._forget(self._path(version))
            wanted = {blob.sha256 for manifest in self._on_disk() for blob in manifest.blobs()}
            await asyncio.to_thread(self.blobs.keep_only, wanted, forgotten)

    @staticmethod
    def _forget(path: Path) -> dict[str, float]:
        """Delete a manifest; returns its blobs with the time it was registered."""
        if not path.exists():
            return {}
        named, registered = Manifest.from_json(path.read_bytes()).blobs(), path.stat().st_mtime
        path.unlink()
        return {blob.sha256: registered for blob in named}

    async def disk_usage(self) -> DiskUsage:
        return await asyncio.to_thread(disk_usage, self._directory)

    def newest(self) -> int:
        """The highest version on disk; -1 when there is none."""
        return max((int(path.stem) for path in self._manifests.glob("*.json")), default=-1)

    def _behind(self, state: RunState) -> bool:
        published = -1 if state.published_version is None else state.published_version
        return not state.registry_restored or published < self.newest()

    async def _restore(self) -> None:
        policies = [
            Policy(each.version, each.step, each.digest, _numbered(each, None).to_json())
            for each in self._on_disk()
            if each.version is not None
        ]
        with our_fence():
            await self._store.restore_registry(self._token, policies)
        if self._facts.exists() and not await self._store.facts():
            saved = json.loads(self._facts.read_text())
            try:
                await self._store.set_facts(saved["token"], saved["facts"])
            except Fenced:
                return  # the newer learner tells its own before it publishes

    def _on_disk(self) -> list[Manifest]:
        return [Manifest.from_json(path.read_bytes(), where=str(path)) for path in self._manifests.glob("*.json")]

    def _path(self, version: int) -> Path:
        return self._manifests / f"{version:08d}.json"


def _numbered(manifest: Manifest, version: int | None) -> Manifest:
    return manifest.model_copy(update={"version": version})


def _write(path: Path, text: str) -> None:
    """Durably, and whole or not at all."""
    temporary = path.with_suffix(".tmp")
    try:
        with naming(path):
            temporary.write_text(text)
            fsync(temporary)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)
