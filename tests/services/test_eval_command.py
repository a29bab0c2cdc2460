"""`sapo eval --suite`: figures are those of its own record, the same twice, and it goes on where it stopped."""

import asyncio
import json
import os
import re
import signal
import string
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapo_learner.errors import ConfigError
from sapo_learner.policy import tiny_policy, write_policy
from services import offline
from services.evaluation_files import AnswerFile, header, read, sample_lines
from services.offline import Plan, Progress
from services.runtime.api import Answer
from services.runtime.settings import RunConfig, load_config
from services.suites import Suite, load
from tests.command_line import Outcome, sapo

PARITY = """
from services.tasks import Prompt, Task

class Parity(Task):
    inline = True

    def prompts(self, split):
        return [Prompt(id=f"{split}-{n}", content=f"{n}=") for n in range(1, 9)]

    def score(self, prompt, response):
        return {"correct": float(len(response.text) % 2), "length": float(len(response.text))}
"""
SAMPLES = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_policy(tiny_policy(string.printable, seed=0), directory)
    return directory


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """16 prompts; right is an answer with an odd number of characters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parity.py").write_text(PARITY)
    path = tmp_path / "parity.yaml"
    path.write_text(f"name: parity\nchecked: yes\ntask: {{name: ./parity.py}}\nsamples: {SAMPLES}\nmax_tokens: 8\n")
    return path


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]


def bare(directory: Path) -> bytes:
    """samples.jsonl without the time in its header."""
    first, _, rest = (directory / "samples.jsonl").read_bytes().partition(b"\n")
    facts = json.loads(first)
    del facts["time"]
    return json.dumps(facts).encode() + b"\n" + rest


def test_figures_equal_an_independent_computation_from_the_record(model: Path, suite: Path, tmp_path: Path) -> None:
    outcome = sapo("eval", model, "--suite", suite, "--out", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    head, *samples = lines(tmp_path / "out")
    assert (head["kind"], head["policy"], head["suite"]) == ("header", result["policy_digest"], "parity")
    problems = sorted({each["problem"] for each in samples})
    correct = np.array([[each["correct"] for each in samples if each["problem"] == name] for name in problems])
    assert correct.shape == (16, SAMPLES)
    assert 0 < correct.mean() < 1
    assert [each["correct"] for each in samples] == [len(each["text"]) % 2 == 1 for each in samples]
    assert all(each["rewards"] == {"correct": len(each["text"]) % 2, "length": len(each["text"])} for each in samples)
    assert result["pass_at_1"] == pytest.approx(correct.mean())
    assert result["standard_error"] == pytest.approx(correct.mean(axis=1).std(ddof=1) / 4)
    for k in (2, 4):
        draws = [correct[:, list(chosen)].any(axis=1).mean() for chosen in combinations(range(SAMPLES), k)]
        assert result["pass_at_k"][str(k)]["mean"] == pytest.approx(np.mean(draws))
    low, high = result["interval_95"]
    assert low < correct.mean() < high
    assert result["mean_tokens"] == pytest.approx(np.mean([each["tokens"] for each in samples]))
    assert [each["correct"] for each in result["per_problem"]] == [
        sum(each["correct"] for each in samples if each["problem"] == row["problem"]) for row in result["per_problem"]
    ]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == {
        key: value for key, value in result.items() if key != "out"
    }


def test_two_evaluations_with_one_seed_are_identical_and_another_seed_is_another(
    model: Path, suite: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert sapo("eval", model, "--suite", suite, "--seed", seed, "--out", tmp_path / name).code == 0
    assert bare(tmp_path / "a") == bare(tmp_path / "b")
    assert (tmp_path / "a" / "summary.json").read_bytes() == (tmp_path / "b" / "summary.json").read_bytes()
    texts = [[each["text"] for each in lines(tmp_path / name)[1:]] for name in "ac"]
    assert texts[0] != texts[1]


class Stop(Exception):
    """Ends an evaluation in its middle."""


async def test_what_was_interrupted_goes_on_and_ends_as_if_it_had_not_been(
    model: Path, suite: Path, tmp_path: Path
) -> None:
    parity = Suite.model_validate({"name": "parity", "task": {"name": "./parity.py"}, "samples": 4})
    plan = Plan(suite=parity, max_tokens=8)
    whole = await offline.evaluate(str(model), Plan(**{**vars(plan), "out": tmp_path / "whole"}))

    def stop(progress: Progress) -> None:
        if progress.done == 5:
            raise Stop

    few = RunConfig.model_validate({"engine": {"slots": 4}})  # another batch, the same answers
    broken = Plan(**{**vars(plan), "out": tmp_path / "broken", "given": few})
    with pytest.raises(ExceptionGroup):
        await offline.evaluate(str(model), broken, stop)
    partial = lines(tmp_path / "broken")
    assert len(partial) >= 1 + 5 * SAMPLES
    assert len(partial) < 1 + 16 * SAMPLES
    torn = tmp_path / "broken" / "samples.jsonl"
    torn.write_bytes(torn.read_bytes()[:-20])  # as a kill in the middle of a line would leave it
    asked: list[int] = []
    rest = await offline.evaluate(str(model), broken, lambda progress: asked.append(progress.done))
    assert asked[0] >= 4
    assert {**rest, "out": ""} == {**whole, "out": ""}
    assert bare(tmp_path / "whole") == bare(tmp_path / "broken")
    again: list[int] = []
    await offline.evaluate(str(model), broken, lambda progress: again.append(progress.done))
    assert again == [16]  # nothing left to ask


def test_ctrl_c_says_what_is_done_and_how_to_go_on(model: Path, suite: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.cli", "eval", str(model), "--suite", str(suite), "--out", "out"]
    command += ["--samples", "16", "--set", "engine.slots=16", "--max-tokens", "48"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    while (line := process.stderr.readline()) and not line.startswith("sapo: 2 of 16"):
        assert line.startswith("sapo: ")
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait() == 130
    assert said.splitlines()[-1].endswith("of 16 problems are in out; the same command goes on")
    assert len(lines(tmp_path / "out")) >= 1 + 2 * 16


def test_another_evaluation_in_the_same_place_is_refused_with_what_differs(
    model: Path, suite: Path, tmp_path: Path
) -> None:
    assert sapo("eval", model, "--suite", suite, "--out", "out").code == 0
    outcome = sapo("eval", model, "--suite", suite, "--out", "out", "--temperature", 0.5)
    assert outcome.code == 2
    assert "another evaluation is there: settings" in outcome.err
    assert "'temperature': 0.5" in outcome.err
    assert outcome.err.endswith("(give another --out)\n")
    system = ["--set", "chat.template=none", "--set", "task.name=./parity.py"]
    assert sapo("eval", model, "--suite", suite, *system, "--out", "out").code == 0  # asked just the same
    (tmp_path / "parity.py").write_text(PARITY.replace("range(1, 9)", "range(2, 10)"))
    outcome = sapo("eval", model, "--suite", suite, "--out", "out")
    assert outcome.code == 2
    assert "prompts_digest" in outcome.err


def test_without_out_a_suite_s_answers_have_a_place_of_their_own(model: Path, suite: Path, tmp_path: Path) -> None:
    outcomes = [sapo("eval", model, "--suite", suite, "--json", "--seed", seed) for seed in (0, 0, 1)]
    places = [json.loads(each.out)["out"] for each in outcomes]
    assert places[0] == places[1] != places[2]
    assert all(place.startswith("evaluations/parity-") for place in places)
    assert outcomes[0].out == outcomes[1].out
    assert "16 of 16 problems" in outcomes[1].err.splitlines()[0]


def test_for_people_there_is_a_table_and_the_figures(model: Path, suite: Path) -> None:
    outcome = sapo("eval", model, "--suite", suite, "--temperature", "0", "--out", "out")
    rows = outcome.out.splitlines()
    assert rows[0].split() == ["problem", "correct", "of", "pass@1", "mean", "tokens"]
    assert rows[1].split()[0] == "train-1"
    assert {row.split()[1] for row in rows[1:17]} <= {"0", "4"}  # at temperature 0 all answers are the same
    assert any(row.startswith("pass@1 ") and "(64 responses to 16 problems of parity" in row for row in rows)
    assert any(row.startswith("pass@4 ") for row in rows)
    assert rows[-1] == "every response: out/samples.jsonl"


def test_what_is_not_checked_is_said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text(
        '{"question": "1+1?", "answer": "#### 2"}\n{"question": "?", "answer": "#### 3"}\n'
    )
    command = ("eval", model, "--suite", "gsm8k", "--data", "p.jsonl", "--samples", 1, "--max-tokens", 4)
    outcome = sapo(*command)
    assert outcome.code == 0, outcome.err
    assert "suite gsm8k is not checked" in outcome.err


def test_the_list_names_every_suite_and_what_is_checked() -> None:
    printed = {line.split()[0]: line for line in sapo("eval", "--list").out.splitlines()[1:]}
    assert " no " in printed["aime25"]
    assert " yes " in printed["arithmetic"]
    assert {each["name"] for each in json.loads(sapo("eval", "--list", "--json").out)} == set(printed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--suite", "aime"), "unknown suite 'aime', did you mean"),
        (("--data", "x.jsonl"), "--data belongs to --suite"),
        (("--suite", "word_problems", "--max-tokens", 5000), "--max-tokens: the longest prompt has"),
        (("--suite", "word_problems", "--data", "none.jsonl"), "none.jsonl"),
    ],
)
def test_mistakes_are_one_sentence(model: Path, arguments: tuple[object, ...], said: str) -> None:
    outcome: Outcome = sapo("eval", model, *arguments)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1


def test_the_held_out_prompts_of_a_configuration_are_evaluated_as_before(
    model: Path, suite: Path, tmp_path: Path
) -> None:
    settings = ["--set", "task.name=./parity.py", "--set", "sampling.max_tokens=8"]
    result = json.loads(sapo("eval", model, *settings, "--samples", 3, "--json").out)
    assert (result["problems"], result["samples"], result["suite"], result["out"]) == (8, 24, None, None)
    assert not (tmp_path / "evaluations").exists()
    assert sapo("eval", model, *settings, "--samples", 3).out.count("held_out-") == 8


def test_without_a_number_of_responses_held_out_prompts_get_equally_many_of_2000(
    model: Path, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.offline.DEFAULT_SAMPLES", 20)  # 2000 take a while
    settings = ["--set", "task.name=./parity.py", "--set", "sampling.max_tokens=8"]
    result = json.loads(sapo("eval", model, *settings, "--json").out)
    assert (result["problems"], result["samples"], result["samples_per_problem"]) == (8, 24, 3)


def test_of_two_writers_the_second_is_refused(tmp_path: Path) -> None:
    facts = header(settings={"samples_per_problem": 1})
    with AnswerFile(tmp_path, facts), pytest.raises(ConfigError, match="another evaluation writes there"):
        AnswerFile(tmp_path, facts).__enter__()
    with AnswerFile(tmp_path, facts):
        pass


def test_the_record_ends_in_the_order_of_the_problems_however_they_were_answered(tmp_path: Path) -> None:
    answer = Answer(text="", tokens=1, finish_reason="stop", rewards={}, correct=True)
    with AnswerFile(tmp_path, header(settings={"samples_per_problem": 1})) as file:
        for name in "bca":
            file.add(sample_lines("t", name, 0, [answer]))
        file.finish([("t", name) for name in "abc"])
    assert [line["problem"] for line in read(tmp_path / "samples.jsonl")[1]] == ["a", "b", "c"]


def test_the_record_keeps_what_a_text_may_hold(tmp_path: Path) -> None:
    text = 'a "b"\n\u2028\x00 é 漢'
    answer = Answer(text=text, tokens=3, finish_reason="stop", rewards={"correct": 1}, correct=True)
    facts = header(settings={"samples_per_problem": 1})
    with AnswerFile(tmp_path, facts) as file:
        file.add(sample_lines("t", "p", 3, [answer]))
    assert read(tmp_path / "samples.jsonl")[1][0]["text"] == text


def test_a_problem_s_seed_depends_on_nothing_but_the_problem() -> None:
    seeds = {offline.problem_seed(seed, task, name) for seed in (0, 1) for task in "ab" for name in "xy"}
    assert len(seeds) == 8
    assert offline.problem_seed(0, "a", "x") == offline.problem_seed(0, "a", "x")


def test_the_event_loop_is_left_clean(model: Path, suite: Path) -> None:
    """An evaluation that fails ends its engine's thread, too."""
    with pytest.raises(ConfigError):
        asyncio.run(offline.evaluate(str(model), Plan()))


DOCS = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()


def test_the_commands_of_the_docs_are_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model of another size, and for runs/demo up to where there is no such run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(model)
    rows = [{"problem": "1+1?", "answer": 2}, {"problem": "1/2+1?", "answer": 1.5}]
    (tmp_path / "aime25.jsonl").write_text("\n".join(map(json.dumps, rows)))
    commands = re.findall(r"^    sapo (eval [^#\n]*)", DOCS, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        outcome = sapo(*command.split(), *([] if "--list" in command else ["--max-tokens", 4]))
        assert outcome.code == (5 if "runs/demo" in command else 0), outcome.err


def test_the_files_of_the_docs_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    suite, run = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(suite)
    (tmp_path / "run.yaml").write_text(run)
    assert load("./mine.yaml").ks == [4, 16]
    config = load_config(tmp_path / "run.yaml")
    assert [each.name for each in config.evaluation.suites] == ["word_problems", "capitals"]
    assert config.evaluation.model_copy(update={"suites": []}) == RunConfig().evaluation
