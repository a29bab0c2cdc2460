"""The registry of published policies, the run's facts and documents, and the workers' last reports."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sapo_learner.errors import NotFound
from services.runstore.connection import Connection


@dataclass(frozen=True, slots=True)
class Published:
    """The version that (step, digest) has; changed: it became the current one just now."""

    version: int
    changed: bool


@dataclass(frozen=True, slots=True)
class Policy:
    """A published version. step: optimizer step it comes from."""

    version: int
    step: int
    digest: str
    manifest_json: str


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker's last report and its age by the server's clock."""

    name: str
    report_json: str
    age_seconds: float


class Registry(Connection):
    """Versions count from 0 and never repeat with other content; the highest is the current one."""

    async def restore_registry(self, token: int, policies: Iterable[Policy]) -> None:
        """Open the registry with the manifests that the control plane (its token) finds on disk: none in a new run.

        Needed before the first `publish`, and again after Redis was lost (state().registry_restored); repeating it
        changes nothing.
        """
        arguments = [value for p in policies for value in (p.version, p.step, p.digest, p.manifest_json)]
        keys = ["tokens", "registry", "versions", "manifests", "published"]
        await self._script("restore", keys, token, *arguments)

    async def publish(self, token: int, step: int, digest: str, manifest_json: str) -> Published:
        """Make a snapshot current. A (step, digest) published before gets its old number and changes nothing.

        token: the learner's. Raises Unavailable while the registry is not restored.
        """
        keys = ["tokens", "registry", "versions", "manifests", "published"]
        version, changed = await self._script("publish", keys, token, step, digest, manifest_json)
        return Published(int(version), bool(changed))

    async def current(self) -> Policy | None:
        """The newest version; None while nothing is published."""
        while True:
            version = await self._command("HGET", "registry", "version")
            if version is None or int(version) < 0:
                return None
            policy = await self._policy(int(version))
            if policy is not None:  # else another was published, and this one forgotten, between the two reads
                return policy

    async def manifest(self, version: int) -> Policy:
        """A known version. Raises NotFound."""
        policy = await self._policy(version)
        if policy is None:
            raise NotFound(f"policy version {version} is not known", where=f"run {self.run!r}", fix="see versions()")
        return policy

    async def versions(self) -> dict[int, int]:
        """Known version -> optimizer step."""
        pairs: dict[bytes, bytes] = await self._command("HGETALL", "versions")
        return {int(version): int(pair.split()[0]) for version, pair in sorted(pairs.items(), key=lambda x: int(x[0]))}

    async def forget(self, version: int, oldest_step: int = 0) -> bool:
        """Drop an old version: groups sampled under it will be refused as unknown. False: it is the current one.

        oldest_step: the earliest that a learner may still go back to; forgotten versions of earlier steps lose their
        (step, digest), so that those do not add up for ever.
        """
        keys = ["registry", "versions", "manifests", "published"]
        return bool(await self._script("forget", keys, version, oldest_step))

    async def _policy(self, version: int) -> Policy | None:
        pair, manifest = await asyncio.gather(
            self._command("HGET", "versions", version), self._command("HGET", "manifests", version)
        )
        if pair is None or manifest is None:
            return None
        step, digest = pair.decode().split(" ")
        return Policy(version, int(step), digest, manifest.decode())

    # ---- facts and documents

    async def set_facts(self, token: int, facts: Mapping[str, str]) -> None:
        """What every worker must agree on (vocabulary size, digests); token: the learner's."""
        await self._write("learner", token, "HSET", "facts", *(text for item in facts.items() for text in item))

    async def facts(self) -> dict[str, str]:
        """Empty until the learner has published."""
        return await self._texts("facts")

    async def save_document(self, token: int, collection: str, identifier: str, json: str) -> None:
        """Keep a small JSON document; token: the control plane's."""
        await self._write("control-plane", token, "HSET", f"documents:{collection}", identifier, json)

    async def delete_document(self, token: int, collection: str, identifier: str) -> None:
        await self._write("control-plane", token, "HDEL", f"documents:{collection}", identifier)

    async def documents(self, collection: str) -> dict[str, str]:
        """Identifier -> JSON."""
        return await self._texts(f"documents:{collection}")

    async def _texts(self, key: str) -> dict[str, str]:
        pairs: dict[bytes, bytes] = await self._command("HGETALL", key)
        return {name.decode(): text.decode() for name, text in pairs.items()}

    # ---- workers

    async def heartbeat(self, worker: str, report_json: str, ttl_seconds: float) -> None:
        """Keep a worker's report for `ttl_seconds`."""
        await self._script("heartbeat", ["workers", "worker_expiry"], worker, report_json, round(ttl_seconds * 1000))

    async def workers(self) -> list[Worker]:
        """The last report of every worker whose time is not up, by name."""
        now, *rest = await self._script("workers", ["workers", "worker_expiry"])
        found = []
        for name, value in zip(rest[::2], rest[1::2], strict=True):
            seen, _, report = value.partition(b" ")
            found.append(Worker(name.decode(), report.decode(), (int(now) - int(seen)) / 1000))
        return sorted(found, key=lambda worker: worker.name)
