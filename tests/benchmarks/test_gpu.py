"""The GPU benchmark, in miniature on the CPU: that it measures what it says, and what it says where it cannot."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import gpu
from benchmarks.gpu_cases import MINIATURES, SHAPES, Case, cases, measure, synthetic_groups
from benchmarks.gpu_report import model_flops, parameters, report
from sapo_learner.advantages import step_advantages
from sapo_learner.batching import collate
from sapo_learner.config import AdvantageSettings
from sapo_learner.empty_policy import empty_policy

CPU = torch.device("cpu")
PUBLISHED = {"0.6B": 596_049_920, "1.7B": 1_720_574_976, "4B": 4_022_468_096}  # parameters of Qwen3-...
STEP, LOGPROBS = "## Optimizer steps", "## Log-probs from hidden states"


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table behind a heading, without its header."""
    lines = iter(text.split(f"{heading}\n")[1].splitlines())
    next(line for line in lines if line.startswith("|---"))
    found = []
    while (line := next(lines, "")).startswith("|"):
        found.append([cell.strip() for cell in line[1:-1].split("|")])
    return found


def run(out: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--out", str(out), *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    return out.read_text()


def test_miniature(tmp_path: Path) -> None:
    """A step of the learner in a process of its own, as a GPU would make it: sharded, 16-bit, layers computed again."""
    text = run(tmp_path / "gpu.md", "--only", "MoE")
    assert "**not measured: no NVIDIA GPU was at hand**" in text
    assert "    python -m benchmarks.gpu\n" in text
    assert rows(text, LOGPROBS) == []
    (row,) = rows(text, STEP)
    assert row[:2] == ["miniature MoE", "256"]
    assert all(float(cell.replace(",", "")) > 0 for cell in row[3:6])
    assert row[6:] == ["-", "-"], "a CPU has neither a known peak nor a GPU's memory"


@pytest.mark.parametrize("case", [each for each in cases(small=True) if each.table == "logprobs"], ids=str)
def test_log_probs(case: Case) -> None:
    found = measure(case, CPU)
    assert len(found["seconds"]) == 5
    float32 = case.way in ("naive", "ours")
    assert found["difference"] <= 1e-5 if float32 else 1e-4 < found["difference"] < 0.1


def test_what_the_time_does_not_reach_is_said(tmp_path: Path) -> None:
    gpu.main(["--small", "--minutes", "0", "--out", str(tmp_path / "gpu.md")])
    text = (tmp_path / "gpu.md").read_text()
    total = len(cases(small=True))
    assert f"{total} of {total} rows were not reached in 0 minutes." in text
    assert [row[2] for row in rows(text, STEP) + rows(text, LOGPROBS)] == ["skipped: the time was over"] * total


def test_out_of_memory_is_a_row() -> None:
    case = Case("logprobs", "miniature", 2**45, "ours")
    found = measure(case, CPU)
    assert found["problem"] == "out of memory"
    text = report([case], {case: found}, command="", small=True, minutes=1)
    assert rows(text, LOGPROBS) == [[f"{2**45:,}", "ours", "out of memory", "", "", ""]]


def test_a_process_that_ends_early_is_a_row() -> None:
    found = gpu.in_fresh_process(Case("logprobs", "miniature", 16, "nobody's"), small=True, seconds=100)
    assert found == {"problem": 'failed: KeyError: "nobody\'s"'}


def test_a_process_that_takes_too_long_is_a_row() -> None:
    found = gpu.in_fresh_process(Case("steps", "miniature", 256), small=True, seconds=0.01)
    assert found == {"problem": "stopped after 0 s"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path / "gpu.md")])
    assert ended.value.code == 2
    assert "torch finds no NVIDIA GPU here; --small runs" in capsys.readouterr().err
    assert not (tmp_path / "gpu.md").exists()


def packed_lengths(tokens: int) -> list[int]:
    """Of all responses with their prompts, which must make one row."""
    groups = synthetic_groups(tokens, 100)
    batch = collate(groups, step_advantages(groups, AdvantageSettings()), step=1, microbatch_tokens=tokens)
    (microbatch,) = batch.microbatches
    return sorted(microbatch.lengths)


def test_groups_fill_one_row_to_the_token() -> None:
    sizes = [*range(256, 320), 2_048, 8_192, 32_768]  # whatever the last response leaves over
    assert [sum(packed_lengths(each)) for each in sizes] == sizes


@pytest.mark.parametrize("tokens", [256, 2_048, 8_192, 32_768])
def test_lengths_have_a_tail(tokens: int) -> None:
    lengths = packed_lengths(tokens)
    assert lengths[-1] > 2.5 * lengths[len(lengths) // 2]


@pytest.mark.parametrize("name", [*SHAPES, *MINIATURES])
def test_parameters(name: str) -> None:
    config = (SHAPES | MINIATURES)[name].config
    model = empty_policy({"config.json": json.dumps(config).encode()}, packs=True).model
    assert parameters(config) == sum(each.numel() for each in model.parameters())
    assert parameters(config) == PUBLISHED.get(name, parameters(config))


@pytest.mark.parametrize("name", MINIATURES)
def test_model_flops_are_those_that_torch_counts(name: str) -> None:
    """But for attention, of which the formula counts the causal half, and for the rotary angles."""
    config: dict[str, Any] = dict(MINIATURES[name].config)
    shape = AutoConfig.for_model(**config)
    shape._experts_implementation = "eager"  # plain products, which torch counts
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="eager")
    length = 96
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.int64)).logits.sum().backward()
    whole = {"tokens": length, "trained": length, "squares": 2 * length**2}
    assert model_flops(config, whole) == pytest.approx(counter.get_total_flops(), rel=2e-3)


def test_mfu_is_of_the_card_that_is_known() -> None:
    case = Case("steps", "0.6B", 2_048)
    found = {
        "seconds": [0.1] * 4 + [9.0], "peak": 3 << 30, "trained": 2_000, "tokens": 2_048, "responses": 9,
        "longest": 500, "squares": 10**6, "card": "NVIDIA H200",
    }  # fmt: skip
    # 28 layers of 15,728,640 weights in matrices, and the output projection of 151,936 x 1,024
    flops = 6 * (28 * 15_728_640 * 2_048 + 151_936 * 1_024 * 2_000 + 28 * 16 * 128 * 10**6)

    def row(card: str) -> list[str]:
        return rows(report([case], {case: found | {"card": card}}, command="", small=False, minutes=1), STEP)[0]

    assert row("NVIDIA H200")[3:] == ["100.0", "20,000", f"{flops / 1e11:,.4g}", f"{flops / 989e11:.1%}", "3.00"]
    assert row("NVIDIA H100 PCIe")[6] == "-"
    assert "not measured" not in report([case], {case: found}, command="", small=False, minutes=1)
