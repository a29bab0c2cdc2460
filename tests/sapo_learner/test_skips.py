"""Entries taken out of training: who may do it, and that a replay does it, too."""

import multiprocessing
from pathlib import Path

import pytest

from sapo_learner import skips
from sapo_learner.errors import Corrupt, Unavailable


def test_skips_are_kept_with_their_reasons(tmp_path: Path) -> None:
    assert skips.read(tmp_path) == {}
    skips.add(tmp_path, "1-3", "it kills the learner")
    skips.add(tmp_path, "1-9", "so does this")
    assert skips.read(tmp_path) == {"1-3": "it kills the learner", "1-9": "so does this"}


def test_nothing_is_skipped_while_a_learner_runs(tmp_path: Path) -> None:
    refused = pytest.raises(Unavailable, match="a learner runs on this archive")
    with skips.learning(tmp_path), skips.learning(tmp_path), refused:  # two learners: the newest fences the other
        skips.add(tmp_path, "1-3", "")
    skips.add(tmp_path, "1-3", "")


def _learn_for_ever(directory: Path, started: "multiprocessing.synchronize.Event") -> None:
    with skips.learning(directory):
        started.set()
        multiprocessing.Event().wait()


def test_a_learner_that_was_killed_runs_no_longer(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=_learn_for_ever, args=(tmp_path, started))
    process.start()
    assert started.wait(30)
    with pytest.raises(Unavailable):
        skips.add(tmp_path, "1-3", "")
    process.kill()
    process.join()
    skips.add(tmp_path, "1-3", "")


@pytest.mark.parametrize("line", ["{", "[]", '{"entry": "1-3"}', '"text"'])
def test_a_broken_record_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    skips.add(tmp_path, "1-3", "")
    with (tmp_path / skips.FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(Corrupt, match=r"skips\.jsonl:2"):
        skips.read(tmp_path)
