"""Processes of different versions: an older worker and a newer ingest, the reverse, a learner between them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sapo_learner import formats
from sapo_learner.errors import ConfigError, InvalidTrajectory, Mismatch
from sapo_learner.formats import Format
from services import evaluation_files
from services.wire import decode, encode
from tests.small_run import Running, group

OLDEST, NEWEST = 2, 4
VERSIONS = pytest.mark.parametrize("version", range(OLDEST - 1, NEWEST + 2))
Use = Callable[[str, int, int], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    def changed(name: str, oldest: int, newest: int) -> None:
        monkeypatch.setattr(formats, name, Format(getattr(formats, name).name, oldest, newest))

    return changed


@VERSIONS
def test_an_entry_of_the_log(use: Use, version: int) -> None:
    """A learner that does not read it must not count it among the malformed ones: nothing would train on it, ever."""
    use("WIRE", version, version)
    data = encode(group(schema_version=version))
    use("WIRE", OLDEST, NEWEST)
    if OLDEST <= version <= NEWEST:
        assert decode(data).schema_version == version
        return
    with pytest.raises(Mismatch, match=f"draw 0: schema version {version}, this sapo reads 2 to 4"):
        decode(data)
    with pytest.raises(InvalidTrajectory, match=f"schema version {version}, this sapo reads 2 to 4"):
        group(schema_version=version)


@VERSIONS
def test_a_file_of_an_evaluation(tmp_path: Path, use: Use, version: int) -> None:
    use("EVALUATION", version, version)
    evaluation_files.write(tmp_path / "one.jsonl", [evaluation_files.header(policy="p")])
    use("EVALUATION", OLDEST, NEWEST)
    if OLDEST <= version <= NEWEST:
        assert evaluation_files.read(tmp_path / "one.jsonl")[0]["format"] == version
        return
    with pytest.raises(Mismatch, match=rf"one.jsonl: evaluation file format {version}, this sapo reads 2 to 4"):
        evaluation_files.read(tmp_path / "one.jsonl")


async def test_settings_that_an_older_process_does_not_know_are_named(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = running.config.model_dump(mode="json")
    newer["training"]["momentum_of_tomorrow"] = 0.5

    async def answer(*_: Any, **__: Any) -> Any:
        return newer

    monkeypatch.setattr(running.client, "_json", answer)
    with pytest.raises(ConfigError, match=r"unknown key 'training.momentum_of_tomorrow'.*versions that know"):
        await running.client.config()


async def test_a_manifest_of_a_newer_control_plane_is_refused_with_the_range(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(*_: Any, **__: Any) -> Any:
        return {"format": 9, "step": 0, "whatever": json.loads("{}")}

    monkeypatch.setattr(running.client, "_json", answer)
    with pytest.raises(ConfigError, match="manifest format 9, this sapo reads 1: upgrade"):
        await running.client.manifest()
