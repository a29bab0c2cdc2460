"""Pruning: only whole segments that nobody needs go, and what recovery and the ledger need of them stays (I1, I6)."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from sapo_learner import pruned
from sapo_learner.archive import GENESIS, Archive, Entry, Head, link
from sapo_learner.errors import Corrupt, Fenced, NotFound
from sapo_learner.segment import names

SMALL = 200  # bytes: a header and two or three entries


def log(count: int, *, after: Entry | None = None, generation: int = 1) -> list[Entry]:
    """Groups, and every fifth entry a control entry. Draws come in pairs, the later one first."""
    chain, start = (after.chain, after.sequence) if after else (GENESIS, 0)
    entries = []
    for sequence in range(start + 1, start + count + 1):
        kind, draw = ("config", -1) if sequence % 5 == 0 else ("group", sequence ^ 1)
        payload = f"{sequence} of {generation}".encode() * 2
        chain = link(chain, f"{generation}-{sequence}", kind, sha256(payload).hexdigest())
        entries.append(Entry(generation, sequence, kind, draw, chain, payload))
    return entries


def write(directory: Path, entries: list[Entry], *, token: int = 1) -> None:
    with Archive(directory, token, SMALL) as archive:
        for entry in entries:
            archive.append([entry])


def draws(entries: list[Entry]) -> list[int]:
    return sorted(entry.draw for entry in entries if entry.draw >= 0)


def assert_means(archive: Archive, entries: list[Entry]) -> None:
    """The archive is that of `entries`, whatever was pruned."""
    begin = archive.pruned.head.sequence
    assert list(archive.entries(begin)) == entries[begin:]
    assert archive.head == entries[-1].position
    assert sorted(archive.draws()) == draws(entries)
    assert archive.controls == sum(entry.draw < 0 for entry in entries)
    assert [archive.chain_at(each.sequence) for each in entries[begin:]] == [each.chain for each in entries[begin:]]
    assert archive.pruned.head == (entries[begin - 1].position if begin else Head())


@pytest.mark.parametrize("through", [0, 1, 4, 5, 6, 7, 9, 11, 12, 99])
def test_i6_what_is_pruned_is_gone_and_all_else_is_as_it_was(tmp_path: Path, through: int) -> None:
    entries = log(13)
    write(tmp_path, entries[:6])
    with Archive(tmp_path, 2, SMALL) as archive:
        for entry in entries[6:12]:
            archive.append([entry])
        before, newest = archive.size_bytes, names(tmp_path)[-1]
        needed = [segment for segment in archive.segments() if segment.last is None or segment.last > through]
        freed = archive.prune(through)
        assert freed == before - archive.size_bytes
        assert [each.name for each in archive.segments()] == sorted({*(each.name for each in needed), newest})
        assert archive.pruned.head.sequence <= through
        assert_means(archive, entries[:12])
        assert archive.prune(through) == 0
        archive.append(entries[8:])
        assert_means(archive, entries)
    for token in (None, 2, 3):
        archive = Archive(tmp_path, token, SMALL)
        assert_means(archive, entries)
        archive.close()


def test_what_is_pruned_cannot_be_read_and_the_message_says_so(tmp_path: Path) -> None:
    entries = log(12)
    write(tmp_path, entries)
    archive = Archive(tmp_path, None)
    assert archive.prune(7) > 0
    begin = archive.pruned.head
    assert begin.sequence > 1
    words = rf"pruned up to entry 1-{begin.sequence} .*checkpoint whose cursor is {begin.sequence} or later"
    with pytest.raises(NotFound, match=words):
        archive.read(begin.sequence - 1, 1)
    with pytest.raises(NotFound, match=words):
        list(archive.entries())
    assert archive.chain_at(begin.sequence - 1) is None
    assert archive.chain_at(0) is None
    assert archive.read(begin.sequence, 1) == [entries[begin.sequence]]


def test_draws_take_little_room(tmp_path: Path) -> None:
    write(tmp_path, log(40))
    archive = Archive(tmp_path, None)
    assert archive.prune(20) > 0
    assert archive.prune(38) > 0
    assert len(archive.pruned.ranges) < 12  # one per control entry, where a draw is missing, and one at the end


def test_entries_repeated_from_before_are_no_ops_unless_they_differ(tmp_path: Path) -> None:
    entries = log(12)
    write(tmp_path, entries)
    with Archive(tmp_path, 2) as archive:
        archive.prune(7)
        assert archive.append(entries) == 12
        begin = archive.pruned.head.sequence
        other = log(begin, generation=2)[-1]
        with pytest.raises(Corrupt, match="differs from the archived"):
            archive.append([other])


# ---- crashes


def each_moment(monkeypatch: pytest.MonkeyPatch, directory: Path, copies: Path) -> Callable[[], list[Path]]:
    """Copies of the directory as a crash would leave it before each change that a prune makes."""
    made: list[Path] = []

    def before(change: Callable[..., object]) -> Callable[..., object]:
        def changed(*args: object, **options: object) -> object:
            made.append(copies / str(len(made)))
            shutil.copytree(directory, made[-1])
            return change(*args, **options)

        return changed

    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, before(getattr(owner, name)))
    return lambda: made


@pytest.mark.parametrize("branches", [False, True])
def test_i1_a_prune_killed_at_any_point_leaves_an_archive_that_means_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, branches: bool
) -> None:
    """branches: the first writer's segments hold entries, over several files, that a newer one overruled."""
    directory, entries = tmp_path / "archive", log(14)
    write(directory, entries[: 12 if branches else 4])
    _, second, *others = Archive(directory, None).segments()
    aside = [each.path for each in others]
    if branches:
        fork = second.last or 0
        entries = entries[:fork] + log(14 - fork, after=entries[fork - 1], generation=2)
        for path in aside:  # so that the newer writer begins in the middle, and they are found behind its back
            path.rename(path.with_suffix(".aside"))
    write(directory, entries[:10], token=2)
    if branches:
        for path in aside:
            path.with_suffix(".aside").rename(path)
    write(directory, entries, token=3)
    archive = Archive(directory, None)
    moments = each_moment(monkeypatch, directory, tmp_path / "copies")
    assert archive.prune(9) > 0
    monkeypatch.undo()
    assert len(moments()) >= 5
    left = names(directory)
    for copy in moments():
        assert_means(Archive(copy, None), entries)
        with Archive(copy, 4, SMALL) as writer:
            assert names(copy)[0] >= writer.pruned.first, "leftovers are tidied up"
            assert_means(writer, entries)
            writer.prune(9)
            assert_means(writer, entries)
            assert names(copy)[:-1] == left
        assert_means(Archive(copy, None), entries)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", None])
def test_a_damaged_record_is_corrupt_not_ignored(tmp_path: Path, damage: bytes | None) -> None:
    write(tmp_path, log(12))
    Archive(tmp_path, None).prune(9)
    path = tmp_path / pruned.FILE
    path.write_bytes(path.read_bytes().replace(b'"controls": 1', b'"controls": 0') if damage is None else damage)
    with pytest.raises(Corrupt, match=r"pruned\.json"):
        Archive(tmp_path, None)
    path.unlink()
    with pytest.raises(Corrupt, match="does not follow 0-0"):
        Archive(tmp_path, None)


def test_a_full_disk_prunes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = log(12)
    write(tmp_path, entries)
    archive, before = Archive(tmp_path, None), sorted(tmp_path.iterdir())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*pruned"):
        archive.prune(9)
    monkeypatch.undo()
    assert sorted(tmp_path.iterdir()) == before
    assert_means(archive, entries)
    assert archive.prune(9) > 0


def test_i1_a_draw_accepted_twice_is_not_pruned_away(tmp_path: Path) -> None:
    entries = log(9)
    again = Entry(1, 10, "group", entries[0].draw, "", b"again")
    digest = sha256(again.payload).hexdigest()
    again = Entry(1, 10, "group", again.draw, link(entries[-1].chain, again.id, again.kind, digest), again.payload)
    write(tmp_path, [*entries, again, *log(4, after=again)])
    archive, before = Archive(tmp_path, None), names(tmp_path)
    with pytest.raises(Corrupt, match=f"draw {again.draw} was accepted twice"):
        archive.prune(12)
    assert names(tmp_path) == before


# ---- beside others


def test_i7_an_older_writer_prunes_nothing(tmp_path: Path) -> None:
    write(tmp_path, log(9))
    with Archive(tmp_path, 1, SMALL) as older:
        write(tmp_path, log(12), token=2)
        before = names(tmp_path)
        with pytest.raises(Fenced):
            older.prune(9)
        assert names(tmp_path) == before


@pytest.mark.parametrize("seen", [0, 5, 12])
def test_a_reader_is_told_and_goes_on_after_refresh(tmp_path: Path, seen: int) -> None:
    """seen: how far it had read the log before the writer went on and pruned."""
    entries = log(12)
    write(tmp_path, entries[:seen])
    reader = Archive(tmp_path, None)
    with Archive(tmp_path, 2, SMALL) as writer:
        for entry in entries[seen:]:
            writer.append([entry])
        writer.prune(9)
        if seen:
            with pytest.raises(NotFound, match="was pruned up to entry"):
                list(reader.entries())
        reader.refresh()
        assert_means(reader, entries)


def test_a_reader_that_meets_a_prune_while_it_opens_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = log(12)
    write(tmp_path, entries)
    real = pruned.read
    reads: list[Path] = []

    def prunes_after_the_first(directory: Path) -> pruned.Pruned:
        found = real(directory)
        reads.append(directory)
        if len(reads) == 1:
            monkeypatch.setattr(pruned, "read", real)
            Archive(tmp_path, None).prune(9)
        return found

    monkeypatch.setattr(pruned, "read", prunes_after_the_first)
    archive = Archive(tmp_path, None)
    assert archive.pruned.head.sequence > 0
    assert_means(archive, entries)


def test_appending_reading_and_pruning_at_once(tmp_path: Path) -> None:
    entries, cursor = log(150), 0
    with Archive(tmp_path, 1, SMALL) as archive, ThreadPoolExecutor(2) as pool:

        def train() -> None:
            """Read on from the cursor, in order, and prune behind it."""
            nonlocal cursor
            while cursor < len(entries):
                assert archive.wait(cursor, timeout=30)
                read = archive.read(cursor, 7)
                assert read == entries[cursor : cursor + len(read)]
                cursor += len(read)
                archive.prune(cursor - 20)

        def recover() -> None:
            """What a rebuild asks for, again and again."""
            while cursor < len(entries):
                before = archive.head.sequence
                found = sorted(archive.draws())
                assert found == draws([each for each in entries if each.draw in set(found)])
                assert len(found) >= len(draws(entries[:before]))

        work = [pool.submit(train), pool.submit(recover)]
        for entry in entries:
            archive.append([entry])
        for each in work:
            each.result(60)
        assert archive.pruned.head.sequence > 100
        assert_means(archive, entries)
    assert_means(Archive(tmp_path, None), entries)
