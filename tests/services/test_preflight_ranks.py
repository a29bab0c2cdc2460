"""A model that several ranks cannot train is refused before any process starts, and one process may have it."""

import json
from pathlib import Path

import pytest
from transformers import GPTJConfig

from tests.command_line import sapo
from tests.own_model import write_model


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    texts = [f"What is {n} plus {n}?" for n in range(20)]
    write_model(tmp_path / "model", texts)
    (tmp_path / "good.jsonl").write_text("".join(json.dumps({"prompt": each, "answer": "1"}) + "\n" for each in texts))
    return ["--set=policy.source=model", "--set=sampling.max_tokens=16", "--set=task.name=jsonl",
            "--set=task.path=good.jsonl"]  # fmt: skip


def test_two_ranks_train_a_model_that_packs(settings: list[str]) -> None:
    assert sapo("config", *settings, "--set=parallel.processes=2").code == 0


def test_two_ranks_do_not_train_one_with_an_attention_of_its_own(settings: list[str]) -> None:
    GPTJConfig(vocab_size=500, n_embd=16, n_layer=2, n_head=2, rotary_dim=4).save_pretrained("model")
    assert sapo("config", *settings, "--set=parallel.processes=1").code == 0
    outcome = sapo("config", *settings, "--set=parallel.processes=2")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "policy.source: GPTJForCausalLM cannot be trained in packed rows (its attention is eager)" in outcome.err
    assert "set parallel.processes to 1" in outcome.err
