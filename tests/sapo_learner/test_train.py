"""The loop over the log: every entry gets one outcome (I1), and the same log gives the same weights (I3)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sapo_learner import checkpoint
from sapo_learner.archive import GENESIS
from sapo_learner.config import LearnerSettings, ObjectiveSettings
from sapo_learner.errors import Corrupt
from sapo_learner.learner import Learner
from sapo_learner.ledger import Ledger, Outcome
from sapo_learner.policy import tiny_policy
from sapo_learner.resume import capture, restore
from sapo_learner.snapshot import weights_digest
from sapo_learner.train import Position, StepReport, train
from sapo_learner.trajectory import TrajectoryGroup
from services.wire import decode, encode
from tests.recorded import ALPHABET, RecordedLog, degenerate_group, group, random_group, response

torch.set_num_threads(1)
STEPS, GROUPS = 5, 3
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def settings_of(objective: str = "sapo", **training: Any) -> LearnerSettings:
    data = {
        "objective": {"name": objective},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "schedule": "cosine", "weight_decay": 0.01},
        "training": {"steps": STEPS, "groups_per_step": GROUPS, "microbatch_tokens": 64, **training},
    }
    return LearnerSettings.model_validate(data)


def payloads(count: int = STEPS * GROUPS) -> list[bytes]:
    """Groups that a run would have: one step old at most, now and then without signal, once unreadable."""
    made = []
    for index in range(count):
        step = max(0, index // GROUPS - 1)
        make = degenerate_group if index % 5 == 4 else random_group
        made.append(b"rubbish" if index == 7 else encode(make(index, policy_step=step)))
    return made


class Run:
    """A learner and its position, as a learner process holds them."""

    def __init__(self, settings: LearnerSettings, *, seed: int = 0) -> None:
        self.settings = settings
        self.learner = Learner(tiny_policy(ALPHABET, seed=seed), settings, temperature=1.0)
        self.position = Position()

    def steps(self, log: RecordedLog, count: int | None = None) -> list[StepReport]:
        """Train on, for `count` more steps or as long as there is something."""
        reports = []
        for report in train(self.learner, log, self.position, decode=decode):
            reports.append(report)
            if len(reports) == count:
                break
        return reports

    def digest(self) -> tuple[str, str]:
        return weights_digest(self.learner.policy.tensors()), weights_digest(self.learner.optimizer_tensors())

    def save(self, directory: Path) -> Path:
        return checkpoint.save(directory, capture(self.learner, self.position), token=1)

    def load(self, path: Path) -> None:
        self.position = restore(self.learner, checkpoint.load(path), where=str(path))


def one_step(groups: Sequence[TrajectoryGroup | bytes], **training: Any) -> tuple[Run, StepReport]:
    run = Run(settings_of(groups_per_step=len(groups), **training))
    (report,) = run.steps(RecordedLog([each if isinstance(each, bytes) else encode(each) for each in groups]), 1)
    return run, report


def counts(**named: int) -> dict[str, int]:
    return dict.fromkeys(("trained", "degenerate", "stale", "invalid", "refused", "skipped"), 0) | named


# ---- Steps and the log


def test_a_step_takes_exactly_the_next_entries_whatever_becomes_of_them():
    log, run = RecordedLog(payloads()), Run(settings_of())
    reports = run.steps(log)
    assert log.asked == [(step * GROUPS, GROUPS) for step in range(STEPS)]
    assert [report.update.step for report in reports] == [1, 2, 3, 4, 5]
    assert [report.cursor for report in reports] == [3, 6, 9, 12, 15]
    assert run.position.chain == log.entries[-1].chain


def test_the_log_says_stop():
    log, run = RecordedLog(payloads(2 * GROUPS + 1)), Run(settings_of())
    assert [report.update.step for report in run.steps(log)] == [1, 2]
    assert run.position.cursor == 2 * GROUPS  # entries of an incomplete step are not consumed
    assert run.learner.step_count == 2


def test_a_finished_run_reads_nothing():
    log, run = RecordedLog(payloads()), Run(settings_of())
    run.learner.step_count = STEPS
    assert run.steps(log) == []
    assert log.asked == []
    assert run.position == Position(0, GENESIS, Ledger())


def test_the_position_is_moved_before_the_report_comes():
    log, run = RecordedLog(payloads()), Run(settings_of())
    for report in train(run.learner, log, run.position, decode=decode):
        assert (run.position.cursor, run.position.ledger.consumed) == (report.cursor, report.cursor)
        assert run.position.chain == log.entries[report.cursor - 1].chain


# ---- Outcomes


def test_what_became_of_each_entry_is_told_by_its_id():
    log, run = RecordedLog(payloads()), Run(settings_of())
    fates = {}
    for report in run.steps(log):
        assert [report.outcomes[fate] for fate in Outcome] == [Counter(report.fates.values())[fate] for fate in Outcome]
        assert [group.draw for group in report.groups] == [
            entry.draw for entry in log.entries if entry.id in report.entries
        ]
        fates |= report.fates
    assert fates.keys() == {entry.id for entry in log.entries}
    other = {log.entries[7].id: "invalid"} | {log.entries[index].id: "degenerate" for index in (4, 9, 14)}
    assert {entry: fate.value for entry, fate in fates.items() if fate != "trained"} == other


def test_a_trace_changes_nothing_in_training():
    traced = [encode(replace(decode(each), traceparent=TRACE)) if each != b"rubbish" else each for each in payloads()]
    assert traced != payloads()
    runs = []
    for log in (payloads(), traced):
        runs.append(Run(settings_of()))
        runs[-1].steps(RecordedLog(log))
    assert runs[0].digest() == runs[1].digest()
    assert runs[0].position.ledger == runs[1].position.ledger


def test_i1_every_entry_gets_one_outcome_and_they_sum_to_the_cursor():
    log, run = RecordedLog(payloads()), Run(settings_of())
    for report in run.steps(log):
        assert sum(report.outcomes.values()) == GROUPS
    ledger = run.position.ledger
    assert ledger.consumed == run.position.cursor == STEPS * GROUPS
    assert (ledger.trained, ledger.degenerate, ledger.invalid, ledger.stale, ledger.refused) == (11, 3, 1, 0, 0)


def test_trained_and_degenerate():
    run, report = one_step([random_group(0), degenerate_group(1), random_group(2)])
    assert report.outcomes == counts(trained=2, degenerate=1)
    assert run.position.ledger == Ledger(trained=2, degenerate=1)
    assert [each.draw for each in report.groups] == [0, 1, 2]
    assert report.reward == pytest.approx(sum(each.reward for one in report.groups for each in one.trajectories) / 10)
    assert [bool(values.any()) for values in report.advantages] == [True, False, True]
    assert report.update.applied


def test_a_step_of_degenerate_groups_counts_and_leaves_the_weights():
    fresh = Run(settings_of()).digest()
    run, report = one_step([degenerate_group(0), degenerate_group(1)])
    assert report.outcomes == counts(degenerate=2)
    assert (report.update.applied, report.update.refusal, run.learner.step_count) == (False, "", 1)
    assert run.digest() == fresh


def test_a_group_whose_difference_was_not_sampled_is_degenerate():
    silent = group([response([5, 6], reward=reward, mask=[False, False]) for reward in (0.0, 1.0)])
    _, report = one_step([silent, degenerate_group(1)])
    assert report.outcomes == counts(degenerate=2)


def test_an_unreadable_entry_is_invalid_named_and_costs_only_itself():
    wrong = encode(random_group(1))[:-3]
    run, report = one_step([encode(random_group(0)), wrong, b""])
    assert report.outcomes == counts(trained=1, invalid=2)
    assert report.invalid.keys() == {"1-2", "1-3"}
    assert all(report.invalid.values())
    assert [each.draw for each in report.groups] == [0]
    alone = Run(settings_of(groups_per_step=1))
    alone.steps(RecordedLog([encode(random_group(0))]), 1)
    assert run.digest() == alone.digest()


def test_a_group_beyond_the_age_limit_is_stale_and_not_trained():
    run = Run(settings_of(groups_per_step=2, max_policy_age=1))
    groups = [random_group(index, policy_step=step) for index, step in enumerate([0, 0, 0, 0, 0, 1])]
    first, second, third = run.steps(RecordedLog([encode(each) for each in groups]), 3)
    assert first.outcomes == second.outcomes == counts(trained=2)
    assert second.update.policy_age_max == 1  # exactly at the limit
    assert third.outcomes == counts(trained=1, stale=1)
    assert [each.draw for each in third.groups] == [5]
    assert third.update.policy_age_max == 1
    assert run.position.ledger.consumed == run.position.cursor == 6


def test_one_token_beyond_the_age_limit_makes_its_group_stale():
    mixed = group([response([5, 6], reward=1.0, steps=[0, 2]), response([7], reward=0.0, steps=2)])
    run = Run(settings_of(groups_per_step=1, max_policy_age=1))
    run.learner.step_count = 2
    (report,) = run.steps(RecordedLog([encode(mixed)]), 1)
    assert report.outcomes == counts(stale=1)
    assert not report.update.applied


def test_a_refused_update_is_charged_to_the_groups_that_would_have_trained():
    run = Run(settings_of())
    before = run.digest()
    hook = run.learner.policy.head_weight.register_hook(lambda gradient: gradient * float("nan"))
    log = RecordedLog([encode(random_group(0)), encode(degenerate_group(1)), b"rubbish", *payloads()[3:]])
    (refused,) = run.steps(log, 1)
    assert refused.outcomes == counts(refused=1, degenerate=1, invalid=1)
    assert "not finite" in refused.update.refusal
    assert run.digest() == before
    hook.remove()
    assert run.steps(log, 1)[0].update.applied  # the run goes on
    assert run.position.ledger.consumed == run.position.cursor == 2 * GROUPS


# ---- Same log, same weights


@pytest.mark.parametrize("objective", ["sapo", "grpo"])
@pytest.mark.parametrize("stop", [0, 1, 2, 4])
def test_i3_a_run_that_stopped_and_resumed_ends_with_the_weights_of_one_that_did_not(objective, stop, tmp_path):
    whole = Run(settings_of(objective))
    whole.steps(RecordedLog(payloads()))
    stopped = Run(settings_of(objective))
    if stop:
        stopped.steps(RecordedLog(payloads()), stop)
    path = stopped.save(tmp_path)
    stopped.steps(RecordedLog(payloads()), 1)  # work that the crash loses
    resumed = Run(settings_of(objective), seed=99)
    resumed.load(path)
    reports = resumed.steps(RecordedLog(payloads()))
    assert [report.update.step for report in reports] == list(range(stop + 1, STEPS + 1))
    assert resumed.digest() == whole.digest()
    assert resumed.position == whole.position


def test_i3_the_same_log_gives_the_same_weights_and_another_log_others():
    runs = [Run(settings_of()) for _ in range(3)]
    logs = [payloads(), payloads(), [*payloads()[:-2], encode(random_group(77, policy_step=3)), payloads()[-1]]]
    for run, log in zip(runs, logs, strict=True):
        run.steps(RecordedLog(log))
    assert runs[0].digest() == runs[1].digest() != runs[2].digest()


def test_another_objective_reads_the_same_log_to_other_weights():
    runs = {name: Run(settings_of(name)) for name in ("sapo", "grpo", "gspo")}
    for run in runs.values():
        run.steps(RecordedLog(payloads()))
    assert len({run.digest()[0] for run in runs.values()}) == 3
    assert all(run.position == runs["sapo"].position for run in runs.values())


def test_a_config_entry_changes_the_settings_of_the_step_it_lies_in_and_of_all_after(tmp_path):
    """The same wherever training was stopped meanwhile: a replay obeys it at the same place."""
    changed = settings_of().model_copy(update={"objective": ObjectiveSettings(name="grpo", clip_low=0.1)})
    groups = payloads()
    at = 2 * GROUPS + 1  # among the groups of the third step
    log = RecordedLog([*groups[:at], changed, *groups[at:]])
    whole = Run(settings_of())
    steps = train(whole.learner, log, whole.position, decode=decode)
    names = [whole.learner.settings.objective.name for _ in steps]
    assert names == ["sapo"] * 2 + ["grpo"] * (STEPS - 2)
    assert whole.position.cursor == len(log.entries)
    assert whole.position.ledger.control == 1
    assert whole.position.ledger.consumed == whole.position.cursor
    unchanged = Run(settings_of())
    unchanged.steps(RecordedLog(groups))
    assert whole.digest() != unchanged.digest()
    for stop in (1, 2, 3):
        first = Run(settings_of())
        first.steps(log, stop)
        second = Run(first.learner.settings, seed=9)
        second.load(first.save(tmp_path / str(stop)))
        second.steps(log)
        assert second.digest() == whole.digest(), f"stopped after step {stop}"


def test_a_config_entry_prolongs_a_run_that_was_complete():
    longer = settings_of(steps=STEPS + 1)
    groups = payloads((STEPS + 1) * GROUPS)
    log = RecordedLog([*groups[: STEPS * GROUPS], longer, *groups[STEPS * GROUPS :]])
    run = Run(settings_of())
    assert len(run.steps(log)) == STEPS + 1


def test_an_entry_of_an_unknown_kind_stops_training_with_its_name():
    log = RecordedLog(payloads())
    log.entries[1] = replace(log.entries[1], kind="riddle")
    with pytest.raises(Corrupt, match="entry 1-2 is of kind 'riddle'"):
        Run(settings_of()).steps(log)


def test_I1_a_skipped_entry_counts_towards_its_step_and_is_not_trained_on() -> None:
    log = RecordedLog(payloads())
    run, whole = Run(settings_of()), Run(settings_of())
    skipped = {log.next(1, 1)[0].id: "poison"}  # type: ignore[index]
    attended: list[str] = []
    steps = train(
        run.learner, log, run.position, decode=decode, skips=skipped, attend=lambda doing, ids: attended.extend(ids)
    )
    first = next(steps)
    assert first.outcomes["skipped"] == 1
    assert sum(first.outcomes.values()) == GROUPS
    assert not skipped.keys() & set(attended), "nobody looks at it again"
    list(steps)
    whole.steps(log)
    assert run.position.ledger.consumed == whole.position.ledger.consumed
    assert run.digest() != whole.digest()


def test_what_the_learner_works_on_is_told_before_it_is_done() -> None:
    log = RecordedLog([encode(random_group(index)) for index in range(GROUPS)])
    run = Run(settings_of())
    told: list[tuple[str, list[str]]] = []

    def attend(doing: str, ids: Sequence[str]) -> None:
        told.append((doing, list(ids)))

    def decoding(payload: bytes) -> TrajectoryGroup:
        assert told[-1][0] == "decoding"
        return decode(payload)

    next(train(run.learner, log, run.position, decode=decoding, attend=attend))
    ids = [entry.id for entry in log.next(0, GROUPS) or []]
    assert [named for _, named in told[:GROUPS]] == [[each] for each in ids]
    assert {each for doing, named in told if doing == "training on" for each in named} == set(ids)


@pytest.mark.parametrize("groups_before", [0, 1, GROUPS, 2 * GROUPS + 1])
def test_a_complete_run_goes_on_however_far_behind_lies_the_entry_that_prolongs_it(groups_before: int) -> None:
    """Sampling may have gone on before the learner wrote it; and no state of a run may be one that nobody can leave."""
    total = (STEPS + 4) * GROUPS
    made: list[bytes | LearnerSettings] = list(payloads(total))
    made.insert(STEPS * GROUPS + groups_before, settings_of(steps=STEPS + 4))
    run, unaware = Run(settings_of()), Run(settings_of())
    unaware.steps(RecordedLog(made[: STEPS * GROUPS + groups_before]))
    assert unaware.learner.step_count == STEPS, "without the entry it is complete"
    assert len(run.steps(RecordedLog(made))) == STEPS + 4
    unaware.steps(RecordedLog(made))
    assert unaware.digest() == run.digest()
    assert run.position.ledger.consumed == total + 1
