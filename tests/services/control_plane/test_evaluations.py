"""Evaluations as a state machine: whoever dies or moves on, each ends once, under one version, with every answer."""

from typing import Any

import numpy as np
import pytest

from sapo_learner.errors import Mismatch
from services.control_plane.evaluation_parts import CHUNK_PROMPTS, cut, summary
from services.control_plane.evaluations import Evaluations
from services.runtime.evaluation_settings import EvaluationSettings
from services.tasks import Prompt
from tests.small_run import answer

LAST = 10
PROMPTS = [
    Prompt(id=f"p{index}", content=f"{index}?", answer=str(index)) for index in range(2 * CHUNK_PROMPTS + 1)
]  # three chunks


def evaluations(prompts: list[Prompt] = PROMPTS, **settings: Any) -> Evaluations:
    defaults = {"every": 3, "samples": 101, "boundary_samples": 202}
    return Evaluations({"t": prompts}, 0, EvaluationSettings(**(defaults | settings)), last_step=LAST)


def scheduled(each: Evaluations) -> list[int]:
    return [evaluation.after_step for evaluation in each.open]


def finish_all(each: Evaluations, worker: str, policy: int) -> dict[str, Any]:
    """`worker` answers chunks until the first evaluation is done; returns its line for the record."""
    while True:
        chunk = each.claim(worker, policy, policy, {worker: policy})
        assert chunk is not None
        done = each.complete(answer(chunk, worker))
        if done:
            each.finish(done)
            return summary(done, each.parts)


def test_first_last_and_one_in_every_so_many_steps_are_evaluated_once() -> None:
    each, made = evaluations(), []
    for step in range(LAST + 1):
        if each.schedule(step):
            made.append(step)
            assert not each.schedule(step)
            finish_all(each, "a", step)
            assert not each.schedule(step)
    assert made == [0, 3, 6, 9, 10]


def test_a_publish_that_was_skipped_moves_the_evaluation_to_the_next_one() -> None:
    each, made = evaluations(), []
    for step in (0, 2, 5, 7, 10):
        if each.schedule(step):
            made.append(step)
            finish_all(each, "a", step)
    assert made == [0, 5, 7, 10]


def test_every_problem_is_answered_equally_often_and_no_chunk_is_given_twice() -> None:
    each = evaluations()
    each.schedule(0)
    serving = {"a": 0, "b": 0, "c": 0}
    chunks = [each.claim(worker, 0, 0, serving) for worker in serving]
    assert [chunk and (chunk.chunk, len(chunk.prompts), chunk.samples) for chunk in chunks] == [
        (0, CHUNK_PROMPTS, 2),
        (1, CHUNK_PROMPTS, 2),
        (2, 1, 2),
    ]
    assert len({chunk.seed for chunk in chunks if chunk}) == 3
    assert each.claim("d", 0, 0, serving | {"d": 0}) is None


def test_pass_at_1_is_the_mean_over_all_responses() -> None:
    each = evaluations()
    each.schedule(0)
    for correct in (1, 2, 0):
        chunk = each.claim("a", 4, 0, {"a": 4})
        assert chunk
        done = each.complete(answer(chunk, correct=correct))
    assert done
    line = summary(done, cut({"t": PROMPTS}))
    mean = (CHUNK_PROMPTS + 2 * CHUNK_PROMPTS) / (2 * len(PROMPTS))
    assert (line["pass_at_1"], line["samples"], line["step"], line["version"]) == (mean, 2 * len(PROMPTS), 0, 4)
    rates = np.repeat([0.5, 1.0, 0.0], [CHUNK_PROMPTS, CHUNK_PROMPTS, 1])
    assert line["standard_error"] == pytest.approx(rates.std(ddof=1) / len(rates) ** 0.5)
    assert line["mean_tokens"] == 30 / (2 * len(PROMPTS))
    assert line["examples"][0] == ["0?", "answer to p0"]
    assert len(line["examples"]) == 20


def test_a_worker_that_asks_again_gets_the_chunk_it_holds() -> None:
    each = evaluations()
    each.schedule(0)
    assert each.claim("a", 0, 0, {"a": 0}) == each.claim("a", 0, 0, {"a": 0})


def test_the_chunk_of_a_worker_that_died_goes_to_another_that_serves_the_same() -> None:
    each = evaluations()
    each.schedule(3)
    first = each.claim("a", 5, 3, {"a": 5, "b": 5})
    second = each.claim("b", 5, 3, {"a": 5, "b": 5})
    assert first
    assert second
    each.complete(answer(second, "b"))
    again = each.claim("b", 5, 3, {"b": 5})
    assert again == first
    late = each.complete(answer(first, "a"))  # it was only slow: its answer is as good, and ends nothing twice
    assert late is None
    assert each.open[0].chunks[0].done


def test_a_worker_that_moved_on_gives_its_chunk_back() -> None:
    each = evaluations()
    each.schedule(3)
    first = each.claim("a", 5, 3, {"a": 5, "b": 5})
    assert each.claim("b", 5, 3, {"a": 6, "b": 5}) == first


def test_an_evaluation_that_nobody_can_finish_starts_over_under_a_newer_version() -> None:
    each = evaluations()
    each.schedule(3)
    first = each.claim("a", 5, 3, {"a": 5})
    assert first
    each.complete(answer(first, "a"))
    restarted = each.claim("b", 6, 4, {"b": 6})
    assert restarted
    assert (restarted.chunk, restarted.version) == (0, 6)
    assert each.complete(answer(first, "a")) is None
    assert not each.open[0].chunks[0].done
    assert finish_all(each, "b", 6)["version"] == 6


def test_a_version_is_pinned_from_the_first_claim_to_the_end() -> None:
    each = evaluations()
    each.schedule(0)
    assert each.pinned == set()
    each.claim("a", 4, 0, {"a": 4})
    assert each.pinned == {4}
    assert each.claim("b", 5, 0, {"a": 4, "b": 5}) is None
    while each.open:
        chunk = each.claim("a", 4, 0, {"a": 4, "b": 5})
        assert chunk
        done = each.complete(answer(chunk))
        if done:
            each.finish(done)
    assert each.pinned == set()


def test_a_policy_that_came_before_the_schedule_is_not_evaluated_for_it() -> None:
    each = evaluations()
    each.schedule(3)
    assert each.claim("a", 2, 2, {"a": 2}) is None


def test_the_first_and_the_last_are_evaluated_at_exactly_that_step() -> None:
    each = evaluations()
    each.schedule(0)
    assert each.claim("a", 1, 1, {"a": 1}) is None
    assert finish_all(each, "a", 0)["step"] == 0
    each.schedule(LAST)
    assert each.claim("a", 9, 9, {"a": 9}) is None
    assert finish_all(each, "a", LAST)["step"] == LAST


def test_no_policy_is_published_over_the_first_until_that_is_evaluated() -> None:
    each = evaluations()
    each.schedule(0)
    assert not each.holds(0)
    assert each.holds(1)
    finish_all(each, "a", 0)
    assert not each.holds(1)
    each.schedule(3)
    assert not each.holds(4)


def test_an_evaluation_that_nobody_has_begun_gives_way_to_a_newer_one() -> None:
    each = evaluations()
    each.schedule(3)
    each.schedule(6)
    assert scheduled(each) == [6]
    each.claim("a", 6, 6, {"a": 6})
    each.schedule(9)
    assert scheduled(each) == [6, 9]


def test_one_that_must_start_over_gives_way_too_so_that_it_never_stands_in_for_the_last() -> None:
    each = evaluations()
    each.schedule(9)
    assert each.claim("a", 9, 9, {"a": 9})
    each.schedule(LAST)
    chunk = each.claim("b", LAST, LAST, {"b": LAST})
    assert chunk
    assert chunk.samples == 2
    assert scheduled(each) == [LAST]


def test_a_boundary_never_gives_way() -> None:
    each = evaluations()
    each.schedule(0)
    each.schedule(3)
    assert scheduled(each) == [0, 3]


def test_a_result_that_is_not_one_of_its_chunk_is_refused() -> None:
    each = evaluations()
    each.schedule(0)
    chunk = each.claim("a", 0, 0, {"a": 0})
    assert chunk
    good = answer(chunk)
    for wrong in ({"correct": [1]}, {"samples": 1}, {"chunk": 2}, {"chunk": 99}):
        with pytest.raises(Mismatch, match="not the result of that chunk"):
            each.complete(good.model_copy(update=wrong))
    assert each.complete(good.model_copy(update={"evaluation": "step-00000099"})) is None
    assert not any(chunk.done for chunk in each.open[0].chunks)


def test_what_is_saved_goes_on_after_a_restart_where_it_was() -> None:
    each = evaluations()
    each.schedule(0)
    first = each.claim("a", 0, 0, {"a": 0, "b": 0})
    each.claim("b", 0, 0, {"a": 0, "b": 0})
    assert first
    each.complete(answer(first))
    restarted = evaluations()
    restarted.restore([one.model_dump_json() for one in each.open], [])
    assert restarted.open == each.open
    third = restarted.claim("a", 0, 0, {"a": 0, "b": 0})
    assert third
    assert third.chunk == 2


def test_an_evaluation_that_was_recorded_before_the_crash_is_not_made_again() -> None:
    each = evaluations()
    each.schedule(3)
    saved = [one.model_dump_json() for one in each.open]
    line = finish_all(each, "a", 4)
    restarted = evaluations()
    restarted.restore(saved, [line])
    assert restarted.open == []
    assert not restarted.schedule(3)
    assert not restarted.schedule(4)
    assert not restarted.schedule(5)
    assert restarted.schedule(6)


def test_a_task_without_held_out_problems_is_never_evaluated_and_holds_nothing() -> None:
    each = evaluations([])
    assert not each.schedule(0)
    assert not each.holds(1)


def test_more_correct_responses_than_there_were_are_refused() -> None:
    each = evaluations()
    each.schedule(0)
    chunk = each.claim("a", 0, 0, {"a": 0})
    assert chunk is not None
    with pytest.raises(Mismatch, match="not the result of that chunk"):
        each.complete(answer(chunk, "a", 1_000))
