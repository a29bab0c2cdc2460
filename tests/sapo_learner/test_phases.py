"""What a step costs: every phase is there, and together they are the wall time."""

import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch

from sapo_learner import reference
from sapo_learner.config import LearnerSettings
from sapo_learner.learner import Learner
from sapo_learner.phases import OTHER, Costs, Phases
from sapo_learner.policy import tiny_policy
from sapo_learner.train import Position, StepReport, train
from services.wire import decode, encode
from tests.recorded import ALPHABET, RecordedLog, degenerate_group, random_group

CPU = torch.device("cpu")
OF_A_STEP = {"read", "decode", "collate", "forward", "loss", "backward", "optimizer", OTHER}


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def learner_of(**sections: Any) -> Learner:
    data = {"training": {"steps": 4, "groups_per_step": 3, "microbatch_tokens": 32}, **sections}
    return Learner(tiny_policy(ALPHABET, seed=0), LearnerSettings.model_validate(data), temperature=1.0)


def steps(learner: Learner, log: RecordedLog) -> Iterator[StepReport]:
    return train(learner, log, Position(), decode=decode)


def recorded(groups: int = 12) -> RecordedLog:
    return RecordedLog([encode(random_group(draw)) for draw in range(groups)])


def test_a_phase_within_another_takes_its_time_from_that_one() -> None:
    clock = Clock()
    phases = Phases(CPU, clock)
    clock.now = 1.0
    with phases("loss"):
        clock.now = 3.0
        with phases("forward"):
            clock.now = 7.0
        clock.now = 8.0
    clock.now = 8.5
    with phases("loss"):
        clock.now = 9.5
    assert phases.taken().seconds == {OTHER: 1.5, "loss": 4.0, "forward": 4.0}
    clock.now = 10.0
    assert phases.taken().seconds == {OTHER: 0.5}, "what was taken once is not said again"


def test_an_error_ends_its_phase() -> None:
    clock = Clock()
    phases = Phases(CPU, clock)

    def fail() -> None:
        with phases("forward"):
            clock.now = 2.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.now = 3.0
    assert phases.taken().seconds == {OTHER: 1.0, "forward": 2.0}


def test_costs_add_up_and_of_memory_the_most_counts() -> None:
    one, other = Costs({"a": 1.0}, {"a": 5, "b": 1}), Costs({"a": 2.0, "c": 1.0}, {"a": 3, "b": 2})
    assert one + other == Costs({"a": 3.0, "c": 1.0}, {"a": 5, "b": 2})


def test_the_phases_of_a_step_are_named_and_add_up_to_its_wall_time() -> None:
    learner = learner_of()
    running = steps(learner, recorded())
    next(running)
    for _ in range(3):
        started = time.perf_counter()
        learner.phases.taken()
        update = next(running).update
        after = learner.phases.taken()
        wall = time.perf_counter() - started
        assert set(update.seconds) == OF_A_STEP
        assert all(each > 0 for each in update.seconds.values())
        assert 0.8 * wall <= sum(update.seconds.values()) + sum(after.seconds.values()) <= wall
        assert update.seconds[OTHER] < wall / 2, "most of it is in a phase that has a name"
        assert set(update.memory_bytes) == OF_A_STEP - {OTHER}
        assert all(each > 1 << 20 for each in update.memory_bytes.values())


def test_work_is_attributed_to_the_phase_that_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of the model, and every gradient through it, lasts a second; nothing else takes time."""
    clock, learner = Clock(), learner_of(reference={"kl_coefficient": 0.1})
    learner.phases = Phases(CPU, clock)
    monkeypatch.setattr(reference, "load", lambda *_: tiny_policy(ALPHABET, seed=1))
    passes = count()

    def forward(*arguments: Any, inner: Any = learner._forward) -> Any:
        clock.now += 1
        next(passes)
        found = inner(*arguments)
        if found[0].requires_grad:
            found[0].register_hook(lambda _: setattr(clock, "now", clock.now + 10))
        return found

    monkeypatch.setattr(learner, "_forward", forward)
    seconds = next(steps(learner, recorded())).update.seconds
    microbatches = next(passes) // 2
    assert microbatches > 1
    assert seconds["forward"] == 2 * microbatches  # the policy's, and the reference policy's
    assert seconds["backward"] == 10 * microbatches
    assert sum(seconds.values()) == 12 * microbatches


def test_a_step_without_signal_costs_time_and_no_flops() -> None:
    log = RecordedLog([encode(degenerate_group(draw)) for draw in range(3)])
    update = next(steps(learner_of(), log)).update
    assert {"read", "decode", "collate"} < set(update.seconds)
    assert update.flops_per_second is None
    assert update.mfu is None


def test_where_no_peak_is_known_there_are_flops_per_second_and_no_mfu() -> None:
    update = next(steps(learner_of(), recorded())).update
    busy = sum(update.seconds[each] for each in ("forward", "loss", "backward", "optimizer"))
    assert update.slowest_rank_seconds == pytest.approx(busy)
    assert update.flops_per_second is not None
    assert update.flops_per_second > 0
    assert update.mfu is None
