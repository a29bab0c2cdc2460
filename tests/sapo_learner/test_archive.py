"""The archive: what append() returned for is there after any crash (I2), and only the newest writer counts (I7)."""

import errno
import os
import queue
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from hashlib import sha1, sha256
from pathlib import Path

import pytest
import zstandard

from sapo_learner.archive import GENESIS, Archive, Entry, Head, link, newest_token
from sapo_learner.errors import Corrupt, Fenced
from sapo_learner.segment import FrameIndex, Name, names, next_frame


def log(count: int, *, after: Entry | None = None, generation: int = 1, salt: str = "") -> list[Entry]:
    """`count` entries that continue `after`, or begin a log."""
    chain, start = (after.chain, after.sequence) if after else (GENESIS, 0)
    entries = []
    for sequence in range(start + 1, start + count + 1):
        payload = f"{salt}{sequence}".encode() * 3
        chain = link(chain, f"{generation}-{sequence}", "group", sha256(payload).hexdigest())
        entries.append(Entry(generation, sequence, "group", sequence * 10, chain, payload))
    return entries


def write(directory: Path, appends: Iterable[list[Entry]], *, token: int = 1) -> Path:
    """Append each list as one frame; the segment's path."""
    with Archive(directory, token) as archive:
        for entries in appends:
            archive.append(entries)
    return directory / f"segment-{token:08d}-000001.zst"


def held(directory: Path) -> list[Entry]:
    return list(Archive(directory, None).entries())


def frame_starts(path: Path) -> list[int]:
    """Offsets of a segment's frames, with its size behind them."""
    blob, starts = path.read_bytes(), [0]
    while starts[-1] < len(blob):
        decoder = zstandard.ZstdDecompressor().decompressobj()
        decoder.decompress(blob[starts[-1] :])
        starts.append(len(blob) - len(decoder.unused_data))
    return starts


# ---- the format


def test_link_is_what_a_redis_script_computes():
    digest = sha256(b"payload").hexdigest()
    assert link(GENESIS, "1-1", "group", digest) == sha1(f"{GENESIS}\n1-1\ngroup\n{digest}".encode()).hexdigest()


def test_empty_archive_stands_at_genesis(tmp_path):
    assert Archive(tmp_path / "not there yet", None).head == Head(0, 0, GENESIS)
    with Archive(tmp_path, 1) as archive:
        assert archive.head == Head(0, 0, GENESIS)
        assert archive.read(0, 10) == []
        assert archive.append([]) == 0


def test_reading_gives_back_what_was_appended_across_frames_and_segments(tmp_path):
    entries = log(10)
    write(tmp_path, [entries[:3], entries[3:4]])
    with Archive(tmp_path, 2) as archive:
        assert archive.append(entries[4:]) == 10
        assert archive.head == Head(1, 10, entries[-1].chain)
        assert [archive.read(after, 4) for after in range(11)] == [entries[after : after + 4] for after in range(11)]
        assert archive.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert held(tmp_path) == entries
    assert (entries[2].id, entries[2].draw) == ("1-3", 30)


def test_one_append_is_one_frame_with_checksum_and_size(tmp_path):
    entries = log(5)
    path = write(tmp_path, [entries[:4], entries[4:]])
    starts = frame_starts(path)
    assert len(starts) == 4  # header, two appends, end
    for start in starts[:-1]:
        frame = zstandard.get_frame_parameters(path.read_bytes()[start:])
        assert frame.has_checksum
        assert frame.content_size > 0


def test_index_stays_small():
    index = FrameIndex()
    for first in range(1, 1001):
        index.push(first, Name(1, 1), first * 100, 100)
    assert sum(column.itemsize * len(column) for column in index._columns()) == 40 * 1000
    assert index.find(1000) == (Name(1, 1), 100_000, 100, None)
    assert index.find(1) == (Name(1, 1), 100, 100, 2)


# ---- what may be appended (I2: no entry twice, none left out)


def test_i2_repeated_entries_are_no_ops(tmp_path):
    entries = log(6)
    with Archive(tmp_path, 1) as archive:
        archive.append(entries[:4])
        size = archive.size_bytes
        assert archive.append(entries[1:3]) == 4
        assert archive.size_bytes == size
        assert archive.append(entries) == 6
    assert held(tmp_path) == entries


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda e: [e[5]], id="gap"),
        pytest.param(lambda e: [e[4], e[6]], id="gap within"),
        pytest.param(lambda e: [e[5], e[4]], id="order"),
        pytest.param(lambda e: [e[4], e[4]], id="twice within"),
        pytest.param(lambda e: [replace(e[0], sequence=0)], id="sequence 0"),
        pytest.param(lambda e: [replace(e[4], chain="f" * 40)], id="wrong chain"),
        pytest.param(lambda e: [replace(e[4], payload=b"other")], id="altered payload"),
        pytest.param(lambda e: [replace(e[4], kind="end")], id="altered kind"),
        pytest.param(lambda e: [replace(e[4], generation=2)], id="altered generation"),
        pytest.param(lambda e: log(5, salt="other")[4:], id="another log"),
        pytest.param(lambda e: log(4, salt="other"), id="another log, repeated"),
    ],
)
def test_i2_what_does_not_continue_the_log_is_refused_whole(tmp_path, wrong: Callable[[list[Entry]], list[Entry]]):
    entries = log(8)
    with Archive(tmp_path, 1) as archive:
        archive.append(entries[:4])
        size = archive.size_bytes
        with pytest.raises(Corrupt):
            archive.append(wrong(entries))
        assert (archive.head.sequence, archive.size_bytes) == (4, size)
        assert archive.append(entries[4:]) == 8
    assert held(tmp_path) == entries


def test_reading_only_cannot_append(tmp_path):
    with pytest.raises(RuntimeError, match="reading only"):
        Archive(tmp_path, None).append(log(1))


# ---- crashes and damage


def test_i2_a_tail_torn_at_any_byte_is_cut_and_read_again(tmp_path):
    entries = log(7)
    path = write(tmp_path, [entries[:3], entries[3:5], entries[5:]])
    whole, (*_, last, end) = path.read_bytes(), frame_starts(path)
    for at in range(last, end):
        path.write_bytes(whole[:at])
        assert held(tmp_path) == entries[:5]
        with Archive(tmp_path, 1) as archive:
            assert archive.head.sequence == 5
            assert path.stat().st_size == last
            assert archive.append(entries[3:]) == 7
        assert path.read_bytes() == whole


@pytest.mark.parametrize("tail", [b"\0" * 100, b"\xff" * 7, zstandard.FRAME_HEADER, zstandard.FRAME_HEADER * 5])
def test_i2_garbage_after_the_last_frame_is_a_torn_tail(tmp_path, tail: bytes):
    entries = log(4)
    path = write(tmp_path, [entries[:3]])
    path.write_bytes(path.read_bytes() + tail)
    with Archive(tmp_path, 1) as archive:
        archive.append(entries)
    assert held(tmp_path) == entries


def test_i2_a_torn_tail_of_an_older_segment_is_ignored_not_cut(tmp_path):
    entries = log(6)
    path = write(tmp_path, [entries[:3], entries[3:]])
    path.write_bytes(torn := path.read_bytes()[:-2])
    write(tmp_path, [entries[3:]], token=2)
    assert path.read_bytes() == torn
    assert held(tmp_path) == entries


def test_i2_damage_before_the_tail_is_corrupt_and_nothing_is_cut(tmp_path):
    entries = log(7)
    path = write(tmp_path, [entries[:3], entries[3:5], entries[5:]])
    whole, (_, _, start, stop, _) = path.read_bytes(), frame_starts(path)
    for at in range(start, stop):  # every byte, so also those that say how long the frame is
        damaged = bytearray(whole)
        damaged[at] ^= 0x41
        path.write_bytes(damaged)
        with pytest.raises(Corrupt, match=rf"segment-00000001-000001.zst: damaged at byte {start} .*restore the file"):
            Archive(tmp_path, 1)
        assert path.read_bytes() == damaged


@pytest.mark.parametrize("chunk", range(1, 9))
def test_i2_damage_is_told_from_a_torn_tail_wherever_reads_are_split(tmp_path, monkeypatch, chunk: int):
    monkeypatch.setattr("sapo_learner.segment._CHUNK", chunk)
    entries = log(4)
    path = write(tmp_path, [entries[:2], entries[2:]])
    assert held(tmp_path) == entries
    blob = bytearray(path.read_bytes())
    blob[frame_starts(path)[1]] ^= 1
    path.write_bytes(blob)
    with pytest.raises(Corrupt, match="damaged at byte"):
        Archive(tmp_path, None)


def test_i2_a_frame_that_is_missing_is_corrupt(tmp_path):
    entries = log(7)
    path = write(tmp_path, [entries[:3], entries[3:5], entries[5:]])
    whole, (_, _, start, stop, _) = path.read_bytes(), frame_starts(path)
    path.write_bytes(whole[:start] + whole[stop:])
    with pytest.raises(Corrupt, match="1-6 does not follow 1-3"):
        Archive(tmp_path, None)


def test_a_segment_of_something_else_is_refused(tmp_path):
    path = write(tmp_path, [log(2)])
    path.rename(tmp_path / "segment-00000003-000001.zst")
    with pytest.raises(Corrupt, match="not a sapo-archive-2 segment 1 of token 3"):
        Archive(tmp_path, None)
    (tmp_path / "segment-00000003-000001.zst").write_bytes(zstandard.ZstdCompressor().compress(b"hello"))
    with pytest.raises(Corrupt, match="not a frame of archive records"):
        Archive(tmp_path, None)


def test_damage_after_opening_is_corrupt_when_read(tmp_path):
    path = write(tmp_path, [log(2)])
    archive = Archive(tmp_path, None)
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    archive._held._frame = None
    with pytest.raises(Corrupt, match="restore the file"):
        archive.read(0, 1)


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_i2_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, call: str):
    entries = log(6)
    real = {"pwrite": os.pwrite, "fsync": os.fsync}[call]

    def full(*args):
        if call == "pwrite" and args[2] > full.start:  # the first half fits, the second does not
            raise OSError(errno.ENOSPC, "No space left on device")
        if call == "fsync":
            raise OSError(errno.ENOSPC, "No space left on device")
        descriptor, data, offset = args
        return real(descriptor, data[: len(data) // 2], offset)

    with Archive(tmp_path, 1) as archive:
        archive.append(entries[:2])
        full.start = archive.size_bytes
        monkeypatch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            archive.append(entries[2:])
        monkeypatch.undo()
        assert (archive.head.sequence, archive.size_bytes) == (2, full.start)
        assert held(tmp_path) == entries[:2]
        assert archive.append(entries[2:]) == 6
    assert held(tmp_path) == entries


def test_i2_append_returns_only_after_fsync_of_the_bytes_and_of_a_new_segments_name(tmp_path, monkeypatch):
    events = []
    real = {"pwrite": os.pwrite, "fsync": os.fsync}

    def note(name):
        def call(descriptor, *rest):
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            events.append((name, "directory" if path == tmp_path else path.name))
            return real[name](descriptor, *rest)

        return call

    for name in real:
        monkeypatch.setattr(os, name, note(name))
    segment = "segment-00000001-000001.zst"
    with Archive(tmp_path, 1) as archive:
        assert events[-1] == ("fsync", "directory")
        events.clear()
        archive.append(log(2))
        assert events == [("pwrite", segment), ("fsync", segment)]


APPEND_FOR_EVER = """
import sys
from pathlib import Path
from tests_log import log
from sapo_learner.archive import Archive
directory, token = Path(sys.argv[1]), int(sys.argv[2])
archive = Archive(directory, token, segment_bytes=300)
entries = log(400)
while archive.head.sequence < 400:
    after = archive.head.sequence
    print(archive.append(entries[after : after + 1 + after % 3]), flush=True)
"""


def test_i2_kill_9_at_any_moment_keeps_what_append_returned(tmp_path):
    (tmp_path / "tests_log.py").write_text(Path(__file__).read_text())
    archive, promised, rng = tmp_path / "archive", 0, random.Random(0)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    for token in (1, 1, 2, 3):
        command = [sys.executable, "-c", APPEND_FOR_EVER, str(archive), str(token)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(rng.randrange(5, 25)):
            promised = max(promised, int(process.stdout.readline()))
        process.send_signal(signal.SIGKILL)
        returned = process.stdout.read().split("\n")[:-1]  # printed between our last look and the kill
        promised = max([promised, *map(int, returned)])
        process.wait(10)
        assert len(held(archive)) >= promised
    assert held(archive) == log(400)[: len(held(archive))]
    assert promised > 20


# ---- one writer at a time (I7)


def test_i7_an_older_token_is_refused_at_opening_and_at_its_next_append(tmp_path):
    entries = log(6)
    older = Archive(tmp_path, 1)
    older.append(entries[:2])
    with Archive(tmp_path, 2) as newer:
        with pytest.raises(Fenced, match="token 2"):
            older.append(entries[2:])
        with pytest.raises(Fenced, match="ours is 1"):
            Archive(tmp_path, 1)
        newer.append(entries[2:])
    older.close()
    assert held(tmp_path) == entries


def _written_behind_the_back(directory: Path, entries: list[Entry], token: int) -> None:
    """As a replaced writer would that looked for newer segments just before they came."""
    newer = [path for path in directory.glob("segment-*.zst") if int(path.stem[8:16]) > token]
    aside = [path.rename(path.with_suffix(".aside")) for path in newer]
    write(directory, [entries], token=token)
    for path in aside:
        path.rename(path.with_suffix(".zst"))


def test_i7_two_writers_of_the_same_entries_make_one_log(tmp_path):
    entries = log(9)
    write(tmp_path, [entries[:4]])
    write(tmp_path, [entries[4:6]], token=2)
    _written_behind_the_back(tmp_path, entries[4:8], token=1)
    assert held(tmp_path) == entries[:8]
    write(tmp_path, [entries], token=3)
    assert held(tmp_path) == entries


@pytest.mark.parametrize("frames", [[(4, 9)], [(4, 5), (5, 9)], [(4, 6), (6, 9)]])
def test_i7_where_two_writers_differ_the_newest_wins(tmp_path, frames: list[tuple[int, int]]):
    """Redis was lost behind the older writer's back: generation 2 goes on from entry 5."""
    entries = log(9)
    rebuilt = entries[:5] + log(3, after=entries[4], generation=2)
    write(tmp_path, [entries[:4]])
    reader = Archive(tmp_path, None)
    write(tmp_path, [rebuilt[4:7], rebuilt[7:]], token=2)
    for start, stop in frames:
        _written_behind_the_back(tmp_path, entries[start:stop], token=1)
    with Archive(tmp_path, 3) as archive:
        assert list(archive.entries()) == rebuilt
        assert archive.read(3, 3) == rebuilt[3:6]
        assert archive.head == Head(2, 8, rebuilt[-1].chain)
    reader.refresh()
    assert list(reader.entries()) == rebuilt


def test_i7_a_reader_that_saw_the_older_branch_steps_back(tmp_path):
    entries = log(9)
    write(tmp_path, [entries])
    reader = Archive(tmp_path, None)
    assert reader.head.sequence == 9
    (tmp_path / "segment-00000001-000001.zst").rename(tmp_path / "aside")
    rebuilt = [*entries[:5], *log(2, after=entries[4], generation=2)]
    write(tmp_path, [rebuilt], token=2)
    (tmp_path / "aside").rename(tmp_path / "segment-00000001-000001.zst")
    reader.refresh()
    assert list(reader.entries()) == rebuilt


def test_i7_a_reader_that_saw_the_newer_segment_ignores_what_the_older_writer_adds(tmp_path):
    entries = log(9)
    rebuilt = entries[:5] + log(1, after=entries[4], generation=2)
    write(tmp_path, [entries[:4]])
    write(tmp_path, [rebuilt[4:]], token=2)
    reader = Archive(tmp_path, None)
    _written_behind_the_back(tmp_path, entries[4:], token=1)
    reader.refresh()
    assert list(reader.entries()) == rebuilt


# ---- readers beside the writer


def test_a_reader_process_sees_appends_after_refresh(tmp_path):
    entries = log(6)
    reader = Archive(tmp_path, None)
    for token in (1, 2, 3):
        with Archive(tmp_path, token) as writer:
            for entry in entries[2 * token - 2 : 2 * token]:
                writer.append([entry])
                reader.refresh()
                assert reader.head == writer.head
    assert list(reader.entries()) == entries


def test_a_reader_that_meets_a_frame_in_the_middle_of_its_write_does_not_call_it_damage(tmp_path, monkeypatch):
    entries = log(6)
    path = write(tmp_path, [entries[:2], entries[2:4], entries[4:]])
    whole, (_, _, start, _, _) = path.read_bytes(), frame_starts(path)
    path.write_bytes(whole[: start + 9])

    def the_writer_goes_on(path: Path, damaged: int) -> int | None:
        path.write_bytes(whole)
        return next_frame(path, damaged)

    monkeypatch.setattr("sapo_learner.held.next_frame", the_writer_goes_on)
    reader = Archive(tmp_path, None)
    assert reader.head.sequence == 2
    reader.refresh()
    assert list(reader.entries()) == entries


def test_wait_returns_when_another_thread_appends(tmp_path):
    entries = log(20)
    seen: queue.Queue[list[Entry]] = queue.Queue()
    with Archive(tmp_path, 1) as archive:

        def follow() -> None:
            after = 0
            while after < len(entries) and archive.wait(after, timeout=60):
                seen.put(archive.read(after, limit=4))
                after += 1

        reader = threading.Thread(target=follow, daemon=True)
        reader.start()
        for entry in entries:  # one by one, so that the reader always waits for the next
            archive.append([entry])
            assert seen.get(timeout=10) == [entry]
        reader.join(10)
        assert not archive.wait(20, timeout=0)


def test_wait_ends_when_the_archive_closes(tmp_path):
    archive = Archive(tmp_path, 1)
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(archive.wait(0, timeout=30)))
    waiting.start()
    archive.close()
    waiting.join(10)
    assert answers == [False]


# ---- segments of bounded size

SMALL = 150  # bytes: a header and two entries


def rolled(directory: Path, entries: list[Entry], *, token: int = 1) -> list[Path]:
    """Append one by one to small segments; their paths."""
    with Archive(directory, token, SMALL) as archive:
        for entry in entries:
            archive.append([entry])
    return [name.path(directory) for name in names(directory)]


def test_i6_a_full_segment_is_followed_by_the_next(tmp_path):
    entries = log(12)
    paths = rolled(tmp_path, entries[:10])
    assert [path.name for path in paths] == [f"segment-00000001-{n:06d}.zst" for n in range(1, len(paths) + 1)]
    assert len(paths) > 3
    assert all(path.stat().st_size >= SMALL for path in paths[:-1])
    assert held(tmp_path) == entries[:10]
    assert rolled(tmp_path, entries[10:11])[: len(paths)] == paths  # reopened: goes on in the last
    rolled(tmp_path, entries[11:], token=2)
    assert names(tmp_path)[-1] == Name(2, 1)
    archive = Archive(tmp_path, None)
    assert list(archive.entries()) == entries
    whole = [segment for segment in archive.segments() if segment.first]
    assert [segment.first for segment in whole] == [1, *(segment.last + 1 for segment in whole[:-1])]
    assert (whole[-1].last, archive.size_bytes) == (12, sum(path.stat().st_size for path in tmp_path.iterdir()))
    assert (newest_token(tmp_path), newest_token(tmp_path / "none")) == (2, 0)


def test_i2_a_crash_while_a_segment_begins_loses_nothing(tmp_path):
    entries = log(8)
    *_, last = rolled(tmp_path, entries)
    whole = last.read_bytes()
    for at in range(len(whole)):
        last.write_bytes(whole[:at])
        kept = len(held(tmp_path))
        assert held(tmp_path) == entries[:kept]
        assert kept >= 6
    for at in range(0, len(whole), 7):
        last.write_bytes(whole[:at])
        rolled(tmp_path, entries)
        assert held(tmp_path) == entries


@pytest.mark.parametrize("cut", [1, 40, None])
def test_i2_a_segment_cut_short_that_is_not_its_writers_last_is_corrupt(tmp_path, cut: int | None):
    paths = rolled(tmp_path, log(10))
    rolled(tmp_path, log(11), token=2)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: frame_starts(paths[1])[-2] if cut is None else len(whole) - cut])
    with pytest.raises(Corrupt):
        Archive(tmp_path, 3)


def test_i2_whatever_is_torn_before_the_next_segment_is_corrupt(tmp_path):
    first, *_ = rolled(tmp_path, log(5))
    first.write_bytes(first.read_bytes() + b"half a frame")
    with pytest.raises(Corrupt, match=r"damaged at byte .* with whole entries in the next segment"):
        Archive(tmp_path, None)


def test_i2_what_a_failed_append_left_is_cut_before_the_next_segment_begins(tmp_path):
    entries = log(6)
    with Archive(tmp_path, 1, 40) as archive:
        archive.append(entries[:3])
        full = names(tmp_path)[-1].path(tmp_path)
        whole = full.read_bytes()
        full.write_bytes(whole + b"half a frame")
        archive.append(entries[3:])
    assert full.read_bytes() == whole
    assert held(tmp_path) == entries


def test_i2_a_segment_that_cannot_begin_is_tried_again(tmp_path):
    entries = log(4)
    with Archive(tmp_path, 1, 40) as archive:
        archive.append(entries[:2])
        following = Name(1, names(tmp_path)[-1].number + 1).path(tmp_path)
        following.mkdir()  # in its way
        for _ in range(2):
            with pytest.raises(OSError, match=following.name):
                archive.append(entries[2:])
        assert archive.head.sequence == 2
        following.rmdir()
        archive.append(entries[2:])
    assert held(tmp_path) == entries


def test_i7_of_two_writers_with_several_segments_the_newest_wins(tmp_path):
    entries = log(9)
    rebuilt = entries[:4] + log(6, after=entries[3], generation=2)
    rolled(tmp_path, entries[:4])
    rolled(tmp_path, rebuilt[4:], token=2)
    newer = [name.path(tmp_path) for name in names(tmp_path) if name.token == 2]
    newer = [path.rename(path.with_suffix(".aside")) for path in newer]
    rolled(tmp_path, entries[4:])  # behind the back
    for path in newer:
        path.rename(path.with_suffix(".zst"))
    assert list(Archive(tmp_path, None).entries()) == rebuilt


def test_i7_an_older_writer_is_refused_as_soon_as_the_newer_one_reads(tmp_path, monkeypatch):
    """Else the older one could append, or prune, what the newer one has already looked for."""
    older = Archive(tmp_path, 1)

    def late(path: Path) -> object:
        with pytest.raises(Fenced):
            older.append(log(1))
        return read(path)

    from sapo_learner import pruned

    read = pruned.read
    monkeypatch.setattr(pruned, "read", late)
    Archive(tmp_path, 2).close()
    monkeypatch.undo()
    older.close()
    assert held(tmp_path) == []
