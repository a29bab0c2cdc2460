"""A full disk under the algorithm's own files, by the kernel's real errors: said with a name, nothing half written."""

import errno
import logging
import os
import random
from pathlib import Path

import pytest
import torch

from sapo_learner.archive import GENESIS, Archive, Entry, link
from sapo_learner.checkpoint import CheckpointState, list_whole, load_newest, save
from sapo_learner.disk import as_unavailable, naming
from sapo_learner.snapshot import save_tensors
from tests.full_disk import no_file_beyond


def state(step: int, numbers: int = 100_000) -> CheckpointState:
    weights = {"w": torch.full((numbers,), float(step))}
    return CheckpointState(step, step, "f" * 40, {"trained": step}, weights, {}, {})


def log(*sizes: int) -> list[Entry]:
    """Entries whose payloads cannot be compressed."""
    from hashlib import sha256

    entries, chain, generator = [], GENESIS, random.Random(0)
    for sequence, size in enumerate(sizes, start=1):
        payload = generator.randbytes(size)
        chain = link(chain, f"1-{sequence}", "group", sha256(payload).hexdigest())
        entries.append(Entry(1, sequence, "group", sequence, chain, payload))
    return entries


# ---- the sentence


def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb", buffering=0) as file:
        file.write(b"0123456789")
        with no_file_beyond(10), pytest.raises(OSError, match="too large") as raised, naming(path):
            file.write(b"a")  # which itself names no file
    error = as_unavailable(raised.value)
    assert error is not None
    assert (error.where, error.exit_code) == (str(path), 8)
    assert "make room" in error.fix


def test_what_the_tensor_writer_reports_counts_as_well(tmp_path: Path) -> None:
    with no_file_beyond(1000), pytest.raises(OSError, match="too large") as raised:
        save_tensors({"w": torch.zeros(10_000)}, tmp_path / "w.safetensors")
    error = as_unavailable(raised.value)
    assert error is not None
    assert "w.safetensors" in str(error)


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "make room"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "is the disk in order"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "may this user write"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), None),
        (TimeoutError(), None),
        (PermissionError(errno.EPERM, "a signal to somebody else's process"), None),
    ],
)
def test_other_errors_of_the_system_are_told_apart(error: OSError, fix: str | None) -> None:
    found = as_unavailable(error)
    assert (found is None) == (fix is None)
    assert found is None or fix is None or fix in found.fix


# ---- checkpoint


def test_i2_a_checkpoint_that_does_not_fit_leaves_the_older_one_and_nothing_else(tmp_path: Path) -> None:
    older = save(tmp_path, state(1), token=1)
    with no_file_beyond(100_000), pytest.raises(OSError, match="too large"):
        save(tmp_path, state(2), token=1)
    assert list(tmp_path.iterdir()) == [older]
    assert load_newest(tmp_path).state.step == 1
    save(tmp_path, state(2), token=1)
    assert load_newest(tmp_path).state.step == 2


def test_i2_a_checkpoint_whose_facts_do_not_fit_does_not_count(tmp_path: Path) -> None:
    """The tensors fit, checkpoint.json does not."""
    older = save(tmp_path, state(1, numbers=1), token=1)
    large = state(2, numbers=1)
    large.extra["settings"] = "x" * 10_000
    with no_file_beyond(9_000), pytest.raises(OSError, match=r"too large.*checkpoint\.json"):
        save(tmp_path, large, token=1)
    assert list(tmp_path.iterdir()) == [older]


def test_i2_saving_again_makes_a_name_durable_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path == tmp_path:
            synced.append(path.name)
            if len(synced) == 1:
                raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path, state(1), token=1)
    save(tmp_path, state(1), token=1)
    assert len(synced) == 2
    assert [found.step for found in list_whole(tmp_path)] == [1]


def test_a_damaged_checkpoint_of_the_same_step_is_said_and_saved_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, state(1), token=1) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    save(tmp_path, state(1), token=1)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.message
    assert "saved anew" in record.message
    assert load_newest(tmp_path).reason == ""


# ---- archive


def test_i2_an_append_that_does_not_fit_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    entries = log(1_000, 200_000, 1_000)
    with Archive(tmp_path, 1) as archive:
        archive.append(entries[:1])
        size = archive.size_bytes
        for _ in range(2):
            with no_file_beyond(size + 70_000), pytest.raises(OSError, match=r"too large.*segment-00000001"):
                archive.append(entries[1:])
            assert (archive.head.sequence, archive.size_bytes) == (1, size)
        assert archive.append(entries[1:]) == 3
    assert list(Archive(tmp_path, None).entries()) == entries


def test_i2_torn_bytes_that_could_not_be_cut_off_are_cut_before_the_next_append(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = log(1_000, 30_000, 200_000)

    def refused(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with Archive(tmp_path, 1) as archive:
        archive.append(entries[:1])
        size = archive.size_bytes
        with monkeypatch.context() as patched, no_file_beyond(size + 70_000):
            patched.setattr(os, "ftruncate", refused)
            with pytest.raises(OSError, match="too large"):
                archive.append(entries[1:])
        assert archive.size_bytes == size + 70_000
        archive.append(entries[1:2])  # which is shorter than what was torn
        assert archive.size_bytes < size + 31_000
        archive.append(entries[2:])
    assert list(Archive(tmp_path, None).entries()) == entries


def test_i2_a_segment_that_is_cut_short_is_said_with_its_name_and_where_the_log_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Archive(tmp_path, 1) as archive:
        archive.append(log(100, 100)[:1])
        archive.append(log(100, 100)[1:])
    (path,) = tmp_path.glob("segment-*")
    path.write_bytes(path.read_bytes()[:-3])
    assert Archive(tmp_path, None).head.sequence == 1
    assert not caplog.records, "to a reader it may be an append that is just being written"
    with Archive(tmp_path, 2) as archive:
        assert archive.head.sequence == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.message
    assert "whole up to entry 1" in record.message
