"""A group as it was trained on: the figures are those of the step, told token by token."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapo_learner.policy import tiny_policy
from sapo_learner.token_figures import trained_figures
from services.learner import shown_groups
from services.learner.session import StepNews
from services.learner.shown_groups import Showcase, TrainedGroup
from tests.recorded import ALPHABET
from tests.services.learner.recorded_run import GROUPS, Run

STEPS = 6


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run", steps=STEPS)


@pytest.fixture(scope="module")
def news(tmp_path_factory: pytest.TempPathFactory) -> list[StepNews]:
    """Of steps that each show a group."""
    run, found = Run(tmp_path_factory.mktemp("runs") / "run", steps=STEPS), list[StepNews]()
    with run.session() as session, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shown_groups, "EVERY_SECONDS", 0.0)
        session.run(lambda _: None, found.append)
    return found


@pytest.fixture(scope="module")
def shown(news: list[StepNews]) -> list[TrainedGroup]:
    return [each.shown for each in news if each.shown]


def described(shown: TrainedGroup) -> dict[str, Any]:
    """As it arrives."""
    answer = Showcase(tiny_policy(ALPHABET, seed=0).tokenizer.decode).described(shown)
    assert answer
    return dict(json.loads(answer.model_dump_json()))


def test_every_step_that_moves_the_policy_shows_its_first_group_that_does(news: list[StepNews]) -> None:
    for each in news:
        assert each.shown
        assert each.shown.step == each.report.update.step
        moving = [number for number, advantages in enumerate(each.report.advantages) if advantages.any()]
        assert each.shown.entry == each.report.entries[moving[0]]
        assert each.shown.entry == f"1-{each.report.cursor - GROUPS + moving[0] + 1}"
        assert each.shown.group is each.report.groups[moving[0]]


def test_the_figures_of_all_its_responses_are_what_the_step_put_on_record(run: Run) -> None:
    seen = []

    def compare(news: StepNews) -> None:
        step, figures = news.report, session.learner.figures
        found = [
            trained_figures(figures, number, step.groups[group].trajectories[response])
            for number, (group, response) in enumerate(step.sequences)
        ]
        gates, coefficients = ([getattr(each, name) for each in found] for name in ("weight", "coefficient"))
        for name, values in (("gate", np.concatenate(gates)), ("coefficient", np.concatenate(coefficients))):
            values = values[~np.isnan(values)]
            assert len(values) == news.record["tokens"]
            assert values.mean() == pytest.approx(news.record["diagnostics"][name]["all"], rel=1e-4)
        seen.append(step.update.step)

    with run.session() as session:
        session.run(lambda _: None, compare)
    assert seen == [*range(1, STEPS + 1)]


def test_each_tokens_gate_is_the_papers(shown: list[TrainedGroup]) -> None:
    """arXiv 2511.20347: w = 4 sigma(tau (r - 1)) (1 - sigma(tau (r - 1))), tau by the sign of the advantage."""
    closed = False
    for group in shown:
        for response in described(group)["responses"]:
            tokens = response["tokens"]
            for ratio, gate, advantage in zip(tokens["ratio"], tokens["gate_weight"], tokens["advantage"], strict=True):
                if ratio is not None:
                    sigma = 1 / (1 + math.exp(-(1.0 if advantage > 0 else 1.05) * (ratio - 1)))
                    assert gate == pytest.approx(4 * sigma * (1 - sigma), rel=1e-4)
                    closed |= gate < 0.999
    assert closed


def test_each_column_tells_of_every_token_and_of_those_not_sampled_only_what_they_are(
    shown: list[TrainedGroup],
) -> None:
    unsampled = 0
    for group in shown:
        for response, recorded in zip(described(group)["responses"], group.group.trajectories, strict=True):
            tokens = response["tokens"]
            assert {len(column) for column in tokens.values()} == {len(recorded.token_ids)}
            assert tokens["id"] == recorded.token_ids.tolist()
            assert tokens["mask"] == recorded.loss_mask.tolist()
            assert tokens["version"] == recorded.token_versions().tolist()
            for name in ("behaviour_logprob", "ratio", "gate_weight", "coefficient", "advantage"):
                assert [value is not None for value in tokens[name]] == tokens["mask"]
            unsampled += tokens["mask"].count(False)
    assert unsampled


def test_the_text_of_the_tokens_is_the_responses(shown: list[TrainedGroup]) -> None:
    decode = tiny_policy(ALPHABET, seed=0).tokenizer.decode
    for group in shown:
        answer = described(group)
        prompt = group.group.prompt_ids.tolist()
        assert answer["prompt"] == {"text": decode(prompt), "tokens": len(prompt)}
        for response, recorded in zip(answer["responses"], group.group.trajectories, strict=True):
            whole = decode([*prompt, *recorded.token_ids.tolist()])
            assert answer["prompt"]["text"] + "".join(response["tokens"]["text"]) == whole


def test_of_long_responses_the_beginnings_are_shown(shown: list[TrainedGroup], monkeypatch: pytest.MonkeyPatch) -> None:
    group = max(shown, key=lambda each: max(len(response.token_ids) for response in each.group.trajectories))
    count = len(group.group.trajectories)
    monkeypatch.setattr(shown_groups, "MOST_TOKENS", 2 * count)
    answer = described(group)
    lengths = [len(each.token_ids) for each in group.group.trajectories]
    assert [len(each["tokens"]["id"]) for each in answer["responses"]] == [min(2, length) for length in lengths]
    assert answer["cut"] == sum(max(0, length - 2) for length in lengths) > 0


def test_a_group_that_was_dear_to_describe_is_not_soon_followed_by_another(
    news: list[StepNews], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def slow(ids: list[int]) -> str:
        nonlocal now
        now += 1.0
        return "x" * len(ids)

    step = news[0]
    assert step.shown
    showcase = Showcase(slow)
    showcase.described(step.shown)
    taken = now
    assert showcase._next == pytest.approx((1 + shown_groups.COST) * taken)


def test_a_group_that_nobody_would_take_is_said_once_and_left_out(
    news: list[StepNews], caplog: pytest.LogCaptureFixture
) -> None:
    shown = news[0].shown
    assert shown
    unheard = replace(shown, entry="of no log")
    showcase = Showcase(lambda ids: "x" * len(ids))
    assert [showcase.described(each) for each in (unheard, unheard)] == [None, None]
    assert caplog.text.count("entry of no log is not shown") == 1
