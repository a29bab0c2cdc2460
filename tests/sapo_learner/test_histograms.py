"""Histograms of the log-ratio: every token in one bin, and the mean weight of those in it."""

import numpy as np
import pytest

from sapo_learner.diagnostics import LOG_RATIO_EDGES, histograms

COLUMNS = {
    "log_ratio": np.array([-3.0, -0.15, 0.0, 0.0005, 0.15, 0.15, 7.0]),
    "clamped": np.zeros(7),
    "coefficient": np.array([0.1, 0.7, 1.0, 1.0, 0.8, 0.6, 0.05]),
    "advantage": np.array([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.0]),
    "age": np.array([0.0, 1.0, 0.0, 0.0, 3.0, 4.0, 4.0]),
}


def bin_of(value: float) -> int:
    return sum(value >= edge for edge in LOG_RATIO_EDGES)


def test_every_token_is_in_one_bin_of_each_of_its_groups() -> None:
    tokens = histograms(COLUMNS)["tokens"]
    assert {group: sum(counts) for group, counts in tokens.items()} == {
        "all": 7, "positive": 3, "negative": 3, "age_0": 3, "age_1": 1, "age_3_4": 3,
    }  # fmt: skip
    assert {len(counts) for counts in tokens.values()} == {len(LOG_RATIO_EDGES) + 1}
    assert [tokens["negative"][bin_of(value)] for value in (0.0, 0.15)] == [1, 2]
    assert (tokens["all"][0], tokens["all"][-1]) == (1, 1)


def test_the_weight_is_the_mean_of_the_tokens_in_the_bin_and_none_where_there_is_none() -> None:
    found = histograms(COLUMNS)
    assert found["weight_name"] == "coefficient"
    assert found["weight"]["negative"][bin_of(0.15)] == pytest.approx(0.7)
    assert found["weight"]["positive"][bin_of(0.15)] is None
    assert set(found["weight"]) == {"positive", "negative"}


def test_of_an_objective_with_a_gate_it_is_the_gate() -> None:
    found = histograms(COLUMNS | {"gate": np.full(7, 0.25)})
    assert found["weight_name"] == "gate"
    assert {each for sign in found["weight"].values() for each in sign} == {0.25, None}
