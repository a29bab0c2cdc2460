"""docs/first-run.md, followed word by word: a model directory, a JSONL, a file with a reward, then its commands."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo_learner.archive import Archive
from services.wire import decode
from tests.documents import ROOT, Command, commands, files
from tests.own_model import write_model

pytestmark = pytest.mark.timeout(400)
DOCUMENT = ROOT / "docs" / "first-run.md"


@dataclass(frozen=True)
class Followed:
    """The directory in which the page was followed, and what each command answered, by its first two words."""

    directory: Path
    outcomes: dict[str, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    directory = tmp_path_factory.mktemp("first-run")
    for name, text in files(DOCUMENT).items():
        (directory / name).write_text(text)
    questions = [json.loads(line)["question"] for line in (directory / "words.jsonl").read_text().splitlines()]
    write_model(directory / "model", questions)
    outcomes = {}
    for command in commands(DOCUMENT):
        outcomes[" ".join(command.text.split()[:2])] = outcome = _run(command, directory)
        assert outcome.returncode == 0, f"{command.text}\n{outcome.stdout}\n{outcome.stderr}"
    return Followed(directory, outcomes)


def _run(command: Command, directory: Path) -> subprocess.CompletedProcess[str]:
    _, *arguments = shlex.split(command.text)
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments], cwd=directory, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def test_the_run_trains_to_its_end_and_its_ledger_balances(followed: Followed) -> None:
    assert "4 steps" in followed.outcomes["sapo up"].stdout
    assert "finished" in followed.outcomes["sapo status"].stdout
    assert "balanced  True" in followed.outcomes["sapo ledger"].stdout


def test_prompts_went_through_the_chat_template_and_rewards_came_from_the_file(followed: Followed) -> None:
    tokenizer = AutoTokenizer.from_pretrained(followed.directory / "model")
    groups = [decode(each.payload) for each in Archive(followed.directory / "runs/words/archive", None).entries()]
    assert len(groups) == 16
    for group in groups:
        text = tokenizer.decode(group.prompt_ids.tolist())
        assert text.startswith("<|im_start|>system\nAnswer with a number.<|im_end|>\n<|im_start|>user\n")
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert group.task == "words"
        for each in group.trajectories:
            response = tokenizer.decode(each.token_ids.tolist(), skip_special_tokens=True)
            assert each.rewards["short"] == pytest.approx(-0.001 * len(response))
            assert each.rewards["a number"] == pytest.approx(0.1 * any(map(str.isdigit, response)))


def test_held_out_problems_were_evaluated_while_it_trained(followed: Followed) -> None:
    record = (followed.directory / "runs/words/record.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, record) if line["kind"] == "evaluation"]
    assert {line["step"] for line in lines} >= {0, 4}
    assert all(line["samples"] == 8 for line in lines)


def test_transformers_loads_the_export_and_gives_the_same_logprobs(followed: Followed) -> None:
    model = AutoModelForCausalLM.from_pretrained(followed.directory / "trained", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(followed.directory / "trained")
    question = "How many?"
    outcome = _run(Command("", f"sapo sample runs/words --prompt {question!r} --json", ""), followed.directory)
    sampled = json.loads(outcome.stdout)
    prompt_ids = sampled["prompt_ids"]
    assert tokenizer.decode(prompt_ids).endswith(f"user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    ids = torch.tensor([[*prompt_ids, *sampled["token_ids"]]])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    expected = logprobs[len(prompt_ids) - 1 : -1].gather(-1, ids[0, len(prompt_ids) :, None]).flatten()
    assert sampled["logprobs"] == pytest.approx(expected.tolist(), abs=1e-5)
    before = AutoModelForCausalLM.from_pretrained(followed.directory / "model", dtype=torch.float32)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert any(moved)
