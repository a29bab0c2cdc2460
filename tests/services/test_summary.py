"""summary.json from a record: the figures are those of the lines, the last line of a step counts."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import services.summary
from sapo_learner import phases
from services import terminal
from services.summary import overlap, print_report, summarise


def step(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "step", "time": 100.0 + number, "step": number, "tokens": 10, "policy_age_mean": 1.0,
        "policy_age_max": 1, "outcomes": {"trained": 2, "stale": 0}, "mixed_version_responses": 1,
        "started": 100.0 + number, "ended": 100.5 + number, **fields,
    }  # fmt: skip


def evaluation(at: int, mean: float, answer: str) -> dict[str, Any]:
    return {
        "kind": "evaluation", "time": 110.0, "step": at, "pass_at_1": mean, "standard_error": 0.01, "samples": 2000,
        "examples": [["1+1+1=", answer], ["2+1+1=", ">4"]],
    }  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    lines = [
        {"kind": "session", "time": 100.0},
        {"kind": "warm_start", "time": 100.5, "ceiling": {"mean": 0.95, "standard_error": 0.005}},
        evaluation(0, 0.3, ">9") | {"time": 100.8},
        step(1, tokens=999, policy_age_max=99),
        {"kind": "session", "time": 500.0},  # the pause before it is not the run's time
        step(1, time=501.0),
        step(2, time=502.0, tokens=30, policy_age_mean=3.0, policy_age_max=4),
        {"kind": "busy", "time": 503.0, "worker": "a", "intervals": [[101.0, 101.25], [101.1, 101.25]]},
        {"kind": "probe", "time": 503.0, "max_abs_diff": 1e-6, "mixed_version_responses": 2},
        evaluation(2, 0.9, "(2)>3") | {"time": 504.0},
    ]
    (tmp_path / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "torn')
    return tmp_path


def test_what_could_not_be_scored_is_said_in_the_end(directory: Path) -> None:
    summary = summarise(directory, seed=3, ledger_balanced=True)
    assert summary["unscored"] is None
    assert "could not be scored" not in printed(summary)
    with (directory / "record.jsonl").open("a") as record:
        for count in (1, 2):
            line = {"reasons": {"timeout": count}, "last": "task [b], prompt p: late", "worker": "rollout-0"}
            record.write("\n" + json.dumps(line | {"kind": "unscored", "time": 504.0}) + "\n")
    summary = summarise(directory, seed=3, ledger_balanced=True)
    assert summary["unscored"]["reasons"] == {"timeout": 2}
    said = "2 responses could not be scored (timeout 2); last: task [b], prompt p: late; the log of rollout-0 says more"
    assert said in printed(summary).splitlines()


def printed(summary: dict[str, Any]) -> str:
    output = io.StringIO()
    print_report(Console(file=output, width=20), summary, Path("summary.json"))
    return output.getvalue()


def test_figures_come_from_the_record(directory: Path) -> None:
    summary = summarise(directory, seed=3, ledger_balanced=True)
    assert summary["base_pass_at_1"] == 0.3
    assert summary["final_pass_at_1"] == 0.9
    assert summary["ceiling_pass_at_1"] == 0.95
    assert summary["steps"] == 2
    assert summary["policy_age_mean"] == pytest.approx((10 * 1 + 30 * 3) / 40)
    assert summary["policy_age_max"] == 4
    assert summary["mixed_version_responses"] == 2
    assert summary["engine_logprob_max_abs_diff"] == 1e-6
    assert summary["sampling_overlap"] == pytest.approx(0.25)
    assert summary["seed"] == 3
    assert summary["examples"][0] == {"prompt": "1+1+1=", "base": ">9", "trained": "(2)>3"}


def test_wall_seconds_leave_out_the_time_between_sessions(directory: Path) -> None:
    assert summarise(directory, seed=0, ledger_balanced=True)["wall_seconds"] == pytest.approx(1 + 4)


def test_a_run_without_evaluations_says_that_it_was_not_measured(tmp_path: Path) -> None:
    (tmp_path / "record.jsonl").write_text(json.dumps(step(1)) + "\n")
    summary = summarise(tmp_path, seed=0, ledger_balanced=False)
    output = io.StringIO()
    print_report(Console(file=output), summary, tmp_path / "summary.json")
    assert "not measured" in output.getvalue()
    assert "DOES NOT BALANCE" in output.getvalue()
    assert "ceiling" not in output.getvalue()


def test_overlap_counts_time_once() -> None:
    assert overlap([(0.0, 10.0)], [(1.0, 3.0), (2.0, 4.0), (9.0, 20.0)]) == pytest.approx(0.4)
    assert overlap([(0.0, 1.0)], []) == 0
    assert overlap([], [(0.0, 1.0)]) is None


def test_without_a_terminal_no_line_of_the_report_is_wrapped_or_cut_and_problems_stand_as_written(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    output = io.StringIO()
    monkeypatch.setattr("sys.stdout", output)
    prompt = "How many [b]apples[/] are [red] if there are nineteen and then one hundred more are brought? " * 3
    summary = summarise(directory, seed=3, ledger_balanced=True)
    summary["examples"] = [{"prompt": prompt.strip(), "base": "a" * 100, "trained": "b" * 100}]
    print_report(terminal.console(), summary, directory / "summary.json")
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    assert f"{prompt.strip()}   {'a' * 100}   {'b' * 100}" in lines
    assert "…" not in output.getvalue()
    assert any(line.startswith("held-out pass@1: base 30.0 ± 1.0 % -> after RL 90.0") for line in lines)
    assert lines[-1].endswith(str(directory / "summary.json"))


def test_several_tasks_are_reported_each_and_a_suite_that_came_later_without_its_base(directory: Path) -> None:
    figures = {"standard_error": 0.02, "interval_95": [0.1, 0.2]}
    lines = [json.loads(line) for line in (directory / "record.jsonl").read_text().splitlines()[:-1]]
    for line in lines:
        if line["kind"] == "evaluation":
            line["by_task"] = {"words": figures | {"pass_at_1": line["pass_at_1"]}}
    lines[-1]["by_task"]["aime25"] = figures | {"pass_at_1": 0.125}
    (directory / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = summarise(directory, seed=0, ledger_balanced=True)
    assert summary["by_task"]["words"]["base_pass_at_1"] == 0.3
    assert summary["by_task"]["words"]["final_pass_at_1"] == 0.9
    assert summary["by_task"]["aime25"]["final_interval_95"] == [0.1, 0.2]
    output = io.StringIO()
    print_report(Console(file=output, width=200), summary, directory / "summary.json")
    assert "  words: 30.0 ± 2.0 % -> 90.0 ± 2.0 %" in output.getvalue()
    assert "  aime25: not measured -> 12.5 ± 2.0 %" in output.getvalue()


def test_it_says_where_the_learner_s_time_went(directory: Path) -> None:
    costs = [
        {"seconds": {"backward": 5.0, "optimizer": 9.0}},  # of an older version, which did not measure the rest
        {"seconds": {"backward": 3.0, "read": 2.0, "other": 1.0, "publish": 50.0, "archive": 40.0}},
        {"seconds": {"backward": 3.0, "read": 0.96, "collate": 0.04, "other": 0.0}},
    ]
    lines = [step(number, **cost) for number, cost in enumerate(costs)]
    (directory / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = summarise(directory, seed=0, ledger_balanced=True)
    assert summary["learner_time"] == pytest.approx({"backward": 0.6, "read": 0.296, "other": 0.1, "collate": 0.004})
    output = io.StringIO()
    print_report(Console(file=output, width=200), summary, directory / "summary.json")
    assert "learner: 60 % backward, 30 % waiting for groups, 10 % other\n" in output.getvalue()


def test_a_record_of_an_older_version_says_nothing_of_the_learner_s_time(directory: Path) -> None:
    summary = summarise(directory, seed=0, ledger_balanced=True)
    output = io.StringIO()
    print_report(Console(file=output), summary, directory / "summary.json")
    assert summary["learner_time"] == {}
    assert "learner:" not in output.getvalue()


def test_what_happens_beside_the_steps_is_named_as_the_learner_names_it() -> None:
    assert services.summary._OTHER == phases.OTHER
    assert services.summary._BESIDE == phases.BESIDE
