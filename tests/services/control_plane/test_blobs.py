"""Blobs: whole or not at all, named by their content, deleted only when nobody can want them."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sapo_learner.errors import Mismatch, NotFound
from services.control_plane.blobs import GRACE_SECONDS, BlobDirectory
from tests.small_run import sha256

CONTENT = b"some weights"
NAME = sha256(CONTENT)


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def broken(part: bytes) -> AsyncIterator[bytes]:
    yield part
    raise ConnectionResetError("gone")


def age(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


async def test_what_was_put_is_there_whole(tmp_path: Path) -> None:
    blobs = BlobDirectory(tmp_path)
    await blobs.put(NAME, chunks(b"some ", b"weights"))
    assert blobs.path(NAME).read_bytes() == CONTENT
    await blobs.put(NAME, chunks(CONTENT))
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


async def test_an_upload_of_other_content_leaves_nothing(tmp_path: Path) -> None:
    blobs = BlobDirectory(tmp_path)
    with pytest.raises(Mismatch, match=sha256(b"other")):
        await blobs.put(NAME, chunks(b"other"))
    with pytest.raises(NotFound):
        blobs.path(NAME)
    assert list(tmp_path.iterdir()) == []


async def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError):
        await BlobDirectory(tmp_path).put(NAME, broken(b"some "))
    assert list(tmp_path.iterdir()) == []


async def test_an_upload_that_a_crash_cut_off_is_removed_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "tmp123.upload").write_bytes(b"some ")
    BlobDirectory(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "..", "../run.yaml", NAME.upper(), NAME[:-1], "g" * 64, "/etc/passwd"])
def test_only_digests_are_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFound, match="not a SHA-256"):
        BlobDirectory(tmp_path / "blobs").path(name)


async def test_only_unwanted_blobs_past_their_grace_are_deleted(tmp_path: Path) -> None:
    blobs = BlobDirectory(tmp_path)
    names = {}
    for content in (b"wanted", b"unwanted", b"awaits its manifest", b"asked for"):
        names[content] = sha256(content)
        await blobs.put(sha256(content), chunks(content))
    for content in (b"wanted", b"unwanted", b"asked for"):
        age(blobs.path(names[content]), GRACE_SECONDS + 60)
    blobs.keep_a_while(blobs.path(names[b"asked for"]))
    (tmp_path / "other.upload").write_bytes(b"being written")
    age(tmp_path / "other.upload", GRACE_SECONDS + 60)
    blobs.keep_only({names[b"wanted"]})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {names[b"wanted"], names[b"awaits its manifest"], names[b"asked for"], "other.upload"}
