"""The ledger balances (I1): each way in which it can fail is named, and nothing else is."""

import tracemalloc
from typing import Any

import pytest

from sapo_learner.errors import Corrupt
from sapo_learner.ledger import Ledger, Outcome, audit, epoch_coverage


def ledger_of(**counts: int) -> Ledger:
    ledger = Ledger()
    for name, count in counts.items():
        ledger = ledger.add(Outcome(name), count)
    return ledger


def facts(**changes: Any) -> dict[str, Any]:
    """A run in order: 7 entries consumed, 2 in the archive, 1 in the stream; draws 10 and 12 are open."""
    balanced = {
        "ledger": ledger_of(trained=4, degenerate=2, stale=1),
        "cursor": 7,
        "accepted": 10,
        "archived": 2,
        "streamed": 1,
        "draws": [3, 0, 1, 2, 5, 4, 9, 8, 6, 11],
        "open_draws": {7, 10, 12},
        "next_draw": 13,
    }
    return balanced | changes


def problems(**changes: Any) -> list[str]:
    given = facts(**changes)
    return audit(given.pop("ledger"), **given).problems


def test_outcomes_are_the_six_of_the_balance():
    assert list(Outcome) == ["trained", "degenerate", "stale", "invalid", "refused", "skipped"]


def test_adding_leaves_the_old_ledger_alone():
    old = Ledger()
    new = old.add(Outcome.trained, 3).add(Outcome.degenerate, 2, uncounted=1).add(Outcome.trained)
    assert old == Ledger()
    assert (new[Outcome.trained], new[Outcome.degenerate], new.uncounted, new.consumed) == (4, 2, 1, 6)


def test_a_ledger_survives_its_dictionary_and_nothing_else_does():
    ledger = Ledger().add(Outcome.skipped, 2).add(Outcome.refused, uncounted=1)
    assert Ledger.from_dict(ledger.to_dict()) == ledger
    good = ledger.to_dict()
    for bad in ({}, good | {"lost": 1}, good | {"trained": -1}, good | {"trained": "4"}, good | {"trained": True}):
        with pytest.raises(Corrupt, match="not a ledger"):
            Ledger.from_dict(bad)


def test_i1_a_run_in_order_balances():
    given = facts()
    report = audit(given.pop("ledger"), **given)
    assert report.balanced
    assert report.to_dict() == {
        "accepted": 10,
        "trained": 4,
        "degenerate": 2,
        "stale": 1,
        "invalid": 0,
        "refused": 0,
        "skipped": 0,
        "uncounted": 0,
        "control": 0,
        "backlog": 3,
        "open": 3,
        "balanced": True,
        "problems": [],
    }


def test_i1_an_empty_run_balances():
    empty = {"cursor": 0, "accepted": 0, "archived": 0, "streamed": 0, "draws": [], "open_draws": [], "next_draw": 0}
    assert audit(Ledger(), **empty).balanced


@pytest.mark.parametrize("outcome", list(Outcome))
def test_i1_every_outcome_counts(outcome: Outcome):
    assert problems(ledger=Ledger().add(outcome, 7)) == []


DRAWS = facts()["draws"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            {"ledger": ledger_of(trained=6), "accepted": 9},
            ["the ledger accounts for 6 entries, the cursor stands at 7"],
            id="an entry behind the cursor has no outcome",
        ),
        pytest.param(
            {"ledger": ledger_of(trained=8), "accepted": 11},
            ["the ledger accounts for 8 entries, the cursor stands at 7"],
            id="an entry has two outcomes",
        ),
        pytest.param(
            {"archived": 1},
            ["10 entries were accepted, but 7 consumed + 1 archived + 1 in the stream make 9"],
            id="the archive lost one",
        ),
        pytest.param(
            {"streamed": 2},
            ["10 entries were accepted, but 7 consumed + 2 archived + 2 in the stream make 11"],
            id="the stream has one too many",
        ),
        pytest.param({"draws": [*DRAWS, 5]}, ["1 draws accepted more than once: 5"], id="a draw twice"),
        pytest.param({"draws": [*DRAWS, 5, 5]}, ["1 draws accepted more than once: 5"], id="a draw three times"),
        pytest.param({"draws": DRAWS[1:]}, ["1 draws neither accepted nor open: 3"], id="a draw lost"),
        pytest.param({"open_draws": {7, 12}}, ["1 draws neither accepted nor open: 10"], id="an open draw lost"),
        pytest.param(
            {"open_draws": {4, 7, 10, 12}}, ["1 draws accepted and still open: 4"], id="a draw accepted and open"
        ),
        pytest.param(
            {"draws": [*DRAWS, 5], "open_draws": {5, 7, 10, 12}},
            ["1 draws accepted more than once, and open: 5"],
            id="a draw twice and open",
        ),
        pytest.param(
            {"draws": [*DRAWS, 13, 1 << 60, -2]},
            ["3 draws were never handed out (next is 13): 13, 1152921504606846976, -2"],
            id="a draw from nowhere",
        ),
        pytest.param(
            {"open_draws": {7, 10, 12, 13}},
            ["1 draws were never handed out (next is 13): 13"],
            id="an open draw from nowhere",
        ),
        pytest.param(
            {"draws": DRAWS[:3]}, ["7 draws neither accepted nor open: 2, 4, 5, 6, 8, ..."], id="only some are shown"
        ),
    ],
)
def test_i1_each_imbalance_is_named(changes: dict[str, Any], expected: list[str]):
    assert problems(**changes) == expected


def test_i1_a_million_draws_take_a_byte_each():
    count = 1_000_000
    tracemalloc.start()
    given = facts(draws=(draw for draw in range(count) if draw != 77), next_draw=count, open_draws=())
    assert audit(given.pop("ledger"), **given).problems == ["1 draws neither accepted nor open: 77"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * count


# ---- the plain sampler: every prompt once per epoch


def test_i1_finished_epochs_are_covered():
    assert epoch_coverage([5, 3, 4, 0, 2, 1, 6], 3, next_draw=8) == []


def test_i1_an_epoch_with_an_open_or_unleased_draw_is_not_finished():
    assert epoch_coverage([0, 2, 3, 4, 5], 3, next_draw=8, open_draws=[1]) == []
    assert epoch_coverage([0, 1, 2, 3], 3, next_draw=5) == []


def test_i1_a_prompt_missing_or_repeated_in_its_epoch_is_named():
    assert epoch_coverage([0, 1, 3, 4, 4, 5, 6, 7, 8], 3, next_draw=9) == [
        "epoch 0: 1 draws never accepted: 2",
        "epoch 1: 1 draws accepted more than once: 4",
    ]
