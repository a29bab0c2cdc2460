"""The GPU benchmark, in miniature on the CPU: that it measures what it says, and what it says where it cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_cases import MINIATURES, Case, cases, measure, synthetic_groups
from benchmarks.gpu_report import report
from sapo_learner.advantages import step_advantages
from sapo_learner.batching import Microbatch, collate
from sapo_learner.config import AdvantageSettings
from sapo_learner.flops import ModelFlops

CPU = torch.device("cpu")
PUBLISHED = {"0.6B": 596_049_920, "1.7B": 1_720_574_976, "4B": 4_022_468_096}  # parameters of Qwen3-...
STEP, LOGPROBS = "## Optimizer steps", "## Log-probs from hidden states"


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table behind a heading, without its header."""
    lines = iter(text.split(heading)[1].splitlines())
    next(line for line in lines if line.startswith("|---"))
    found = []
    while (line := next(lines, "")).startswith("|"):
        found.append([cell.strip() for cell in line[1:-1].split("|")])
    return found


def packed(tokens: int) -> Microbatch:
    """All responses with their prompts, which must make one row."""
    groups = synthetic_groups(tokens, 100)
    batch = collate(groups, step_advantages(groups, AdvantageSettings()), step=1, microbatch_tokens=tokens)
    (microbatch,) = batch.microbatches
    return microbatch


def test_miniature(tmp_path: Path) -> None:
    """A step of the learner in a process of its own, as a GPU would make it: sharded, 16-bit, layers computed again."""
    case = Case("steps", "miniature MoE", 256)
    found = gpu.in_fresh_process(case, small=True, seconds=100)
    flops = ModelFlops.of(MINIATURES[case.shape].empty())
    assert flops is not None
    assert found["flops"] == flops.of_step([packed(case.tokens)])
    text = report([case], {case: found}, command="", small=True, minutes=1)
    assert "**not measured: no NVIDIA GPU was at hand**" in text
    assert "    python -m benchmarks.gpu\n" in text
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


def test_a_process_that_ends_early_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a module in the benchmark's place, which fails before it has imported anything."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu.py").write_text("raise SystemExit('first this\\nthen a | b')\n")
    monkeypatch.chdir(tmp_path)
    gpu.main(["--small", "--only", "MoE", "--out", str(tmp_path / "gpu.md")])
    text = (tmp_path / "gpu.md").read_text()
    assert rows(text, STEP) == [["miniature MoE", "256", "failed: then a / b", *[""] * 5]]
    assert rows(text, LOGPROBS) == []


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


def test_groups_fill_one_row_to_the_token() -> None:
    sizes = [*range(256, 320), 2_048, 8_192, 32_768]  # whatever the last response leaves over
    assert [sum(packed(each).lengths) for each in sizes] == sizes


@pytest.mark.parametrize("tokens", [256, 32_768])
def test_lengths_have_a_tail(tokens: int) -> None:
    lengths = sorted(packed(tokens).lengths)
    assert lengths[-1] > 2.5 * lengths[len(lengths) // 2]


def test_shapes_are_those_published() -> None:
    text = report([], {}, command="", small=False, minutes=1)
    weights = {row[0]: row[6:8] for row in rows(text, "| model | vocabulary ")}
    assert {name: weights[name][0] for name in PUBLISHED} == {
        name: f"{count:,}, tied" for name, count in PUBLISHED.items()
    }
    # an untied output projection, and 12 layers of queries and outputs, keys and values, 4 of 32 experts, their router
    layer = 2 * 1_024 * 2_048 + 2 * 1_024 * 1_024 + 4 * 3 * 1_024 * 768 + 32 * 1_024
    assert weights["MoE"][1] == f"{151_936 * 1_024 + 12 * layer:,}"


def test_mfu_is_of_the_peak_that_the_learner_knows() -> None:
    case = Case("steps", "0.6B", 2_048)
    found = {
        "seconds": [0.1] * 4 + [9.0], "flops": 12.34e12, "peak": 989e12, "memory": 3 << 30, "trained": 2_000,
        "responses": 9, "longest": 500, "card": "NVIDIA H200",
    }  # fmt: skip

    def row(**others: Any) -> list[str]:
        return rows(report([case], {case: found | others}, command="", small=False, minutes=1), STEP)[0]

    assert row()[3:] == ["100.0", "20,000", "123.4", "12.5%", "3.00"]
    assert row(peak=None)[6] == "-"
    assert "not measured" not in report([case], {case: found}, command="", small=False, minutes=1)
