"""Groups as they were trained: kept as files, the newest of them, whatever the disk does."""

from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from sapo_learner.errors import ConfigError, NotFound
from services.control_plane.dashboard.groups import KeptGroups
from services.runtime.api import ShownGroup
from tests.shown_group import shown_group
from tests.small_run import TOKEN, Running


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_newest_are_kept_and_listed_first(tmp_path: Path) -> None:
    groups = KeptGroups(tmp_path, kept=2)
    for entry in ("1-9", "1-10", "2-3"):
        groups.keep(shown_group(entry))
    assert [row["entry"] for row in groups.rows()] == ["2-3", "1-10"]
    assert names(tmp_path) == {"1-10.json", "2-3.json"}


def test_no_more_bytes_are_kept_than_allowed(tmp_path: Path) -> None:
    KeptGroups(tmp_path / "one").keep(shown_group("1-1"))
    size = (tmp_path / "one" / "1-1.json").stat().st_size
    groups = KeptGroups(tmp_path / "few", kept_bytes=int(2.5 * size))
    for entry in ("1-1", "1-2", "1-3", "1-4"):
        groups.keep(shown_group(entry))
    assert names(tmp_path / "few") == {"1-3.json", "1-4.json"}


def test_a_group_that_is_trained_again_replaces_its_first_figures(tmp_path: Path) -> None:
    groups = KeptGroups(tmp_path)
    for step in (3, 4):
        groups.keep(shown_group("1-1", step=step))
    assert [(row["entry"], row["step"]) for row in groups.rows()] == [("1-1", 4)]


def test_they_are_there_after_a_restart_but_for_one_that_cannot_be_read(tmp_path: Path) -> None:
    first = KeptGroups(tmp_path)
    for entry in ("1-9", "1-10"):
        first.keep(shown_group(entry))
    (tmp_path / "1-11.json").write_text('{"entry": "1-')
    (tmp_path / "1-12.tmp").write_text("torn")
    again = KeptGroups(tmp_path)
    assert again.rows() == first.rows()


def test_a_row_tells_what_a_list_shows(tmp_path: Path) -> None:
    groups = KeptGroups(tmp_path)
    groups.keep(shown_group("1-1", responses=3, tokens=3))
    (row,) = groups.rows()
    assert (row["rewards"], row["tokens"], row["task"]) == ([0.0, 1.0, 0.0], 9, "arithmetic")
    assert row["weight_mean"] == pytest.approx((1 + 1 / 4) / 2)


def test_a_full_disk_is_said_once_and_fails_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "groups").write_text("a file where the directory should be")
    groups = KeptGroups(tmp_path / "groups")
    for entry in ("1-1", "1-2"):
        groups.keep(shown_group(entry))
    assert groups.rows() == []
    assert caplog.text.count("groups are not kept") == 1


@pytest.mark.parametrize("entry", ["../1-1", "1-1/..", "", "1", "1-1.json", "1-１", "1-1\n", "..", "-", "a-b"])
def test_only_entries_are_names_of_files(tmp_path: Path, entry: str) -> None:
    groups = KeptGroups(tmp_path)
    with pytest.raises(ConfigError, match="is no entry"):
        groups.file(entry)
    with pytest.raises(ValidationError):
        shown_group(entry)


def test_a_group_that_is_not_kept_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="group 1-1 is not kept"):
        KeptGroups(tmp_path).file("1-1")


def test_columns_of_different_lengths_are_refused() -> None:
    group = shown_group().model_dump()
    group["responses"][0]["tokens"]["ratio"].pop()
    with pytest.raises(ValidationError, match="different lengths"):
        ShownGroup.model_validate(group)


async def test_the_learner_posts_one_and_the_page_reads_it(running: Running) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=running.url, headers=headers, timeout=5) as http:
        body = shown_group("1-57").model_dump_json()
        assert (await http.post("/v1/groups", content=body)).status_code == 200
        assert [row["entry"] for row in (await http.get("/v1/groups")).json()] == ["1-57"]
        answer = await http.get("/v1/groups/1-57")
        assert ShownGroup.model_validate(answer.json()) == shown_group("1-57")
        for path in ("/v1/groups/..%2frun.yaml", "/v1/groups/%2e%2e%2frecord.jsonl", "/v1/groups/1-58"):
            assert (await http.get(path)).status_code in (404, 422)
        assert (await http.post("/v1/groups", content=b'{"entry": "1-1"}')).status_code == 422
    assert "groups" not in running.plane.record.recent
