"""An entry that kills the learner is found out, by processes that really die over it."""

import subprocess
import sys
from pathlib import Path

import pytest

from sapo_learner.errors import Corrupt
from services.learner.attention import DEATHS, PAGE_BYTES, Attention, forget

VICTIM = """
import os, signal, sys
from pathlib import Path
from services.learner.attention import Attention
attend = Attention(Path(sys.argv[1]))
for place in sys.argv[2:]:
    doing, _, entries = place.partition(":")
    attend.done() if doing == "done" else attend(doing, entries.split(","))
os.kill(os.getpid(), signal.SIGKILL)
"""


def die(page: Path, *places: str) -> None:
    """A learner that works through `places` ("doing:id,id" or "done") and is killed."""
    result = subprocess.run([sys.executable, "-c", VICTIM, str(page), *places], capture_output=True, text=True)
    assert result.returncode == -9, result.stderr


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "run" / "attention"


def test_an_entry_that_killed_three_learners_in_a_row_is_named_with_what_removes_it(page: Path) -> None:
    for _ in range(DEATHS):
        die(page, "decoding:1-1", "decoding:1-2")
    for _ in range(2):  # however often it is started then
        with pytest.raises(Corrupt) as raised:
            Attention(page)
        assert "died 3 times while decoding entry 1-2" in str(raised.value)
        assert f"sapo skip {page.parent} 1-2" in raised.value.fix


def test_twice_is_not_enough(page: Path) -> None:
    for _ in range(DEATHS - 1):
        die(page, "decoding:1-2")
    Attention(page)


def test_of_a_microbatch_all_its_entries_are_named(page: Path) -> None:
    for _ in range(DEATHS):
        die(page, "training on:1-4,1-7")
    with pytest.raises(Corrupt, match=r"while training on entry 1-4 \(or one of 1-7\)"):
        Attention(page)


def test_who_gets_past_a_place_acquits_it(page: Path) -> None:
    for _ in range(DEATHS + 1):
        die(page, "decoding:1-1", "done")
        die(page, "decoding:1-1", "decoding:1-2")
        die(page, "decoding:1-1", "decoding:1-3")
    Attention(page)


def test_after_it_was_skipped_the_learner_goes_on(page: Path) -> None:
    for _ in range(DEATHS):
        die(page, "training on:1-4,1-7")
    Attention(page, skips={"1-7": "it is poison"})
    with pytest.raises(Corrupt):
        Attention(page, skips={"1-9": "another"})


@pytest.mark.parametrize("content", [b"", b"\xff" * PAGE_BYTES, b'{"doing": 3', b'{"doing": "x"}', b"[]"])
def test_a_page_that_makes_no_sense_accuses_nobody(page: Path, content: bytes) -> None:
    page.parent.mkdir()
    page.write_bytes(content)
    Attention(page)


def test_another_rank_clears_the_page_that_one_has_open(tmp_path: Path) -> None:
    page = tmp_path / "page"
    forget(page)  # there is none on this machine
    assert not page.exists()
    opened = Attention(page)
    opened("training on", ["1-7"])
    assert b"1-7" in page.read_bytes()
    forget(page)
    assert page.read_bytes() == bytes(PAGE_BYTES)
