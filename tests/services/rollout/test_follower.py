"""The worker serves what a manifest's digests say (I5), the newest there is, and swaps only when nobody pins it."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import torch
from torch import Tensor

from sapo_learner.errors import Corrupt, Mismatch, NotFound, Unavailable
from sapo_learner.manifest import Blob, Manifest, Probe
from sapo_learner.snapshot import write_snapshot
from services.rollout.engines import PolicyVersion
from services.rollout.follower import Follower, PolicyStore, listen
from services.runtime.metrics import RolloutMetrics

PROBE = Probe(token_ids=(4, 5, 6, 7), logprobs=(-1.0, -2.0, -3.0))


class ControlPlane:
    """Manifests and blobs as the real one serves them. `disturb` may change what is downloaded, or raise."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.manifests: list[Manifest] = []
        self.downloads: list[str] = []
        self.asked: asyncio.Queue[None] = asyncio.Queue()
        self.probe: Probe | None = PROBE  # of what is published next
        self.disturb: Callable[[Manifest, Path], None] = lambda manifest, path: None

    def publish(self) -> Manifest:
        version = len(self.manifests)
        tensors = {"w": torch.full((40,), float(version)), "v": torch.arange(4.0) + version}
        made = write_snapshot(
            tensors, step=3 * version, dtype="float32", files={"config.json": b"{}"}, directory=self._directory,
            part_bytes=100,
        )  # fmt: skip
        self.manifests.append(made.model_copy(update={"version": version, "probe": self.probe}))
        return self.manifests[-1]

    async def manifest(self, version: int | None = None) -> Manifest:
        self.asked.put_nowait(None)
        return self.manifests[-1 if version is None else version]

    async def download(self, blob: Blob, directory: Path) -> Path:
        target = directory / blob.sha256
        if not target.exists():
            self.downloads.append(blob.sha256)
            shutil.copyfile(self._directory / blob.sha256, target)
            self.disturb(next(each for each in self.manifests if blob in each.blobs()), target)
        return target


class Engine:
    """Notes what it is given to serve. `open`: cleared, a swap takes until it is set again; `scoring`, scoring."""

    name = "fake 1"

    def __init__(self) -> None:
        self.scores = list(PROBE.logprobs)
        self.scoring = asyncio.Event()
        self.scoring.set()
        self.policy_version = PolicyVersion(0, 0)
        self.served: dict[str, Tensor] = {}
        self.swaps: asyncio.Queue[str] = asyncio.Queue()
        self.open = asyncio.Event()
        self.open.set()

    async def update_weights(self, tensors: dict[str, Tensor], policy: PolicyVersion) -> None:
        self.swaps.put_nowait(f"begin {policy.version}")
        await self.open.wait()
        self.policy_version, self.served = policy, tensors
        self.swaps.put_nowait(f"serve {policy.version}")

    async def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        assert (*prompt_ids, *token_ids) == PROBE.token_ids
        self.swaps.put_nowait(f"score {self.policy_version.version}")
        await self.scoring.wait()
        return self.scores


class Scene:
    def __init__(self, directory: Path) -> None:
        self.control, self.engine, self.metrics = ControlPlane(directory / "published"), Engine(), RolloutMetrics()
        self.arrived: list[int] = []
        self.store = PolicyStore(self.control, directory / "scratch", self.arrived.append)  # type: ignore[arg-type]
        self.follow("float32")
        self.control.publish()

    def follow(self, dtype: str, **options: Any) -> None:
        options |= {"dtype": dtype, "retry_seconds": 0.001}
        self.follower = Follower(self.engine, self.store, self.metrics, **options)  # type: ignore[arg-type]

    async def confirm(self) -> None:
        self.engine.swaps.put_nowait(f"confirm {self.engine.policy_version.version}")

    @asynccontextmanager
    async def following(self) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(self.follower.run(self.confirm))
        try:
            async with asyncio.timeout(10):
                yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def expect(self, *events: str) -> None:
        assert [await self.engine.swaps.get() for _ in events] == list(events)

    async def swapped(self, version: int) -> None:
        await self.expect(f"begin {version}", f"serve {version}", f"score {version}", f"confirm {version}")

    async def proved(self, version: int) -> bool:
        """Whether what was sampled under the version may leave the worker, by now."""
        waiting = asyncio.create_task(self.follower.proved(version))
        await asyncio.wait([waiting], timeout=0.05)
        waiting.cancel()
        return waiting.done() and not waiting.cancelled()

    def metric(self, name: str) -> Any:
        return self.metrics.registry.get_sample_value(f"sapo_{name}")

    @property
    def failures(self) -> Any:
        return self.metric("weight_sync_failures_total")


@pytest_asyncio.fixture
async def scene(tmp_path: Path) -> Scene:
    """Version 0 is served and proved."""
    scene = Scene(tmp_path)
    await scene.follower.prove(scene.control.manifests[0])
    await scene.expect("score 0")
    return scene


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


async def test_each_new_version_is_served_with_its_step_and_confirmed(scene: Scene) -> None:
    async with scene.following():
        for version in (1, 2):
            scene.control.publish()
            scene.follower.hint(version)
            await scene.swapped(version)
            assert scene.engine.policy_version == PolicyVersion(version, 3 * version)
            assert torch.equal(scene.engine.served["w"], torch.full((40,), float(version)))
    assert scene.failures == 0


async def test_of_several_versions_only_the_newest_is_fetched(scene: Scene) -> None:
    for _ in range(3):
        scene.control.publish()
    scene.follower.hint(1)
    async with scene.following():
        await scene.swapped(3)
    assert not set(scene.control.downloads) & {each.sha256 for each in scene.control.manifests[1].parts}


async def test_older_and_equal_hints_move_nothing(scene: Scene) -> None:
    scene.engine.policy_version = PolicyVersion(2, 6)
    for _ in range(3):
        scene.control.publish()
    async with scene.following():
        for version in (0, 1, 2):
            scene.follower.hint(version)
        scene.follower.hint(3)
        await scene.swapped(3)
        assert scene.engine.swaps.empty()


async def test_a_hint_of_a_version_that_the_control_plane_forgot_moves_nothing(scene: Scene) -> None:
    scene.engine.policy_version = PolicyVersion(1, 3)
    scene.control.publish()
    async with scene.following():
        scene.follower.hint(7)
        await scene.control.asked.get()
        scene.control.publish()
        scene.follower.hint(8)
        await scene.swapped(2)


async def test_a_damaged_blob_is_never_served_and_is_fetched_anew(scene: Scene) -> None:
    """I5."""
    published, times = scene.control.publish(), 3
    part = published.parts[0].sha256

    def disturb(_: Manifest, path: Path) -> None:
        if path.name == part and scene.control.downloads.count(part) < times:
            damage(path)

    scene.control.disturb = disturb
    async with scene.following():
        scene.follower.hint(1)
        await scene.swapped(1)
    assert torch.equal(scene.engine.served["w"], torch.full((40,), 1.0))
    assert scene.control.downloads.count(part) == times
    assert scene.failures == times - 1


async def test_what_does_not_verify_is_deleted(scene: Scene) -> None:
    manifest = await scene.store.fetch()
    blobs = scene.store.model_directory.parent / "blobs"
    damage(blobs / manifest.parts[0].sha256)
    with pytest.raises(Mismatch):
        scene.store.tensors(manifest)
    assert not (blobs / manifest.parts[0].sha256).exists()
    assert scene.store.tensors(await scene.store.fetch()).keys() == manifest.tensors.keys()


async def test_only_the_newest_version_s_blobs_are_kept(scene: Scene) -> None:
    await scene.store.fetch()
    blobs = scene.store.model_directory.parent / "blobs"
    (blobs / f"{'0' * 64}.part").write_bytes(b"half")
    manifest = scene.control.publish()
    await scene.store.fetch()
    assert {path.name for path in blobs.iterdir()} == {blob.sha256 for blob in manifest.blobs()}


async def test_only_bytes_that_were_fetched_count(scene: Scene) -> None:
    manifest = await scene.store.fetch()
    assert sum(scene.arrived) == sum(blob.size for blob in manifest.blobs())
    await scene.store.fetch()
    assert len(scene.arrived) == len(scene.control.downloads)


async def test_a_version_superseded_while_it_is_fetched_gives_way_to_the_newest(scene: Scene) -> None:
    scene.control.publish()

    def disturb(manifest: Manifest, path: Path) -> None:
        if manifest.version == 1:
            path.unlink()
            scene.control.disturb = lambda manifest, path: None
            scene.control.publish()
            raise NotFound("superseded")

    scene.control.disturb = disturb
    async with scene.following():
        scene.follower.hint(1)
        await scene.swapped(2)
    assert scene.failures == 0


async def test_a_version_that_stays_incomplete_is_tried_again_with_pauses_and_said(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.control.publish()
    tries = asyncio.Queue[None]()

    def disturb(_: Manifest, path: Path) -> None:
        path.unlink()
        tries.put_nowait(None)
        raise NotFound("no blob")

    scene.control.disturb = disturb
    async with scene.following():
        scene.follower.hint(1)
        for _ in range(4):
            await tries.get()
        assert "version 1 not taken: no blob" in caplog.text
        assert scene.failures >= 2
        scene.control.disturb = lambda manifest, path: None
        await scene.swapped(1)


async def test_a_pin_delays_the_swap_until_the_last_one_is_released(scene: Scene) -> None:
    scene.control.publish()
    loop, ready, read = asyncio.get_running_loop(), asyncio.Event(), scene.store.tensors

    def tensors(manifest: Manifest) -> dict[str, Tensor]:
        found = read(manifest)
        loop.call_soon_threadsafe(ready.set)
        return found

    scene.store.tensors = tensors  # type: ignore[method-assign]
    async with scene.following():
        async with scene.follower.pinned():
            scene.follower.hint(1)
            await ready.wait()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(scene.engine.swaps.get(), 0.1)
            assert scene.engine.policy_version.version == 0
        await scene.swapped(1)


async def test_a_pin_waits_for_a_swap_that_is_under_way(scene: Scene) -> None:
    """Or what is answered under the pin would begin with one policy and end with another."""
    scene.control.publish()
    scene.engine.open.clear()

    async def pinned_version() -> int:
        async with scene.follower.pinned():
            return scene.engine.policy_version.version

    async with scene.following():
        scene.follower.hint(1)
        await scene.expect("begin 1")
        pin = asyncio.create_task(pinned_version())
        for _ in range(50):
            await asyncio.sleep(0)
        assert not pin.done()
        scene.engine.open.set()
        assert await pin == 1


async def test_an_engine_that_fails_in_a_way_nobody_knows_ends_the_follower(scene: Scene) -> None:
    scene.control.publish()

    async def broken(*_: Any) -> None:
        raise RuntimeError("page fault")

    scene.engine.update_weights = broken  # type: ignore[method-assign]
    async with scene.following() as task:
        scene.follower.hint(1)
        with pytest.raises(RuntimeError, match="page fault"):
            await task


async def test_an_unreachable_control_plane_is_tried_again(scene: Scene) -> None:
    scene.control.publish()
    answers = [Unavailable("restarting"), Unavailable("restarting")]
    working = scene.control.manifest

    async def manifest(version: int | None = None) -> Manifest:
        if answers:
            raise answers.pop()
        return await working(version)

    scene.control.manifest = manifest  # type: ignore[method-assign]
    async with scene.following():
        scene.follower.hint(1)
        await scene.swapped(1)
    assert scene.failures == 2


# ---- the probe


async def test_I4_a_version_is_proved_once_the_engine_has_come_to_the_learner_s_numbers(scene: Scene) -> None:
    scene.control.publish()
    scene.engine.scoring.clear()
    scene.engine.scores = [-1.0, -2.00004, -3.00002]
    async with scene.following():
        scene.follower.hint(1)
        await scene.expect("begin 1", "serve 1", "score 1")
        assert not await scene.proved(1)
        assert scene.metric("rollout_policy_version") == 0.0
        scene.engine.scoring.set()
        await scene.follower.proved(1)
        assert not await scene.proved(2)
        await scene.expect("confirm 1")
    assert scene.metric("rollout_policy_version") == 1.0
    assert scene.metric("rollout_probe_max_abs_difference") == pytest.approx(4e-5)
    assert scene.metric("rollout_probe_mean_abs_difference") == pytest.approx(2e-5)
    assert scene.metric("rollout_probe_misses_total") == 0.0


async def test_I4_a_pin_waits_until_its_version_is_proved(scene: Scene) -> None:
    """Evaluation answers leave the worker only from under a pin."""
    scene.control.publish()
    scene.engine.scoring.clear()
    entered = asyncio.Event()

    async def pin() -> None:
        async with scene.follower.pinned():
            entered.set()

    async with scene.following():
        scene.follower.hint(1)
        await scene.expect("begin 1", "serve 1", "score 1")
        pinning = asyncio.create_task(pin())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(entered.wait(), 0.05)
        scene.engine.scoring.set()
        await pinning


async def test_I4_an_engine_that_comes_to_other_numbers_ends_the_worker_at_once_and_says_so(scene: Scene) -> None:
    scene.control.publish()
    scene.engine.scores = [-1.0, -2.0, -3.001]
    async with scene.following() as task:
        scene.follower.hint(1)
        with pytest.raises(Corrupt) as caught:
            await task
        assert not await scene.proved(1)
    for part in ("fake 1", "version 1", "0.001 nats", "mean 0.000333", "maximum 0.0001 in float32", "sapo check"):
        assert part in str(caught.value)
    assert scene.metric("rollout_probe_misses_total") == 1.0
    assert scene.metric("rollout_probe_max_abs_difference") == pytest.approx(1e-3)
    assert scene.failures == 0


async def test_with_on_miss_warn_it_says_so_and_goes_on(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.follow("float32", on_miss="warn")
    scene.engine.scores = [-1.0, -2.0, -3.001]
    await scene.follower.prove(scene.control.manifests[0])
    assert await scene.proved(0)
    assert "does not compute version 0 as it was learned" in caplog.text
    assert scene.metric("rollout_probe_misses_total") == 1.0


@pytest.mark.parametrize(("scores", "passes"), [([-1.0, -2.14, -3.0], True), ([-1.06, -2.06, -3.06], False)])
async def test_I4_sixteen_bits_are_held_to_their_mean(scene: Scene, scores: list[float], passes: bool) -> None:
    scene.follow("bfloat16")
    scene.engine.scores = scores
    if passes:
        await scene.follower.prove(scene.control.manifests[0])
        assert scene.follower.probe
        assert scene.follower.probe.max_abs_difference == pytest.approx(0.14)
        return
    with pytest.raises(Corrupt, match=r"mean 0\.06 \(bound: mean 0\.05 in bfloat16"):
        await scene.follower.prove(scene.control.manifests[0])


async def test_versions_without_a_probe_are_served_with_one_warning(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a run directory that an older learner has left."""
    scene.control.probe = None
    async with scene.following():
        for version in (1, 2, 3):
            scene.control.publish()
            scene.follower.hint(version)
            await scene.expect(f"begin {version}", f"serve {version}", f"confirm {version}")
            await scene.follower.proved(version)
    assert caplog.text.count("has no probe") == 1
    assert scene.follower.probe is None


async def test_every_announced_version_is_handed_on() -> None:
    heard = asyncio.Queue[int]()

    async def events() -> AsyncIterator[dict[str, Any]]:
        for data in ({"version": None}, {"version": 3}, None, {"version": 4}):
            yield {"event": "policy", "data": data}

    task = asyncio.create_task(listen(SimpleNamespace(events=events), heard.put_nowait))  # type: ignore[arg-type]
    assert [await heard.get(), await heard.get()] == [3, 4]
    task.cancel()
