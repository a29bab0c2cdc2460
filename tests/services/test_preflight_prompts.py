"""Every prompt goes through the chat template before a run begins, and not only the longest."""

import json
from pathlib import Path

import pytest

from tests.command_line import sapo
from tests.own_model import chat_tokenizer, write_model

COUNT = 300  # more than are measured in tokens
REFUSING = (
    "{% for message in messages %}{% if message.role == 'narrator' %}{{ raise_exception('no narrator here') }}"
    "{% endif %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    texts = [f"What is {n} plus {n}?" for n in range(COUNT)]
    write_model(tmp_path / "model", texts)
    tokenizer = chat_tokenizer(texts)
    tokenizer.chat_template = REFUSING
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": text, "answer": "1"} for text in texts]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows[7]["prompt"] = [{"role": "narrator", "content": "7"}]  # the shortest
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--set=policy.source=model", "--set=sampling.max_tokens=16", "--set=task.name=jsonl"]


def test_a_short_prompt_that_the_template_refuses_is_named_with_its_task(settings: list[str]) -> None:
    assert sapo("config", *settings, "--set=task.path=good.jsonl").code == 0
    outcome = sapo("config", *settings, "--set=task.path=odd.jsonl", "--set=task.label=stories")
    assert outcome.code == 2
    assert "task stories, prompt odd.jsonl:8: the chat template cannot write it: no narrator here" in outcome.err


def test_a_suite_is_looked_at_too(settings: list[str], tmp_path: Path) -> None:
    suite = "name: tales\nchecked: yes\nmax_tokens: 16\ntask: {name: jsonl, path: odd.jsonl}\n"
    (tmp_path / "tales.yaml").write_text(suite)
    outcome = sapo("config", *settings, "--set=task.path=good.jsonl", "--set=evaluation.suites=[tales.yaml]")
    assert outcome.code == 2
    assert "suite tales, prompt odd.jsonl:8: the chat template cannot write it: no narrator here" in outcome.err
