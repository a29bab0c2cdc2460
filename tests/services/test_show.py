"""`sapo show`: the weights are those that the learner reported, the policy is named, and the text needs no colours."""

import io
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from sapo_learner.archive import Archive
from sapo_learner.policy import tiny_policy
from sapo_learner.snapshot import write_snapshot
from services.group_tokens import look
from services.kept_policies import nearest_policy
from services.token_text import pieces
from services.token_view import show
from services.wire import encode
from tests.command_line import sapo
from tests.own_model import chat_tokenizer
from tests.recorded import ALPHABET, entries, random_group
from tests.services.learner.recorded_run import GROUPS
from tests.services.recorded_steps import trained_run

torch.set_num_threads(1)
TAU_POS, TAU_NEG = 1.5, 4.0
EXACT = 11  # a step whose policy is kept as a checkpoint: after 10 steps


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    objective = {"name": "sapo", "tau_pos": TAU_POS, "tau_neg": TAU_NEG}
    return trained_run(tmp_path_factory.mktemp("runs") / "run", objective=objective)


def of_step(directory: Path, step: int) -> list[dict[str, Any]]:
    first = (step - 1) * GROUPS
    return [look(directory, f"1-{first + number}", "gate") for number in range(1, GROUPS + 1)]


def trained(group: dict[str, Any]) -> list[dict[str, Any]]:
    return [token for each in group["responses"] for token in each["tokens"] if token["mask"]]


def reported(directory: Path, step: int) -> dict[str, Any]:
    lines = [json.loads(line) for line in (directory / "record.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["step"] == step]
    return dict(line)


# ---- the figures


def test_the_gate_weight_is_the_papers(run: Path) -> None:
    """arXiv 2511.20347: w = 4 sigma(tau (r - 1)) (1 - sigma(tau (r - 1))), tau by the sign of the advantage."""
    seen = set()
    for token in (token for group in of_step(run, EXACT) for token in trained(group)):
        ratio = math.exp(token["logprob"] - token["behaviour_logprob"])
        sigma = 1 / (1 + math.exp(-(TAU_POS if token["advantage"] > 0 else TAU_NEG) * (ratio - 1)))
        assert token["ratio"] == pytest.approx(ratio, rel=1e-5)
        assert token["gate_weight"] == pytest.approx(4 * sigma * (1 - sigma), rel=1e-4)
        if token["advantage"]:
            assert token["coefficient"] == pytest.approx(ratio * token["gate_weight"], rel=1e-4)
        seen.add((np.sign(token["advantage"]), token["gate_weight"] < 0.99))
    assert {(1, True), (-1, True)} <= seen


@pytest.mark.parametrize("name", ["sapo", "sapo by age", "grpo", "bapo", "espo"])
def test_under_the_kept_policy_they_are_what_the_learner_reported_of_the_step(name: str, tmp_path: Path) -> None:
    """Also of an objective that wants policy ages, the whole step, or entropies."""
    name, _, by_age = name.partition(" ")
    options = {"positive_ramp": True, "age_full": 20} if by_age else {}
    aggregation = {"mode": "token_mean"} if name == "bapo" else {}
    directory = trained_run(tmp_path / "run", objective={"name": name, **options}, aggregation=aggregation)
    groups, line = of_step(directory, EXACT), reported(directory, EXACT)
    assert {each["policy"]["step"] for each in groups} == {EXACT - 1}
    tokens = [token for group in groups if any(each["advantage"] for each in group["responses"])
              for token in trained(group)]  # fmt: skip
    assert len(tokens) == line["tokens"]
    figures = (
        {"coefficient": "coefficient", "gate": "gate_weight"} if name == "sapo" else {"coefficient": "gate_weight"}
    )
    for figure, key in figures.items():
        mean = np.mean([token[key] for token in tokens])
        assert mean == pytest.approx(line["diagnostics"][figure]["all"], rel=1e-4)
    spread = np.std([token["logprob"] - token["behaviour_logprob"] for token in tokens])
    assert spread == pytest.approx(line["log_ratio_std"], rel=1e-4)
    assert {each["weight"] for each in groups} == {"gate" if name == "sapo" else "coefficient"}


def test_recorded_facts_are_those_of_the_archive_and_what_was_not_sampled_has_no_figures(run: Path) -> None:
    answer, group = look(run, "draw:32", "gate"), random_group(32)
    assert (answer["entry"], answer["step"], answer["objective"]) == ("1-33", EXACT, "sapo")
    masked = 0
    for shown, response in zip(answer["responses"], group.trajectories, strict=True):
        tokens = shown["tokens"]
        assert shown["finish_reason"] == response.finish_reason
        assert [each["id"] for each in tokens] == response.token_ids.tolist()
        assert [each["mask"] for each in tokens] == response.loss_mask.tolist()
        for token, logprob in zip(tokens, response.behaviour_logprobs, strict=True):
            figures = [token[key] for key in ("behaviour_logprob", "logprob", "ratio", "gate_weight", "advantage")]
            assert token["behaviour_logprob"] == (float(logprob) if token["mask"] else None)
            assert {each is None for each in figures} == {not token["mask"]}
            masked += not token["mask"]
    assert masked


def test_a_response_without_a_sampled_token_moves_no_other_responses_figures(run: Path, tmp_path: Path) -> None:
    group = random_group(0)
    first = group.trajectories[0]
    tool = replace(first, loss_mask=np.zeros_like(first.loss_mask))
    directory = copy(run, tmp_path)
    shutil.rmtree(directory / "archive")
    payloads = [replace(group, trajectories=(tool, *group.trajectories[1:])), *map(random_group, range(1, 3))]
    with Archive(directory / "archive", 1) as archive:
        archive.append(entries([encode(each) for each in payloads]))
    ours, whole = look(directory, "1-1", "gate"), look(run, "1-1", "gate")
    assert {token["ratio"] for token in ours["responses"][0]["tokens"]} == {None}
    for one, other in zip(ours["responses"][1:], whole["responses"][1:], strict=True):
        for key in ("ratio", "gate_weight"):  # the weight goes by the response's own advantage
            known = [(a[key], b[key]) for a, b in zip(one["tokens"], other["tokens"], strict=True) if a["mask"]]
            assert [a for a, _ in known] == pytest.approx([b for _, b in known])


# ---- which policy


def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (f"1-{GROUPS * 10 + 1}", "policy: the checkpoint of step 10, which the group was trained under"),
        (f"1-{GROUPS * 9 + 1}", "the checkpoint of step 8, the nearest that is kept; the group was trained under "
         "that of step 9, which `sapo replay RUN --until 9 --out DIR` makes again"),
        (f"1-{GROUPS * 4 + 1}", "policy: the checkpoint of step 0, the nearest"),
    ],
)  # fmt: skip
def test_it_says_which_policy_it_is(run: Path, entry: str, said: str) -> None:
    assert said in sapo("show", run, entry).out


def test_a_published_snapshot_may_be_the_nearest(run: Path, tmp_path: Path) -> None:
    directory = copy(run, tmp_path)
    policy = tiny_policy(ALPHABET, seed=7)
    blobs = directory / "snapshots" / "blobs"
    blobs.mkdir(parents=True)
    manifest = write_snapshot(policy.tensors(), step=5, dtype="float32", files={}, directory=blobs)
    (directory / "snapshots" / "manifests").mkdir()
    (directory / "snapshots" / "manifests" / "00000003.json").write_text(manifest.to_json())
    archive = Archive(directory / "archive", None)
    nearest = {step: nearest_policy(directory, archive, step) for step in (3, 5, 7, 9, 10)}
    found = {step: (each.kind, each.step) for step, each in nearest.items() if each}
    snapshot = ("float32 snapshot", 5)
    assert found == {3: snapshot, 5: snapshot, 7: ("checkpoint", 8), 9: ("checkpoint", 8), 10: ("checkpoint", 10)}
    assert nearest[5] is not None
    for name, tensor in nearest[5].load().tensors().items():
        assert torch.equal(tensor, policy.tensors()[name])


def test_a_checkpoint_of_a_branch_that_the_log_has_left_is_not_taken(run: Path, tmp_path: Path) -> None:
    directory = copy(run, tmp_path)
    shutil.rmtree(directory / "archive")
    with Archive(directory / "archive", 1) as archive:
        archive.append(entries([encode(random_group(draw + 100)) for draw in range(12 * GROUPS)]))
    nearest = nearest_policy(directory, Archive(directory / "archive", None), 10)
    assert nearest is not None
    assert nearest.step == 0


def test_any_policy_may_be_given(run: Path, tmp_path: Path) -> None:
    outcome = sapo("replay", run, "--until", "9", "--out", tmp_path / "policy")
    assert outcome.code == 0, outcome.err
    shown = sapo("show", run, f"1-{GROUPS * 9 + 1}", "--policy", tmp_path / "policy")
    assert f"policy: {tmp_path}/policy, as was asked for; the group was trained under that of step 9" in shown.out
    groups = [json.loads(sapo("show", run, f"1-{GROUPS * 9 + n}", "--policy", tmp_path / "policy", "--json").out)
              for n in (1, 2, 3)]  # fmt: skip
    weights = [token["gate_weight"] for group in groups for token in trained(group) if token["advantage"]]
    assert np.mean(weights) == pytest.approx(reported(run, 10)["diagnostics"]["gate"]["all"], rel=1e-4)


def test_without_any_policy_it_says_so_and_shows_what_needs_none(run: Path, tmp_path: Path) -> None:
    directory = copy(run, tmp_path)
    shutil.rmtree(directory / "checkpoints")
    answer = look(directory, "1-1", "ratio")
    assert (answer["by"], answer["policy"], answer["weight"]) == ("logprob", None, None)
    assert "no checkpoint from before this entry is kept" in answer["note"]
    outcome = sapo("show", directory, "1-1")
    assert outcome.code == 0
    assert "no policy to compare with: neither its settings nor its policy are known" in outcome.out
    assert "shown by logprob" in outcome.out
    assert {token["gate_weight"] for token in trained(answer)} == {None}


@pytest.mark.parametrize("by", ["advantage", "version", "logprob"])
def test_what_needs_no_policy_loads_none(run: Path, tmp_path: Path, by: str) -> None:
    directory = copy(run, tmp_path)
    (directory / "model" / "config.json").unlink()
    assert sapo("show", directory, "1-1").code != 0
    answer = look(directory, "1-1", by)
    assert (answer["by"], answer["policy"], answer["note"]) == (by, None, "")
    assert {token["advantage"] for token in trained(answer)} != {None}


# ---- what is printed


def answer_by_hand(by: str = "gate") -> dict[str, Any]:
    """Tokens: open, closed, not sampled, closed but an escape sequence and an end of line."""

    def token(text: str | None, weight: float | None, **fields: Any) -> dict[str, Any]:
        return {
            "id": 7, "text": text, "mask": weight is not None, "version": 3, "behaviour_logprob": -1.0, "ratio": 3.0,
            "gate_weight": weight, "advantage": -1.0, **fields,
        }  # fmt: skip

    tokens = [token("good", 0.95), token("bad", 0.49, version=4), token("said", None), token("\x1b[31m\n", 0.1),
              token(None, 0.5)]  # fmt: skip
    response = {"response": 2, "reward": 0.5, "advantage": -1.0, "finish_reason": "stop", "tokens": tokens}
    return {
        "entry": "1-9", "draw": 8, "task": "t", "step": 3, "advantages_note": "", "note": "", "by": by,
        "weight": "gate", "policy": {"kind": "checkpoint", "step": 2, "trained_under": 2},
        "prompt": {"tokens": [1], "text": "1+[b]1=\x1b"}, "responses": [response],
    }  # fmt: skip


def printed(answer: dict[str, Any], *, terminal: bool) -> str:
    output = io.StringIO()
    console = Console(
        file=output, force_terminal=terminal, color_system="truecolor" if terminal else None, width=30, highlight=False
    )
    show(console, answer)
    return output.getvalue()


def test_without_a_terminal_closed_and_foreign_tokens_have_marks_and_nothing_steers_a_terminal() -> None:
    text = printed(answer_by_hand(), terminal=False)
    assert text.endswith("good[bad]{said}[\\x1b[31m\\n\n]7 \n")
    assert "\nprompt\n1+[b]1=\\x1b\n" in text
    assert "\x1b" not in text
    assert "marks: {not sampled by the policy} [weight below 0.5]" in text
    assert "response 2: reward 0.5, advantage -1.000, ended by stop, 5 tokens, version 3 to 4, 2 with a weight" in text


@pytest.mark.parametrize("by", ["gate", "ratio", "advantage", "version", "logprob"])
def test_on_a_terminal_they_are_coloured_underlined_and_dimmed(by: str) -> None:
    text = printed(answer_by_hand(by), terminal=True)
    styles = {word: re.findall(rf"\x1b\[([\d;]+)m{word}\x1b", text) for word in ("good", "bad", "said")}
    assert styles["said"] == ["2"]
    assert styles["bad"][0].startswith("4;")
    assert ";48;2;" in styles["bad"][0]
    assert not styles["good"] or not styles["good"][0].startswith("4")
    assert (styles["good"] != [] and ";48;2;" in styles["good"][0]) == (by not in ("gate", "version"))
    assert "[bad]" not in text
    assert "{said}" not in text


def test_a_response_can_be_asked_for_and_what_is_not_there_is_said(run: Path) -> None:
    outcome = sapo("show", run, "1-1", "--response", "1")
    assert re.findall(r"^response \d+", outcome.out, re.MULTILINE) == ["response 1"]
    assert "\x1b" not in outcome.out
    assert sapo("show", run, "1-1", "--response", "9").err.endswith("no response 9 (the group has 0 to 3)\n")
    assert sapo("show", run, "1-999").code == 5
    assert sapo("show", run, "draw").code == 2


def test_pieces_of_text_make_up_the_text() -> None:
    tokenizer = chat_tokenizer(["How many?"])
    prompt, text = tokenizer.encode("How"), " many é 日本 😀? no"
    tokens = tokenizer.encode(text)
    found = pieces(tokenizer.decode, prompt, tokens)
    assert len(found) == len(tokens)
    assert "".join(each or "" for each in found) == text
    assert {"é", "日", "本", "😀"} <= {(each or "").strip() for each in found}, "whole, on the last of their tokens"
    assert pieces(lambda _: None, prompt, tokens) == [None] * len(tokens)
    half = tokenizer.encode("😀")[:2]
    assert "".join(each or "" for each in pieces(tokenizer.decode, prompt, half)), "cut off by the token limit"


def test_a_model_directory_without_a_tokenizer_shows_token_ids(run: Path, tmp_path: Path) -> None:
    directory = copy(run, tmp_path)
    for path in (directory / "model").glob("token*"):
        path.unlink()
    answer = look(directory, "1-1", "logprob")
    assert {token["text"] for token in trained(answer)} == {None}
    ids = " ".join(str(token["id"]) for token in answer["responses"][0]["tokens"])
    assert ids in re.sub(r"[{}]", "", sapo("show", directory, "1-1", "--by", "logprob").out)
