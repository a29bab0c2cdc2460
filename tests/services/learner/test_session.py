"""Where a learner starts from, what it saves, and that none of it changes what becomes of the run (I3)."""

import json
import logging
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from sapo_learner import checkpoint, skips
from sapo_learner.errors import Corrupt, Mismatch, NotFound
from sapo_learner.policy import load_weights
from sapo_learner.probe import sequence_logprobs
from sapo_learner.snapshot import weights_digest
from services.learner.attention import Attention
from services.learner.session import TrainingSession
from services.replay import replay
from services.runtime.settings import RunConfig
from tests.logs import heard
from tests.services.learner.recorded_run import Run

STEPS = 12


pytestmark = pytest.mark.usefixtures("deterministic")


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


# ---- the probe


def test_I4_every_published_version_carries_the_numbers_of_its_weights(run: Run) -> None:
    with run.session() as session:
        published = [session.snapshot()]
        session.run(published.append, lambda _: None)
    assert [each.step for each in published] == list(range(STEPS + 1))
    served = run.base()
    for each in published:
        load_weights(served, each.tensors)
        assert each.probe is not None
        first, *rest = each.probe.token_ids
        assert each.probe.logprobs == tuple(sequence_logprobs(served, [first], rest).tolist())
    assert len({each.probe.token_ids for each in published if each.probe}) == 1
    assert len({each.probe.logprobs for each in published if each.probe}) > STEPS / 2


def test_I3_the_probe_changes_no_bit_of_training(run: Run, uninterrupted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingSession, "snapshot", lambda _: None)
    assert run.train() == uninterrupted


def test_weights_whose_log_probs_are_not_finite_are_not_handed_to_the_publisher(run: Run) -> None:
    with run.session() as session:
        session.learner.policy.head_weight.data.fill_(float("nan"))
        with pytest.raises(Corrupt, match="not published"):
            session.snapshot()


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
        state.model = {name: tensor.clone() for name, tensor in state.model.items()}
        state.model[sorted(state.model)[0]].view(-1)[0] += 1e-4
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


def test_a_replay_of_an_archive_that_was_cut_short_is_no_success(run: Run) -> None:
    run.train()
    (segment,) = [each for each in (run.directory / "archive").glob("segment-*.zst") if each.stat().st_size > 1000]
    with segment.open("r+b") as file:
        file.truncate(segment.stat().st_size - 7)
    with pytest.raises(Corrupt, match=r"the archive ends at step \d+, but the run went to step 12"):
        replay(run.directory)


# ---- what is told


def test_what_became_of_each_group_is_told_by_its_entry(run: Run) -> None:
    with heard() as events:
        run.train(until=2)
    told = [each for each in events if each["logger"] == "services.learner.remarks" and each["level"] == "DEBUG"]
    assert [each["message"] for each in told] == [
        f"entry 1-{n} is {'degenerate' if n == 4 else 'trained'} in step {1 + (n > 3)}" for n in range(1, 7)
    ]
    assert [(each["entry"], each["draw"], each["step"]) for each in told] == [
        (f"1-{n}", n - 1, 1 + (n > 3)) for n in range(1, 7)
    ]


def test_a_weight_of_a_component_that_no_response_has_is_said_once(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    weights = {"estimator": "gdpo", "weights": {"correct": 2.0, "corect": 0.5}}
    run.config = RunConfig.model_validate(run.config.model_dump() | {"advantages": weights})
    run.train(until=3)
    assert [each for each in caplog.messages if each.startswith("advantages.weights")] == [
        "advantages.weights.corect has no effect: no response of step 1 has such a reward component (they have correct)"
    ]


def test_a_step_s_line_says_what_the_step_cost_with_what_followed_it(run: Run) -> None:
    lines: list[dict[str, Any]] = []
    began = time.perf_counter()
    with run.session() as session:
        session.run(lambda _: None, lambda news: lines.append(news.record))
    lasted = time.perf_counter() - began
    assert len(lines) == STEPS
    always = {"read", "decode", "collate", "forward", "loss", "backward", "optimizer", "snapshot", "other"}
    for line in lines:
        saved = {"checkpoint"} if line["step"] % 2 == 0 else set()
        assert set(line["seconds"]) == always | saved
        assert set(line["memory_bytes"]) == set(line["seconds"]) - {"other"}
        assert line["flops_per_second"] > 0
        assert "mfu" not in line, "nobody knows a CPU's peak"
    assert sum(sum(line["seconds"].values()) for line in lines) <= lasted
    json.dumps(lines)
