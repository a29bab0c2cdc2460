"""Follows the run's newest policy: hears of it, fetches it, verifies every digest, has the engine swap to it, confirms.

Hearing is a hint (server-sent events, or a heartbeat's answer); what counts is the manifest fetched then. A snapshot
whose digests differ is never served (I5): the worker goes on under the policy it has and tries again. After each swap
the engine scores the manifest's probe (I4); until it has come to the learner's numbers, whatever was sampled under the
version waits (`proved`), and when it does not, the worker ends: what its engine computes is not what was published.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from torch import Tensor

from sapo_learner.errors import Corrupt, Mismatch, NotFound, SapoError
from sapo_learner.manifest import Manifest, Probe
from sapo_learner.probe import ProbeResult, compare
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

    def __init__(
        self, control: ControlPlaneClient, scratch: Path, arrived: Callable[[int], None] = lambda _: None
    ) -> None:
        """arrived: told the bytes of each blob that was fetched."""
        self._arrived = arrived
        self._control, self._blobs, self.model_directory = control, scratch / "blobs", scratch / "model"
        self._blobs.mkdir(parents=True, exist_ok=True)

    async def fetch(self, version: int | None = None) -> Manifest:
        """Download a version (None: the current one) and forget every other one's blobs."""
        manifest = await self._control.manifest(version)
        for blob in manifest.blobs():
            if not (self._blobs / blob.sha256).exists():
                await self._control.download(blob, self._blobs)
                self._arrived(blob.size)
        wanted = {blob.sha256 for blob in manifest.blobs()}
        for path in self._blobs.iterdir():
            if path.name.removesuffix(".part") not in wanted:
                path.unlink()
        return manifest

    def write_model_directory(self, manifest: Manifest, *, weights: bool) -> Path:
        """The small files (configuration, tokenizer) as a model directory, with or without the weights."""
        self.model_directory.mkdir(exist_ok=True)
        for name, blob in manifest.files.items():
            shutil.copyfile(self._blobs / blob.sha256, self.model_directory / name)
        if weights:
            for index, part in enumerate(manifest.parts, start=1):
                path = self.model_directory / f"model-{index:05d}-of-{len(manifest.parts):05d}.safetensors"
                path.unlink(missing_ok=True)
                path.hardlink_to(self._blobs / part.sha256)
        return self.model_directory

    def tensors(self, manifest: Manifest) -> Mapping[str, Tensor]:
        """Verified weights, to be read before the next `fetch`.

        What does not verify is deleted, so that the next try fetches it anew.
        """
        try:
            return read_snapshot(manifest, lambda sha256: self._blobs / sha256)
        except Mismatch:
            for part in manifest.parts:
                (self._blobs / part.sha256).unlink(missing_ok=True)
            raise


class Follower:
    def __init__(
        self,
        engine: Engine,
        store: PolicyStore,
        metrics: RolloutMetrics,
        *,
        dtype: str = "float32",
        on_miss: Literal["stop", "warn"] = "stop",
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        """dtype: torch's name of what the engine computes in, which decides how closely it must agree. on_miss: whether
        an engine that does not agree ends `run` and `prove`."""
        self._engine, self._store, self._metrics, self._retry_seconds = engine, store, metrics, retry_seconds
        self._dtype, self._on_miss = dtype, on_miss
        self._proved, self._progress = -1, asyncio.Condition()
        self.probe: ProbeResult | None = None
        """Of the newest version that was proved; None when it carries no probe."""
        self.missed = False
        """Whether the engine computes a version otherwise than the learner, and the worker ends for it."""
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
        """Keep the served version, proved by then, while the block runs. Not to be nested."""
        async with self._swapping:
            self._pins += 1
            self._unpinned.clear()
        try:
            await self.proved(self._engine.policy_version.version)
            yield
        finally:
            self._pins -= 1
            if not self._pins:
                self._unpinned.set()

    async def proved(self, version: int) -> None:
        """Wait until the engine has been found to compute this version. For ever, if it does not: `run` raises then."""
        async with self._progress:
            await self._progress.wait_for(lambda: self._proved >= version)

    async def prove(self, manifest: Manifest) -> None:
        """Hold the engine against the learner's numbers for the version that it serves now.

        Raises Corrupt when they differ, and what the engine raises.
        """
        version = served(manifest).version
        if manifest.probe is None:
            if self._proved < 0 or self.probe:  # said once, not at every version
                log.warning("version %d has no probe: nobody knows whether the engine computes it as learned", version)
            self.probe = None
        else:
            self.probe = await self._compare(version, manifest.probe)
        async with self._progress:
            self._proved = version
            self._progress.notify_all()
        self._metrics.version.set(version)

    async def _compare(self, version: int, probe: Probe) -> ProbeResult:
        ids = list(probe.token_ids)
        async with _limited("scoring the probe"):
            scored = await self._engine.score(ids[:1], ids[1:])
        result = compare(probe.logprobs, scored, self._dtype)
        self._metrics.probe_max.set(result.max_abs_difference)
        self._metrics.probe_mean.set(result.mean_abs_difference)
        if result.ok:
            return result
        self._metrics.probe_misses.inc()
        figures = f"up to {result.max_abs_difference:.3g} nats, mean {result.mean_abs_difference:.3g}"
        what = (
            f"the engine does not compute version {version} as it was learned: on the probe its log-probs are off by "
        )
        what += f"{figures} (bound: {result.bound})"
        if self._on_miss == "warn":
            log.warning("%s", what)
            return result
        self.missed = True
        raise Corrupt(
            f"{what}; nothing sampled under it is sent",
            where=self._engine.name,
            fix="compare engine.vllm.dtype with policy.dtype and the engine's version with the tested ones, "
            "see `sapo check RUN`",
        )

    async def run(self, confirm: Callable[[], Awaitable[None]]) -> None:
        """Follow for ever. confirm: called after each swap, to tell the control plane.

        Raises what keeps this worker from taking a version, after MAX_FAILURES tries in a row, and Corrupt at once when
        its engine computes something else than what was published.
        """
        failures = 0
        while True:
            await self._hint.wait()
            self._hint.clear()
            try:
                manifest = await self._advance()
            except SapoError as error:
                failures += 1
                if failures == MAX_FAILURES:
                    raise
                await self._bear(error, failures)
                self._hint.set()
                continue
            failures = 0
            if manifest:
                await self.prove(manifest)
                await confirm()

    async def _bear(self, error: SapoError, failures: int) -> None:
        if isinstance(error, NotFound) and failures == 1:
            return  # superseded while being fetched: the newest is another one by now
        self._metrics.sync_failures.inc()
        log.warning("version %d not taken: %s", self._heard, error)
        await asyncio.sleep(min(self._retry_seconds * 2 ** (failures - 1), MAX_RETRY_SECONDS))

    async def _advance(self) -> Manifest | None:
        """Have the engine swap to the newest version; None when it is served already."""
        started = time.monotonic()
        manifest = await self._store.fetch()
        if served(manifest).version <= self._engine.policy_version.version:
            return None
        tensors = await asyncio.to_thread(self._store.tensors, manifest)
        async with self._swapping:
            await self._unpinned.wait()
            async with _limited("taking over new weights"):
                await self._engine.update_weights(tensors, served(manifest))
        self._metrics.sync_seconds.observe(time.monotonic() - started)
        return manifest


@asynccontextmanager
async def _limited(what: str) -> AsyncIterator[None]:
    """TimeoutError that says what hung. Not one of ours: it is no use to try again with this engine."""
    try:
        async with asyncio.timeout(SWAP_SECONDS):
            yield
    except TimeoutError:
        raise TimeoutError(f"the inference engine hangs: {what} took more than {SWAP_SECONDS:.0f} s") from None


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
