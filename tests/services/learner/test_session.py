"""Where a learner starts from, what it saves, and that none of it changes what becomes of the run (I3)."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
import torch

from sapo_learner import checkpoint, skips
from sapo_learner.archive import Archive
from sapo_learner.errors import Corrupt, Mismatch, NotFound
from sapo_learner.policy import Policy, tiny_policy, write_policy
from sapo_learner.snapshot import weights_digest
from services.learner.attention import Attention
from services.learner.session import TrainingSession
from services.replay import replay
from services.runtime.settings import RunConfig, dump_config
from services.wire import encode
from tests.recorded import ALPHABET, degenerate_group, entries, random_group
from tests.small_run import run_config

STEPS, GROUPS = 12, 3


class Run:
    """A run's directory with a whole log, and one learner after the other that works on it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.token = directory, 0
        self.config: RunConfig = run_config(
            directory,
            optimizer={"learning_rate": 1e-3, "warmup_steps": 2},
            training={"steps": STEPS, "groups_per_step": GROUPS, "max_policy_age": 20, "microbatch_tokens": 64},
            checkpoint={"every": 2, "keep": 3},
        )
        directory.mkdir(parents=True)
        (directory / "run.yaml").write_text(dump_config(self.config))
        write_policy(tiny_policy(ALPHABET, seed=0), directory / "model")
        made = [degenerate_group(n) if n % 7 == 3 else random_group(n) for n in range(STEPS * GROUPS)]
        with Archive(directory / "archive", 0) as archive:
            archive.append(entries([encode(each) for each in made]))

    @contextmanager
    def session(self, step: int | None = None) -> Iterator[TrainingSession]:
        self.token += 1
        archive_directory = self.directory / "archive"
        with skips.learning(archive_directory), Archive(archive_directory, self.token) as archive:
            session = TrainingSession(self.config, self.base(), archive, self.token)
            session.restore(step)
            yield session

    def base(self) -> Policy:
        return tiny_policy(ALPHABET, seed=0)

    def train(self, *, until: int = STEPS, step: int | None = None, save: bool = True) -> str:
        """One learner's life; without `save` it is as if it were killed at the end. Returns the digest it had."""
        with self.session(step) as session:
            if not save:
                session.save = lambda: None  # type: ignore[method-assign]

            def stop_at(news: object) -> None:
                if session.learner.step_count >= until:
                    session.log.stop()

            session.run(lambda _: None, stop_at)
            return weights_digest(session.learner.policy.tensors())

    @property
    def kept(self) -> list[int]:
        return [found.step for found in checkpoint.list_whole(self.directory / "checkpoints")]


@pytest.fixture(autouse=True)
def arithmetic() -> Iterator[None]:
    """As `sapo serve learner` sets it."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture
def uninterrupted(tmp_path: Path) -> str:
    return Run(tmp_path / "uninterrupted").train()


def test_I3_killed_at_random_points_it_ends_with_the_digest_of_one_that_was_not(run: Run, uninterrupted: str) -> None:
    random = Random(3)
    for _ in range(8):
        run.train(until=random.randint(1, STEPS - 1), save=random.random() < 0.5)
    assert run.train() == uninterrupted


def test_I3_from_the_oldest_kept_checkpoint_the_same_digest_comes_out(run: Run, uninterrupted: str) -> None:
    run.train()
    oldest = min(step for step in run.kept if step)
    assert oldest < STEPS
    assert run.train(step=oldest) == uninterrupted


def test_it_says_which_checkpoint_it_resumes_and_why(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run.train(until=4)
    with run.session():
        pass
    assert "resumed step-00000004-00000001 (the newest that is usable), at step 4 and entry 12" in caplog.text
    with run.session(step=2):
        pass
    assert "resumed step-00000002-00000001 (it was asked for), at step 2 and entry 6" in caplog.text


def test_a_damaged_checkpoint_is_passed_over_and_that_is_said(
    run: Run, uninterrupted: str, caplog: pytest.LogCaptureFixture
) -> None:
    run.train(until=6)
    newest = checkpoint.list_whole(run.directory / "checkpoints")[0]
    content = bytearray((newest.path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest.path / "model.safetensors").write_bytes(content)
    assert run.train() == uninterrupted
    assert "newer checkpoints cannot be used" in caplog.text
    assert newest.path.name in caplog.text


def test_going_back_on_purpose_lasts_although_the_learner_is_killed_at_once(run: Run) -> None:
    run.train(until=8)
    with run.session(step=6):
        pass  # it is killed here
    with run.session() as session:
        assert session.learner.step_count == 6


def test_a_step_that_is_not_kept_is_refused_with_those_that_are(run: Run) -> None:
    run.train(until=8)
    with pytest.raises(NotFound, match=r"no checkpoint of step 3.*steps here: .*4, 6, 8"), run.session(step=3):
        pass


def test_an_entry_that_kills_the_learner_is_named_and_after_it_was_skipped_the_run_ends(run: Run) -> None:
    run.train(until=2)
    for _ in range(3):
        Attention(run.directory / "learner.attention")("decoding", ["1-8"])  # and there it dies
    with pytest.raises(Corrupt, match="sapo skip"), run.session():
        pass
    skips.add(run.directory / "archive", "1-8", "poison")
    run.train()
    with run.session() as session:
        assert session.progress.ledger.skipped == 1
        assert session.progress.step == STEPS
    assert replay(run.directory).digest == weights_digest(session.learner.policy.tensors())


def test_a_learner_that_ended_in_peace_left_no_suspect(run: Run) -> None:
    for until in (1, 2, 3, 4, 5):
        run.train(until=until)
    assert not (run.directory / "learner.attention").read_bytes().strip(b"\0")


# ---- sapo replay


def test_I3_a_replay_ends_with_the_run_s_digest_and_has_compared_what_is_kept(run: Run) -> None:
    digest = run.train()
    report = replay(run.directory)
    assert report.digest == digest
    assert report.bit_exact, report.because
    assert report.step == STEPS
    assert report.checkpoints == sorted(step for step in run.kept if step)


def test_a_replay_may_begin_and_end_anywhere(run: Run) -> None:
    run.train()
    begin = min(step for step in run.kept if step)
    report = replay(run.directory, start=begin, until=begin + 1)
    assert (report.from_step, report.step) == (begin, begin + 1)
    with pytest.raises(NotFound, match="archive ends at step 12"):
        replay(run.directory, until=STEPS + 1)


def test_a_replay_names_the_first_step_that_differs(run: Run) -> None:
    run.train()
    older, newer = sorted(step for step in run.kept if step)[:2]
    states = {found.step: found for found in checkpoint.list_whole(run.directory / "checkpoints")}
    for step in (older, newer):  # altered, and whole
        state = checkpoint.load(states[step].path)
        name = sorted(state.model)[0]
        state.model[name].view(-1)[0] += 1e-4
        checkpoint.save(run.directory / "checkpoints", state, token=run.token + 1)
    with pytest.raises(Mismatch, match=f"step {older}: the replay differs from the run"):
        replay(run.directory)


def test_a_replay_compares_what_was_published(run: Run) -> None:
    run.train()
    line = '{"kind":"policy","time":0,"version":3,"step":5,"digest":"%s"}\n'
    (run.directory / "record.jsonl").write_text(line % ("0" * 64))
    with pytest.raises(Mismatch, match=r"step 5: .*published was 000000000000"):
        replay(run.directory)


def test_a_replay_on_another_machine_compares_to_a_tolerance_and_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.train()
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "another")
    report = replay(run.directory)
    assert not report.bit_exact
    assert "cpu is another" in report.because
    assert report.largest_difference == 0.0, "it is the same machine after all"
