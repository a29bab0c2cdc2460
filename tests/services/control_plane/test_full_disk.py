"""A disk without room under the control plane: uploads and policies are tried again, and no request fails for the
record's sake."""

import asyncio
import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from sapo_learner.errors import Unavailable
from sapo_learner.manifest import Blob
from services.control_plane import policies as policies_module
from services.control_plane import record as record_module
from services.control_plane.record import Record, read
from services.runtime.client import ControlPlaneClient
from tests.full_disk import no_file_beyond
from tests.small_run import TOKEN, Learner, Running


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file()}


# ---- blobs and manifests, over HTTP


async def test_an_upload_that_finds_no_room_is_refused_as_unavailable_leaves_nothing_and_succeeds_later(
    running: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"weights " * 50_000)
    blob, blobs = Blob.of(path), running.config.run.directory / "snapshots" / "blobs"
    async with ControlPlaneClient(running.url, TOKEN, patience=0.5) as impatient:
        with no_file_beyond(100_000), pytest.raises(Unavailable, match=f"too large.*{blob.sha256}.*make room"):
            await impatient.upload(path, blob)
    assert names(blobs) == set()
    caplog.clear()
    with no_file_beyond(100_000) as room:
        uploading = asyncio.create_task(running.client.upload(path, blob))
        await until(lambda: "too large" in caplog.text)
        room.make()
        await asyncio.wait_for(uploading, 20)
    assert names(blobs) == {blob.sha256}
    assert Blob.of(blobs / blob.sha256) == blob


@pytest.mark.parametrize("stuck", ["facts.json", "00000001.json"])
async def test_a_policy_whose_manifest_finds_no_room_is_not_published_and_succeeds_later(
    running: Running, learner: Learner, caplog: pytest.LogCaptureFixture, stuck: str
) -> None:
    request, directory = learner.request(await learner.upload(1)), running.config.run.directory / "snapshots"
    if stuck != "facts.json":
        request = request.model_copy(update={"facts": {}})
    before = files(directory)
    with no_file_beyond(100) as room:
        publishing = asyncio.create_task(running.client.publish(request))
        await until(lambda: "too large" in caplog.text)
        assert stuck in caplog.text
        assert files(directory) == before
        assert (await running.store.state()).published_version == 0
        room.make()
        published = await asyncio.wait_for(publishing, 20)
    assert (published.version, (await running.client.manifest()).step) == (1, 1)
    assert files(directory) - before == {"00000001.json"}


async def test_a_manifest_whose_name_may_not_be_durable_is_not_restored_from(
    running: Running, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the registry would serve a version that a power cut takes back."""
    directory, fsync = running.config.run.directory / "snapshots" / "manifests", policies_module.fsync

    def failing(path: Path) -> None:
        if path == directory:
            raise OSError(errno.EIO, "Input/output error", str(path))
        fsync(path)

    manifest = await learner.upload(1)
    with monkeypatch.context() as patched:
        patched.setattr(policies_module, "fsync", failing)
        with pytest.raises(OSError, match="Input/output"):
            await running.plane.policies.publish(learner.token, manifest, {})
    assert names(directory) == {"00000000.json"}
    assert (await learner.publish(1)).version == 1


# ---- the record


def lines(path: Path) -> list[int]:
    return [line["number"] for line in read(path)]


def test_a_line_torn_at_any_byte_is_written_whole_later_and_swallows_no_other(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record = Record(path)
    number = 0
    for room in range(80):  # a line has fewer bytes
        record.add("step", number=number)
        with no_file_beyond(path.stat().st_size + room):
            record.add("step", number=number + 1)
            record.add("step", number=number + 2)
        number += 3
    record.add("step", number=number)
    assert lines(path) == list(range(number + 1))
    assert [line["number"] for line in record.recent["step"]] == list(range(number + 1))


def test_waiting_lines_are_written_when_the_record_closes_and_a_new_one_ends_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record = Record(path)
    record.add("step", number=0)
    with no_file_beyond(path.stat().st_size + 5):
        record.add("step", number=1)  # and this process is killed
    Record(path).add("step", number=2)
    assert lines(path) == [0, 2]
    record = Record(path)
    with no_file_beyond(1):
        record.add("step", number=3)
    record.close()
    assert lines(path) == [0, 2, 3]


def test_it_is_said_once_when_lines_wait_and_once_when_that_is_over_with_what_was_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(record_module, "WAITING", 3)
    path = tmp_path / "record.jsonl"
    record = Record(path)
    record.add("step", number=0)
    with no_file_beyond(path.stat().st_size):
        for number in range(1, 6):
            assert record.add("step", number=number)["number"] == number
    record.add("step", number=6)
    assert lines(path) == [0, 3, 4, 5, 6], "the newest three waited"
    waiting, over = [each.message for each in caplog.records]
    assert str(path) in waiting
    assert "too large" in waiting
    assert "lines wait in memory" in waiting
    assert "2 lines were dropped" in over
    caplog.clear()
    with no_file_beyond(path.stat().st_size):  # another time
        record.add("step", number=7)
        record.add("step", number=8)
    record.add("step", number=9)
    waiting, over = [each.message for each in caplog.records]
    assert "lines wait in memory" in waiting
    assert "0 lines were dropped" in over
    assert lines(path) == [0, 3, 4, 5, 6, 7, 8, 9]


async def test_no_request_fails_because_the_record_cannot_be_written(running: Running, learner: Learner) -> None:
    path = running.config.run.directory / "record.jsonl"
    with no_file_beyond(path.stat().st_size + 10):
        await learner.report("training", step=1, record={"kind": "step", "step": 1})
        assert (await running.client.status())["last_step"]["step"] == 1
    await learner.report("training", step=2, record={"kind": "step", "step": 2})
    assert [line["step"] for line in map(json.loads, path.read_text().splitlines()[-2:])] == [1, 2]
