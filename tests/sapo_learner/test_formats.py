"""Files of another version: read inside the range, refused with the range outside, and never taken for damaged ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sapo_learner import archive, checkpoint, formats, pruned
from sapo_learner.archive import Archive
from sapo_learner.errors import ConfigError, Corrupt, Mismatch, SapoError
from sapo_learner.formats import Format
from sapo_learner.manifest import Manifest
from sapo_learner.pruned import Pruned
from sapo_learner.segment import encode
from sapo_learner.snapshot import write_snapshot
from tests.sapo_learner.archived import log, write
from tests.sapo_learner.test_checkpoint import state
from tests.small_run import snapshot_files, snapshot_manifest

OLDEST, NEWEST = 2, 4
Use = Callable[[str, int, int], None]
VERSIONS = pytest.mark.parametrize("version", range(OLDEST - 1, NEWEST + 2))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """From here on the format reads oldest to newest, and writes the newest."""

    def changed(name: str, oldest: int, newest: int) -> None:
        monkeypatch.setattr(formats, name, Format(getattr(formats, name).name, oldest, newest))
        monkeypatch.setattr(archive, "FORMAT", f"sapo-archive-{formats.ARCHIVE.newest}")

    return changed


def told(read: Callable[[], object], version: int, place: str, kind: type[SapoError] = Mismatch) -> None:
    """Inside the range it is read; outside the refusal names the file, its version, the range, and what to do."""
    if OLDEST <= version <= NEWEST:
        read()
        return
    with pytest.raises(SapoError) as caught:
        read()
    assert type(caught.value) is kind
    assert place in caught.value.where
    assert f"format {version}, this sapo reads {OLDEST} to {NEWEST}" in caught.value.what
    assert ("upgrade whatever reads it" if version > NEWEST else "use the sapo that wrote it") in str(caught.value)


@VERSIONS
def test_a_checkpoint(tmp_path: Path, use: Use, version: int) -> None:
    use("CHECKPOINT", version, version)
    checkpoint.save(tmp_path, state(1), token=1)
    use("CHECKPOINT", OLDEST, NEWEST)
    told(lambda: checkpoint.load_newest(tmp_path), version, "checkpoint.json")
    told(lambda: checkpoint.cursor_of(tmp_path / "step-00000001-00000001"), version, "checkpoint.json")


def test_a_checkpoint_of_a_newer_version_is_not_passed_over_for_an_older_one(tmp_path: Path, use: Use) -> None:
    """Steps would be done again by a learner that somebody has put back, behind everybody's back."""
    checkpoint.save(tmp_path, state(1), token=1)
    use("CHECKPOINT", 1, 2)
    checkpoint.save(tmp_path, state(2), token=1)
    use("CHECKPOINT", 1, 1)
    with pytest.raises(Mismatch, match="checkpoint format 2, this sapo reads 1"):
        checkpoint.load_newest(tmp_path)
    path = tmp_path / "step-00000002-00000001" / "checkpoint.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))  # which nobody wrote
    assert checkpoint.load_newest(tmp_path).found.step == 1


@VERSIONS
def test_an_archive(tmp_path: Path, use: Use, version: int) -> None:
    use("ARCHIVE", version, version)
    entries = log(3)
    path = write(tmp_path, [entries])
    use("ARCHIVE", OLDEST, NEWEST)
    told(lambda: Archive(tmp_path, None), version, path.name)
    told(lambda: Archive(tmp_path, 2), version, path.name)
    if OLDEST <= version <= NEWEST:
        assert list(Archive(tmp_path, None).entries()) == entries


@pytest.mark.parametrize("header", ["sapo-archive-", "sapo-archive-x", "sapo-archive-02x", "other-2", 2, None])
def test_what_never_was_an_archive_is_damaged_and_of_no_version(tmp_path: Path, header: object) -> None:
    (tmp_path / "segment-00000001-000001.zst").write_bytes(encode([[header, 1, 1]]))
    with pytest.raises(Corrupt, match="not a sapo-archive-2 segment"):
        Archive(tmp_path, None)


@VERSIONS
def test_what_was_pruned(tmp_path: Path, use: Use, version: int) -> None:
    use("PRUNED", version, version)
    pruned.write(tmp_path, Pruned(controls=3))
    use("PRUNED", OLDEST, NEWEST)
    told(lambda: pruned.read(tmp_path), version, "pruned.json")


@VERSIONS
def test_a_manifest_and_the_snapshot_that_it_names(use: Use, version: int) -> None:
    facts = json.loads(snapshot_manifest(0, snapshot_files("any")).to_json()) | {"format": version}
    use("MANIFEST", OLDEST, NEWEST)
    if version > NEWEST:
        facts["compression"] = "of a kind that is not known yet"  # the range is said, not this
    told(lambda: Manifest.from_json(json.dumps(facts), where="00000007.json"), version, "00000007.json", ConfigError)


def test_a_manifest_without_a_version_is_of_the_first(use: Use) -> None:
    facts = json.loads(snapshot_manifest(0, snapshot_files("any")).to_json())
    del facts["format"]
    assert Manifest.from_json(json.dumps(facts)).format == 1
    use("MANIFEST", OLDEST, NEWEST)
    told(lambda: Manifest.from_json(json.dumps(facts), where="it"), 1, "it", ConfigError)


def test_a_snapshot_is_written_in_the_newest(tmp_path: Path, use: Use) -> None:
    use("MANIFEST", 1, 3)
    assert write_snapshot({"w": torch.ones(2)}, directory=tmp_path, step=0, dtype="float32", files={}).format == 3
