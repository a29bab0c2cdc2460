"""Functions within a response against plain loops over each response."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapo_learner.sequences import min_before, per_sequence, quantile, sum_before

quick = settings(max_examples=60, deadline=None)
number = st.floats(-1e3, 1e3)
responses = st.lists(st.lists(number, min_size=1, max_size=6), min_size=1, max_size=5)


def pack(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Values and ids; the ids neither sorted nor dense."""
    ids = [(7919 * i) % 101 - 50 for i in range(len(rows))]
    values = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
    return values, torch.tensor([i for i, row in zip(ids, rows, strict=True) for _ in row])


def sums(row: list[float]) -> list[float]:
    return [sum(row[:t]) for t in range(len(row))]


def minima(row: list[float]) -> list[float]:
    return [min(row[:t], default=float("inf")) for t in range(len(row))]


both = pytest.mark.parametrize(("ours", "truth"), [(sum_before, sums), (min_before, minima)])


@both
@quick
@given(rows=responses)
def test_each_response_by_itself(ours: Callable[..., Tensor], truth: Callable[..., list[float]], rows: Any) -> None:
    expected = [value for row in rows for value in truth(row)]
    assert ours(*pack(rows)).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-9)


@both
@quick
@given(rows=responses, order=st.randoms(use_true_random=False))
def test_interleaving_responses_changes_nothing(ours: Callable[..., Tensor], truth: Any, rows: Any, order: Any) -> None:
    values, ids = pack(rows)
    slots = ids.tolist()
    order.shuffle(slots)
    places = {i: iter(torch.nonzero(ids == i)[:, 0].tolist()) for i in set(slots)}
    mixed = torch.tensor([next(places[i]) for i in slots])
    assert ours(values[mixed], ids[mixed]).tolist() == ours(values, ids)[mixed].tolist()


def test_a_neighbour_changes_not_one_bit() -> None:
    own, own_ids = torch.full((50,), 0.1, dtype=torch.float32), torch.full((50,), 3)
    neighbour, neighbour_ids = torch.full((7,), 1e6 / 3, dtype=torch.float32), torch.full((7,), 1)
    among = sum_before(torch.cat([neighbour, own]), torch.cat([neighbour_ids, own_ids]))
    assert among[7:].tolist() == sum_before(own, own_ids).tolist()


@quick
@given(rows=responses, share=st.floats(0, 1), data=st.data())
def test_quantile_is_numpys_of_the_unmasked(rows: Any, share: float, data: Any) -> None:
    values, ids = pack(rows)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    ours = quantile(torch.where(mask, values, torch.nan), mask, ids, share)
    for i in ids.unique():
        unmasked = values[(ids == i) & mask].numpy()
        expected = np.quantile(unmasked, share) if len(unmasked) else np.nan
        np.testing.assert_allclose(ours[ids == i].numpy(), expected, rtol=1e-12, atol=1e-9)


def test_nothing_at_all() -> None:
    none = torch.zeros(0)
    assert per_sequence(none, none.long(), torch.cumsum).shape == (0,)
