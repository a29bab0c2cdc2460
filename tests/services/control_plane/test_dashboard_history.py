"""The record as the page draws it: bounded, in order, the same after a restart, and never broken by a line."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.control_plane.dashboard.columns import Columns
from services.control_plane.dashboard.figures import Figures
from services.control_plane.dashboard.history import History
from services.control_plane.record import Record
from tests.small_run import TOKEN, Learner, Running


def line(step: int, **fields: Any) -> dict[str, Any]:
    """A step's as the learner writes it, as far as curves need it."""
    facts = {"reward": 0.5, "tokens": 10, "waited_seconds": 1.0, "started": 100.0 * step, "ended": 100.0 * step + 3}
    seconds = {"read": 1.0, "forward": 2.5, "checkpoint": 0.5, "publish": 9.0}  # the last goes on beside the others
    return {"kind": "step", "step": step, "seconds": seconds, **facts, **fields}


def columns(history: History) -> dict[str, list[float | None]]:
    found: dict[str, list[float | None]] = history.steps.since(0)["columns"]
    return found


def test_memory_is_bounded_and_a_point_is_the_mean_of_the_steps_that_it_stands_for() -> None:
    table = Columns(points=8)
    for step in range(1, 101):
        table.add(step, Figures({"value": float(step), "most": float(step)}, frozenset({"most"})))
        assert len(table) <= 8
    found = table.since(0)
    assert found["x"] == [16, 32, 48, 64, 80, 96, 100]
    assert found["columns"]["value"] == [8.5, 24.5, 40.5, 56.5, 72.5, 88.5, 98.5]
    assert found["columns"]["most"] == [16, 32, 48, 64, 80, 96, 100]


def test_a_figure_that_is_not_there_counts_for_nothing_in_a_mean() -> None:
    table = Columns(points=2)
    for step, value in enumerate([None, 4.0, 1.0, 2.0, None, None, None, None], start=1):
        table.add(step, Figures({"value": value}))
    assert table.since(0)["columns"]["value"] == [pytest.approx(7 / 3, rel=1e-5), None]


def test_a_restored_learner_s_steps_replace_those_it_takes_again() -> None:
    history = History()
    for step in (1, 2, 3, 4, 3, 4, 5):
        history.hear(line(step, reward=float(step)))
    assert history.steps.since(0)["x"] == [1, 2, 3, 4, 5]
    again = history.steps.generation
    history.hear(line(2, reward=9.0))
    assert history.steps.since(0)["x"] == [1, 2]
    assert columns(history)["reward"] == [1, 9.0]
    assert history.steps.generation > again, "a page must know that its tail is gone"


def test_going_back_into_the_middle_of_a_point_keeps_the_order_of_steps() -> None:
    table = Columns(points=4)
    for step in range(1, 17):
        table.add(step, Figures({"value": 1.0}))
    for step in (7, 8, 9):
        table.add(step, Figures({"value": 2.0}))
    x = table.since(0)["x"]
    assert x == sorted(set(x))
    assert x[-1] == 9


def test_a_point_that_has_grown_is_sent_again_and_nothing_before_it() -> None:
    history = History()
    for step in (1, 2, 3):
        history.hear(line(step))
    news = history.steps.since(2)
    assert (news["from"], news["x"]) == (2, [3])


def test_a_column_that_comes_later_is_null_before() -> None:
    history = History()
    history.hear(line(1))
    history.hear(line(2, rewards={"late": 1.0}))
    assert columns(history)["reward/late"] == [None, 1.0]


def test_what_describes_trained_tokens_is_no_figure_of_a_step_without_any() -> None:
    history = History()
    history.hear(line(1, tokens=0, entropy=0.0))
    assert columns(history)["entropy"] == [None]


def test_times_shares_and_diagnostics_are_figures() -> None:
    history = History()
    spreads = {"all": 0.2, "age_0": 0.0, "age_3_4": 0.3}
    history.hear(line(1, diagnostics={"gate": {"positive": 0.9, "negative": 0.8}, "log_ratio_std": spreads}))
    found = {name: values[0] for name, values in columns(history).items()}
    assert (found["seconds"], found["waiting"], found["tokens_per_second"]) == (4.0, 0.25, 2.5)
    assert (found["gate/positive"], found["log_ratio_std/age_3_4"]) == (0.9, 0.3)
    assert "log_ratio_std/all" not in found


def test_engines_stand_still_when_they_do_not_sample_between_two_of_their_lines() -> None:
    history = History()
    for time, intervals in ((10.0, [[9.0, 10.0]]), (14.0, [[9.5, 11.0], [13.0, 14.0]])):
        history.hear({"kind": "busy", "worker": "a", "time": time, "intervals": intervals})
    history.hear(line(1))
    assert columns(history)["idle"] == [0.5]


@pytest.mark.parametrize(
    "broken",
    [
        {"kind": "step"}, {"kind": "step", "step": "1"}, {"kind": "step", "step": 1, "reward": "much"}, {"kind": 7}, {},
        {"kind": "step", "step": 1, "diagnostics": [1], "rewards": 3, "outcomes": None, "seconds": "long"},
        {"kind": "step", "step": 1, "diagnostics": {"gate": 1.0}}, {"kind": "evaluation", "step": 1, "by_task": []},
        {"kind": "busy", "worker": "a", "time": 1.0, "intervals": [[1, 2, 3], "x"]}, {"kind": "evaluation"},
    ],
)  # fmt: skip
def test_no_line_breaks_it(broken: dict[str, Any]) -> None:
    history = History()
    history.hear({"kind": "busy", "worker": "a", "time": 0.5, "intervals": []})
    history.hear(broken)
    history.hear(line(5))
    assert history.steps.step == 5


def test_names_cannot_grow_it_without_end() -> None:
    history = History()
    for step in range(1, 400):
        history.hear(line(step, rewards={f"name-{step}": 1.0}))
    assert len(columns(history)) <= 256


def test_figures_that_are_not_finite_are_none() -> None:
    history = History()
    history.hear(line(1, reward=float("nan"), gradient_norm=float("inf")))
    assert (columns(history)["reward"], columns(history)["gradient_norm"]) == ([None], [None])


def test_evaluations_are_in_the_order_of_their_steps_with_their_intervals() -> None:
    history = History()
    for step, rate in ((0, 0.1), (50, 0.5), (25, 0.3), (25, 0.4)):
        history.hear({"kind": "evaluation", "step": step, "pass_at_1": rate, "standard_error": 0.1})
    found = history.evaluation_columns()
    assert found["x"] == [0, 25, 50]
    assert found["columns"]["pass_at_1"] == [0.1, 0.4, 0.5]
    assert found["columns"]["low"] == [pytest.approx(0.1 - 0.196), pytest.approx(0.4 - 0.196), pytest.approx(0.304)]


def test_it_is_the_same_after_a_restart(tmp_path: Path) -> None:
    before = History()
    record = Record(tmp_path / "record.jsonl", before.hear)
    for step in range(1, 30):
        record.add("step", **{name: value for name, value in line(step, reward=step / 7).items() if name != "kind"})
    after = History()
    Record(tmp_path / "record.jsonl", after.hear)
    assert after.everything() == before.everything()
    assert json.dumps(after.everything())


async def test_the_control_plane_serves_what_the_learner_told(running: Running, learner: Learner) -> None:
    await learner.report("training", 1, record=line(1))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=running.url, headers=headers, timeout=5) as http:
        answer = (await http.get("/v1/history")).json()
    assert answer["steps"]["x"] == [1]
    assert answer["steps"]["columns"]["reward"] == [0.5]
    assert answer["groups"] == []
