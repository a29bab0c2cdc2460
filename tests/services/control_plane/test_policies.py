"""The registry and the disk: publishing is idempotent, survives every crash, and what may still be named is kept."""

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from sapo_learner.errors import ConfigError, Fenced, NotFound
from services.control_plane.blobs import GRACE_SECONDS
from services.runstore import EmbeddedRedis, RunStore
from services.runtime.settings import RunConfig
from tests.small_run import (
    Learner,
    Running,
    control_plane,
    evaluate_all,
    lease_request,
    run_config,
    snapshot_files,
    snapshot_manifest,
)


def manifests(config: RunConfig) -> list[int]:
    return sorted(int(path.stem) for path in (config.run.directory / "snapshots" / "manifests").glob("*.json"))


def blobs(config: RunConfig) -> set[str]:
    return {path.name for path in (config.run.directory / "snapshots" / "blobs").iterdir()}


async def empty(redis: EmbeddedRedis, store: RunStore) -> None:
    """What a server that lost its memory looks like to this run."""
    await store._redis.flushall()


async def test_versions_count_up_and_the_newest_is_current(running: Running, learner: Learner) -> None:
    assert [(await learner.publish(step)).version for step in (1, 2)] == [1, 2]
    current = await running.client.manifest()
    assert (current.version, current.step) == (2, 2)
    assert (await running.client.manifest(1)).step == 1
    with pytest.raises(NotFound):
        await running.client.manifest(7)


async def test_publishing_the_same_again_changes_nothing(running: Running, learner: Learner) -> None:
    first = await learner.publish(1)
    again = await learner.publish(1)
    assert (first.version, first.changed) == (1, True)
    assert (again.version, again.changed) == (1, False)
    assert manifests(running.config) == [0, 1]


async def test_a_step_without_signal_is_published_with_the_same_bytes_under_a_new_number(
    running: Running, learner: Learner
) -> None:
    await learner.publish(1, "same")
    assert (await learner.publish(2, "same")).version == 2
    assert (await running.store.state()).published_step == 2


async def test_nothing_is_published_before_its_blobs_are_there(running: Running, learner: Learner) -> None:
    missing = snapshot_manifest(1, snapshot_files("never uploaded"))
    with pytest.raises(NotFound, match=missing.digest):
        await running.client.publish(learner.request(missing))
    uploaded = await learner.upload(1)
    wrong = uploaded.model_copy(update={"parts": [uploaded.parts[0].model_copy(update={"size": 1})]})
    with pytest.raises(NotFound, match="not 1"):
        await running.client.publish(learner.request(wrong))
    assert manifests(running.config) == [0]


async def test_a_manifest_that_is_none_is_refused_by_name(running: Running, learner: Learner) -> None:
    manifest = await learner.upload(1)
    request = learner.request(manifest)
    with pytest.raises(ConfigError, match="unknown key 'stp', did you mean 'step'"):
        await running.client.publish(request.model_copy(update={"manifest": request.manifest | {"stp": 1}}))


async def test_an_older_learner_publishes_nothing_and_hears_why(running: Running, learner: Learner) -> None:
    manifest = await learner.upload(1)
    await running.store.acquire_token("learner")
    with pytest.raises(Fenced, match="a newer learner"):
        await running.client.publish(learner.request(manifest))
    assert manifests(running.config) == [0]
    assert (await running.store.state()).published_version == 0


async def test_the_manifest_is_on_disk_before_anybody_can_hear_of_the_version(
    running: Running, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, seen = running.plane._store.publish, []

    async def observed(*args: object) -> object:
        seen.append(manifests(running.config))
        return await publish(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(running.plane._store, "publish", observed)
    await learner.publish(1)
    assert seen == [[0, 1]]


async def test_a_crash_between_disk_and_registry_is_completed_at_the_next_start(
    redis: EmbeddedRedis, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane(config, redis.url) as running:
        learner = await Learner(running).start()
        manifest = await learner.upload(1)

        async def crash(*_: object) -> object:
            raise asyncio.CancelledError

        monkeypatch.setattr(running.plane._store, "publish", crash)
        with pytest.raises(asyncio.CancelledError):
            await running.plane.publish(learner.request(manifest))
        assert (await running.store.state()).published_version == 0
    async with control_plane(config, redis.url) as running:
        assert (await running.client.manifest()).version == 1
        repeated = await running.client.publish(learner.request(manifest))
        assert (repeated.version, manifests(config)) == (1, [0, 1])


async def test_a_crash_between_registry_and_disk_of_an_older_release_is_completed_too(
    redis: EmbeddedRedis, config: RunConfig
) -> None:
    async with control_plane(config, redis.url) as running:
        learner = await Learner(running).start()
        await learner.publish(1)
    (config.run.directory / "snapshots" / "manifests" / "00000001.json").unlink()
    async with control_plane(config, redis.url) as running:
        assert manifests(config) == [0, 1]
        assert (await running.client.manifest(1)).version == 1


async def test_an_emptied_redis_is_told_everything_before_it_gives_a_number(
    redis: EmbeddedRedis, running: Running, learner: Learner
) -> None:
    await learner.publish(1)
    before = await running.store.facts()
    await empty(redis, running.store)
    assert (await learner.publish(1)).version == 1
    assert (await learner.publish(2)).version == 2
    assert await running.store.facts() == before
    assert await running.store.versions() == {0: 0, 1: 1, 2: 2}


async def test_a_redis_that_went_back_in_time_does_not_give_a_number_twice(running: Running, learner: Learner) -> None:
    await learner.publish(1)
    for key, field in (("versions", "1"), ("manifests", "1")):
        await running.store._command("HDEL", key, field)
    await running.store._command("DEL", "published")
    await running.store._command("HSET", "registry", "version", "0", "step", "0")
    assert (await learner.publish(2, "others")).version == 2
    assert await running.store.versions() == {0: 0, 1: 1, 2: 2}


async def test_while_the_registry_is_lost_nobody_is_told_that_nothing_was_ever_published(
    redis: EmbeddedRedis, running: Running, learner: Learner
) -> None:
    await empty(redis, running.store)
    from sapo_learner.errors import Unavailable

    with pytest.raises(Unavailable, match="being restored"):
        await running.plane.policies.current()


async def test_facts_come_back_after_a_restart_with_an_emptied_redis(redis: EmbeddedRedis, config: RunConfig) -> None:
    async with control_plane(config, redis.url) as running:
        await Learner(running).start()
        before = await running.store.facts()
        await empty(redis, running.store)
    async with control_plane(config, redis.url) as running:
        assert before
        assert await running.store.facts() == before
        assert (await running.client.manifest()).version == 0


async def test_as_many_versions_are_kept_as_tokens_in_training_can_name_and_two_more(
    redis: EmbeddedRedis, tmp_path: Path
) -> None:
    config = run_config(tmp_path, training={"steps": 20, "max_policy_age": 2})
    async with control_plane(config, redis.url) as running:
        learner = await Learner(running).start()
        for step in range(1, 8):
            await learner.publish(step)
        assert sorted(await running.store.versions()) == manifests(config) == [4, 5, 6, 7]


async def test_a_learner_that_goes_back_does_not_push_out_versions_that_training_can_still_name(
    redis: EmbeddedRedis, tmp_path: Path
) -> None:
    config = run_config(tmp_path, training={"steps": 20, "max_policy_age": 2})
    async with control_plane(config, redis.url) as running:
        learner = await Learner(running).start()
        for step in range(1, 6):
            await learner.publish(step)
        for attempt in range(4):  # each ends in other weights: numbers run on, the step does not
            await learner.publish(5, f"branch {attempt}")
        steps = await running.store.versions()
        assert set(steps.values()) >= {3, 4, 5}


async def test_a_forgotten_version_keeps_its_number_as_far_back_as_a_learner_may_go(
    redis: EmbeddedRedis, tmp_path: Path
) -> None:
    config = run_config(tmp_path, training={"steps": 99, "max_policy_age": 0}, checkpoint={"every": 2, "keep": 1})
    async with control_plane(config, redis.url) as running:
        learner = await Learner(running).start()
        for step in range(1, 41):
            await learner.publish(step)
        assert 37 not in await running.store.versions()
        assert (await learner.publish(37)).version == 37, "the last checkpoint may be four steps old"
        assert await running.store._command("HLEN", "published") <= 6, "memory does not grow with the run"
        assert (await learner.publish(5)).version == 41, "a new number: never one that something else has"


async def test_a_version_pinned_by_an_evaluation_outlives_its_time(redis: EmbeddedRedis, tmp_path: Path) -> None:
    config = run_config(
        tmp_path, training={"steps": 30, "max_policy_age": 1}, task={"held_out_every": 10}, evaluation={"every": 1}
    )
    async with control_plane(config, redis.url) as running:
        learner = await Learner(running).start()
        await evaluate_all(running)
        await learner.publish(1)
        assert (await running.client.lease(lease_request("pinned", 0, policy=1, evaluate=True))).evaluation
        for step in range(2, 8):
            await learner.publish(step)
        assert 1 in manifests(config)
        assert 2 not in manifests(config)


async def test_blobs_go_with_the_last_version_that_used_them(redis: EmbeddedRedis, tmp_path: Path) -> None:
    config = run_config(tmp_path, training={"steps": 20, "max_policy_age": 0})
    async with control_plane(config, redis.url) as running:
        learner = await Learner(running).start()
        first = (await running.client.manifest(0)).parts[0].sha256
        waiting = await learner.upload(9)
        for step in (1, 2, 3):
            await learner.publish(step)
        assert {0, 1} & set(manifests(config)) == set()
        assert first not in blobs(config), "at once: disk is bounded by how many versions are kept, not by time"
        assert waiting.parts[0].sha256 in blobs(config), "no manifest has named it yet"
        os.utime(running.plane.policies.blobs.path(waiting.parts[0].sha256), (0, time.time() - GRACE_SECONDS - 60))
        await learner.publish(4)
        assert waiting.parts[0].sha256 not in blobs(config), "nor ever will"
        kept = [await running.client.manifest(version) for version in manifests(config)]
        assert {blob.sha256 for manifest in kept for blob in manifest.blobs()} <= blobs(config)


async def test_whoever_asks_for_an_old_blob_can_still_publish_it(redis: EmbeddedRedis, running: Running) -> None:
    learner = await Learner(running).start()
    manifest = await learner.upload(1, "old")
    path = running.plane.policies.blobs.path(manifest.digest)
    os.utime(path, (0, 0))
    await learner.upload(1, "old")  # only asks, since it is there
    await running.plane.policies.prune(set())
    assert (await running.client.publish(learner.request(manifest))).version == 1


async def test_what_is_saved_of_the_facts_names_the_learner_that_said_them(running: Running, learner: Learner) -> None:
    saved = json.loads((running.config.run.directory / "snapshots" / "facts.json").read_text())
    assert saved["token"] == learner.token
    assert saved["facts"] == await running.store.facts()
