"""The plain sampler: a pure function of seed and draw, every problem once per epoch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_learner.errors import ConfigError
from services.control_plane.sampler import PlainSampler, derive_seed
from services.tasks import Problem


def problems(count: int) -> list[Problem]:
    return [Problem(f"p{index}", f"{index}?", str(index)) for index in range(count)]


@given(count=st.integers(1, 40), seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
@settings(deadline=None)
def test_every_problem_comes_exactly_once_per_epoch(count: int, seed: int, epoch: int) -> None:
    sampler = PlainSampler(problems(count), seed)
    draws = [sampler.draw(number) for number in range(epoch * count, (epoch + 1) * count)]
    assert sorted(each.problem.id for each in draws) == sorted(each.id for each in problems(count))
    assert {each.epoch for each in draws} == {epoch}


def test_the_same_draw_is_the_same_problem_and_seed_whatever_was_asked_before() -> None:
    one, other = PlainSampler(problems(7), 5), PlainSampler(problems(7), 5)
    forwards = [one.draw(number) for number in range(40)]
    backwards = [other.draw(number) for number in reversed(range(40))]
    assert forwards == backwards[::-1]


def test_epochs_and_runs_come_in_different_orders() -> None:
    sampler = PlainSampler(problems(50), 0)
    first, second = ([sampler.draw(start + n).problem.id for n in range(50)] for start in (0, 50))
    assert first != second
    assert first != [PlainSampler(problems(50), 1).draw(n).problem.id for n in range(50)]


def test_no_two_draws_share_a_seed_and_no_two_runs_do() -> None:
    seeds = {PlainSampler(problems(3), run).draw(number).seed for run in range(4) for number in range(500)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_depend_on_every_part_in_its_place() -> None:
    assert len({derive_seed(0, 2, 1), derive_seed(0, 1, 2), derive_seed(1, 2, 0), derive_seed(0, 2, 1, 0)}) >= 3


def test_a_task_without_training_problems_is_refused() -> None:
    with pytest.raises(ConfigError, match="no training problem"):
        PlainSampler([], 0)
