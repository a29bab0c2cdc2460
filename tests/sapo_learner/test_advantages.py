"""Group advantages against the formula in plain python, and the groups that must give exactly nothing."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_learner.advantages import group_advantages, has_signal
from sapo_learner.config import AdvantageSettings
from sapo_learner.errors import InvalidTrajectory

quick = settings(max_examples=60, deadline=None)
rewards = st.lists(st.floats(-10, 10).map(lambda r: round(r, 3)), min_size=2, max_size=9)


def advantages_of(values: list[float], **options: object) -> list[float]:
    return group_advantages(values, AdvantageSettings.model_validate(options)).tolist()


@pytest.mark.parametrize("std", ["population", "sample", "none"])
@quick
@given(values=rewards.filter(lambda values: len(set(values)) > 1))
def test_formula(std: str, values: list[float]) -> None:
    spread = {"population": statistics.pstdev, "sample": statistics.stdev}
    divisor = spread[std](values) + 1e-3 if std != "none" else 1.0
    mean = statistics.fmean(values)
    expected = [(r - mean) / divisor for r in values]
    assert advantages_of(values, std=std, eps=1e-3) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_one_success_of_three() -> None:
    assert advantages_of([1, 0, 0], eps=1e-15) == pytest.approx([math.sqrt(2), -math.sqrt(0.5), -math.sqrt(0.5)])
    assert advantages_of([1, 0, 0], std="none") == pytest.approx([2 / 3, -1 / 3, -1 / 3])


@pytest.mark.parametrize("std", ["population", "sample", "none"])
@pytest.mark.parametrize(
    "values", [[0.7], [0.0, 0.0], [0.1] * 3, [0.1 + 0.2, 0.3, 0.3], [-1e6, -1e6 + 1e-9], [1e-20] * 5]
)
def test_nothing_to_compare_is_exactly_zero(values: list[float], std: str) -> None:
    """0.1 * 3 / 3 is not 0.1, and 0.1 + 0.2 is not 0.3: divided by eps, that would be an advantage."""
    assert advantages_of(values, std=std) == [0.0] * len(values)
    assert not has_signal(group_advantages(np.array(values), AdvantageSettings(std=std)))


def test_small_differences_count() -> None:
    """A spread far below the rewards, but above their rounding, is signal."""
    assert advantages_of([1.0, 1.0 + 1e-6], eps=1e-12) == pytest.approx([-1, 1], rel=1e-4)
    assert has_signal(group_advantages(np.array([1e-20, 3e-20]), AdvantageSettings()))


@quick
@given(values=rewards, shift=st.integers(-5, 5), scale=st.sampled_from([0.5, 2.0, 8.0]))
def test_shift_scale_and_order(values: list[float], shift: int, scale: float) -> None:
    base = advantages_of(values, eps=1e-12)
    assert sum(base) == pytest.approx(0, abs=1e-9)
    assert advantages_of([scale * r + shift for r in values], eps=1e-12) == pytest.approx(base, rel=1e-6, abs=1e-9)
    assert advantages_of(values[::-1], eps=1e-12) == pytest.approx(base[::-1], rel=1e-9, abs=1e-12)


def test_the_rewards_are_not_touched() -> None:
    values = np.array([1, 0, 2])  # whole numbers too
    before = values.copy()
    assert group_advantages(values, AdvantageSettings()).dtype == np.float64
    assert (values == before).all()


@pytest.mark.parametrize("values", [[1.0, math.nan], [math.inf, 0.0], [], [[1.0, 0.0]]])
def test_rewards_must_be_one_vector_of_finite_numbers(values: list[float]) -> None:
    with pytest.raises(InvalidTrajectory, match="finite"):
        group_advantages(np.array(values, dtype=np.float64), AdvantageSettings())
